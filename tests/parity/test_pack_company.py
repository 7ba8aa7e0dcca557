"""On a CPU, what an adapter computes does not depend on its neighbours, to the last bit.

One thread computes each adapter, as in a lane: the number of threads decides how sums are split.
"""

import numpy as np
import pytest
import torch

from higgs_tune import metrics
from higgs_tune.config import ALL_LINEAR
from higgs_tune.data.collate import count_targets
from higgs_tune.data.tokens import IGNORE, Encoded
from higgs_tune.train.engine import Engine
from higgs_tune.train.loop import PackLoop
from higgs_tune.train.residents import PackLimits
from tests.models import DATA, NUM_CODEBOOKS, example, make_dataset, tiny_base, trial
from tests.runs import figures
from tests.threads import torch_threads

STEPS = {"num_steps": 20, "report_every_steps": 10}
TRIALS = {  # ranks, alphas, rates, targets, modes, batches, accumulation, dropout: all mixed
    "plain": trial(seed=1, **STEPS),
    "dropout": trial(seed=2, dropout=0.3, batch_clips=5, token_budget=64, **STEPS),
    "small": trial(
        seed=3,
        rank=1,
        alpha=32.0,
        targets=("attention",),
        learning_rate=3e-2,
        batch_clips=1,
        **STEPS,
    ),
    "heads": trial(
        seed=4,
        rank=8,
        targets=("text_mlp", "text_head", "audio_head"),
        weight_decay=0.1,
        dropout=0.1,
        batch_clips=2,
        **STEPS,
    ),
    "audio_self": trial(
        seed=5,
        cross_attention="audio_self",
        targets=("audio_mlp", "audio_attention"),
        batch_clips=4,
        token_budget=100,
        **STEPS,
    ),
    "text_to_audio": trial(
        seed=6,
        cross_attention="text_to_audio",
        targets=(*ALL_LINEAR, "audio_attention"),
        new_module_lr_factor=0.5,
        audio_loss_weight=0.3,
        dropout=0.5,
        **STEPS,
    ),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with torch_threads(1):
        yield


def loop_of(dataset, *names, num_slots=6, lanes=1):
    limits = PackLimits.of(list(TRIALS.values()), num_slots)
    loop = PackLoop(tiny_base(), dataset, DATA, limits)
    loop.engine.lanes.count = lanes
    for name in names:
        loop.join(name, TRIALS[name])
    return loop


@pytest.fixture(scope="module")
def alone(dataset):
    """Each trial's two results and final state when trained alone."""
    ends = {}
    for name in TRIALS:
        loop = loop_of(dataset, name, num_slots=1)
        results = [figures(loop.advance()[name]) for _ in range(2)]
        ends[name] = (results, loop.engine.state(name))
    return ends


@pytest.mark.parametrize("lanes", [1, 2])
def test_twenty_packed_steps_equal_twenty_steps_alone(dataset, alone, lanes):
    loop = loop_of(dataset, *TRIALS, lanes=lanes)
    rounds = [loop.advance() for _ in range(2)]
    for name, (results, state) in alone.items():
        assert [figures(r[name]) for r in rounds] == results, name
        ours = loop.engine.state(name)
        for kind in ("weights", "exp_avg", "exp_avg_sq"):
            for key, tensor in getattr(state, kind).items():
                assert torch.equal(getattr(ours, kind)[key], tensor), (name, kind, key)


def stops(loop):
    loop.leave("heads")


def joins(loop):
    loop.join("text_to_audio", TRIALS["text_to_audio"])


def diverges(loop):
    for view in loop.engine.bank.views(loop.engine.residents["heads"].slot, "master").values():
        view.fill_(torch.nan)


@pytest.mark.parametrize("event", [stops, joins, diverges])
def test_a_neighbour_that_stops_joins_or_diverges_changes_no_bit(dataset, alone, event):
    loop = loop_of(dataset, "dropout", "heads", "audio_self")
    first = loop.advance()
    event(loop)
    second = loop.advance()
    for name in ("dropout", "audio_self"):
        assert [figures(r[name]) for r in (first, second)] == alone[name][0], name
    if event is diverges:
        assert second["heads"]["status"] == "diverged"
    if event is joins:
        assert figures(second["text_to_audio"]) == alone["text_to_audio"][0][0]


def test_two_packs_rank_their_common_trials_equally(dataset, alone):
    common = ("plain", "dropout", "heads")
    ranks = []
    for pack in (("small", *common), (*reversed(common), "text_to_audio")):
        loop = loop_of(dataset, *pack)
        last = [loop.advance() for _ in range(2)][-1]
        ranks.append(sorted(common, key=lambda name: last[name][metrics.VAL_TEXT_NLL]))
    assert ranks[0] == ranks[1]
    nlls = [alone[name][0][-1][metrics.VAL_TEXT_NLL] for name in ranks[0]]
    assert nlls == sorted(nlls) and len(set(nlls)) == len(nlls)


def of_one_modality(kind):
    """Rows of text only, or of audio only."""
    num = 6
    audio = kind == "audio"
    codes = np.random.default_rng(0).integers(0, 30, (num if audio else 0, NUM_CODEBOOKS))
    return Encoded(
        key=kind,
        ids_L=np.arange(13, 13 + num),
        audio_rows_A=np.arange(num if audio else 0),
        codes_AC=codes,
        text_labels_L=np.full(num, IGNORE) if audio else np.arange(14, 14 + num),
        audio_labels_AC=codes,
    )


@pytest.mark.parametrize("mode", ["off", "audio_self", "text_to_audio"])
@pytest.mark.parametrize("kind", ["text", "audio"])
def test_adapters_with_one_modality_and_with_both_are_independent(kind, mode):
    new = () if mode == "off" else ("audio_attention",)
    config = trial(cross_attention=mode, targets=(*ALL_LINEAR, *new), dropout=0.2)
    other = trial(seed=9, cross_attention=mode, targets=(*ALL_LINEAR, *new))
    one = of_one_modality(kind)

    def gradients(examples):
        engine = Engine(tiny_base(), PackLimits.of([config, other], num_slots=2))
        for slot, own in enumerate((config, other)):
            engine.add(str(slot), own)
            for view in engine.bank.views(slot, "master").values():
                view.normal_(0, 0.1, generator=torch.Generator().manual_seed(slot))
        counts = {slot: count_targets(e, NUM_CODEBOOKS) for slot, e in examples.items()}
        engine.forward_backward(engine.batch(examples), counts)
        return [engine.bank.views(slot, "grad") for slot in (0, 1)]

    neighbour = [example("clone", 3), example("speak", 4)]
    packed = gradients({0: [one], 1: neighbour})
    # not alone: every conversation has text, so a batch without any does not occur
    beside_other = gradients({0: [one], 1: [example("speak", 7, 3, 3)]})[0]
    for ours, theirs in (
        (packed[0], beside_other),
        (packed[1], gradients({1: neighbour})[1]),
    ):
        total = torch.cat([g.flatten() for g in theirs.values()]).norm()
        assert total > 0
        for name, gradient in theirs.items():
            assert (ours[name] - gradient).norm() / total < 1e-5, name
