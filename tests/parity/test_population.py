"""Population-based training: a trial copies another's weights and continues at other rates."""

import pytest
import torch

from higgs_tune.config import RateChange
from higgs_tune.train.checkpoint import load_state
from higgs_tune.train.loop import PackLoop
from higgs_tune.train.residents import PackLimits
from tests.models import DATA, make_dataset, tiny_base, trial

DONOR = trial(seed=1, rank=4, num_steps=6, report_every_steps=2)
COPIER = trial(seed=2, rank=2, targets=("attention",), num_steps=6, report_every_steps=2)
NEIGHBOUR = trial(seed=3, rank=8, num_steps=6, report_every_steps=2)
RATES = {"learning_rate": 3e-3, "text_loss_weight": 0.5, "audio_loss_weight": 2.0}
CHANGE = RateChange(step=2, copied_from="donor", new_module_lr_factor=0.1, **RATES)
COPY = DONOR.model_copy(update={"seed": 2, "schedule": (CHANGE,)})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


def loop_of(dataset, *trials):
    loop = PackLoop(tiny_base(), dataset, DATA, PackLimits.of(list(trials), len(trials)))
    return loop


def saved(loop, trial_id, directory):
    directory.mkdir()
    loop.snapshot(trial_id)(directory)
    return directory


def tensors(state):
    parts = {"weights": state.weights, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    return {(kind, name): tensor for kind, part in parts.items() for name, tensor in part.items()}


@pytest.fixture(scope="module")
def population(dataset, tmp_path_factory):
    """The loop after a copy at step 2 and one more interval, and what was saved on the way."""
    folder = tmp_path_factory.mktemp("population")
    loop = loop_of(dataset, DONOR, COPIER, NEIGHBOUR)
    for name, config in (("donor", DONOR), ("copier", COPIER), ("neighbour", NEIGHBOUR)):
        loop.join(name, config)
    loop.advance()
    donor = saved(loop, "donor", folder / "donor")
    loop.leave("copier")
    loop.join("copier", COPY, donor)
    copied = saved(loop, "copier", folder / "copied")
    loop.advance()
    return loop, donor, copied, folder


def test_the_copy_starts_with_the_donors_weights_and_moments(population):
    _, donor, copied, _ = population
    ours, theirs = load_state(copied), load_state(donor)
    assert ours.step == theirs.step == 2
    assert tensors(ours).keys() == tensors(theirs).keys()
    assert all(torch.equal(tensors(ours)[key], tensors(theirs)[key]) for key in tensors(ours))


def test_the_copy_continues_at_the_new_rate_and_loss_weights(population, dataset, tmp_path):
    """The reference has the new rates from the start, and no schedule."""
    loop, donor, _, _ = population
    reference = loop_of(dataset, DONOR)
    reference.join("alone", DONOR.model_copy(update={"seed": 2, **RATES}), donor)
    reference.advance()
    expected = load_state(saved(reference, "alone", tmp_path / "alone"))
    ours = load_state(saved(loop, "copier", tmp_path / "copier"))
    start = tensors(load_state(donor))
    moved = max(
        (tensors(expected)[key] - start[key]).abs().max() for key in start if key[0] == "weights"
    )
    for key, tensor in tensors(ours).items():
        torch.testing.assert_close(
            tensor, tensors(expected)[key], rtol=1e-3, atol=1e-3 * float(moved)
        )


def test_donor_and_neighbour_train_as_if_nothing_was_copied(population, dataset, tmp_path):
    loop, _, _, _ = population
    untouched = loop_of(dataset, DONOR, COPIER, NEIGHBOUR)
    for name, config in (("donor", DONOR), ("copier", COPIER), ("neighbour", NEIGHBOUR)):
        untouched.join(name, config)
    untouched.advance()
    untouched.advance()
    for name in ("donor", "neighbour"):
        ours = tensors(load_state(saved(loop, name, tmp_path / f"{name}-ours")))
        theirs = tensors(load_state(saved(untouched, name, tmp_path / f"{name}-theirs")))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
