"""Matmuls that a pack shares on a GPU: which adapters share them, what stays zero, the gradients."""

import pytest
import torch

from higgs_tune.data.collate import count_targets
from higgs_tune.model.dropout import Masks
from higgs_tune.train.engine import Engine
from higgs_tune.train.residents import PackLimits, Resident
from tests.mixed_pack import TRIALS, engine_of, examples_of, train
from tests.models import example, tiny_base, trial


def test_a_checkpoint_is_independent_of_the_layout_of_adapters():
    """Saved where each adapter multiplies alone, loaded where ranks share a layout, and vice versa."""
    for share, other in ((False, True), (True, False)):
        first, second = engine_of(share, *TRIALS), engine_of(other)
        train(first, list(TRIALS), range(2))
        for trial_id, config in TRIALS.items():
            state = first.state(trial_id)
            second.add(trial_id, config, state)
            again = second.state(trial_id)
            assert again.step == state.step == 2
            for kind in ("weights", "exp_avg", "exp_avg_sq"):
                theirs = getattr(state, kind)
                assert all(torch.equal(t, theirs[name]) for name, t in getattr(again, kind).items())
                assert any(t.any() for t in theirs.values())


RUNS = {  # case → path, slots, and the positions of the pack that share a matmul
    "everyone": ("attention", (0, 1, 2, 3), [slice(0, 4)]),  # though the third does not target it
    "targets at both ends": ("audio_mlp", (0, 1, 2, 3), [slice(0, 2)]),
    "a slot that rests": ("attention", (0, 2, 3), [0, 2]),
    "nobody": ("audio_mlp", (2, 3), []),
}


@pytest.mark.parametrize("case", RUNS)
def test_unlike_adapters_in_neighbouring_slots_share_a_matmul(case):
    path, slots, expected = RUNS[case]
    configs = [
        trial(rank=4, dropout=0.2),
        trial(rank=2, alpha=1.0),
        trial(rank=8, targets=("text_mlp",)),
        trial(rank=1, targets=("attention", "text_mlp")),
    ]
    for share in (True, False):
        limits = PackLimits.of(configs, num_slots=4)
        engine = Engine(tiny_base(), limits, share_matmuls=share)
        for n, config in enumerate(configs):
            engine.add(str(n), config)
        group = next(group for p, group in engine.lora_groups if p == path)
        rows = [run.rows for run in engine.bank.pack(slots).runs(group)]
        if share:
            assert rows == expected
        else:
            assert rows == [k for k, slot in enumerate(slots) if path in configs[slot].targets]


def test_adapters_of_one_rank_class_get_neighbouring_slots():
    """So that the optimizer steps over few zeros; with a highest rank of 64, the lower class ends at 16."""
    configs = [trial(rank=rank, targets=("attention",)) for rank in (64, 8, 32, 16)]
    limits = PackLimits.of(configs, num_slots=4)
    engine = Engine(tiny_base(num_layers=1), limits, share_matmuls=True)
    slots = [engine.add(str(n), config).slot for n, config in enumerate(configs)]
    assert slots == [3, 0, 2, 1]
    assert [engine.bank.layout_rank(config.rank) for config in configs] == [64, 16, 64, 16]
    _, group = engine.lora_groups[0]
    runs = engine.bank.pack((0, 1, 2, 3)).runs(group)
    assert [run.rows for run in runs] == [slice(0, 2), slice(2, 4)]
    alone = Engine(tiny_base(num_layers=1), PackLimits.of(configs, num_slots=1))
    assert alone.bank.layout_rank(8) == 8


CLASSES = {  # low and high ranks in turn, some of which lack paths that their neighbours target
    "l0": trial(seed=1, rank=8),
    "h0": trial(seed=2, rank=64, targets=("attention", "text_mlp")),
    "l1": trial(seed=3, rank=4, alpha=8.0, targets=("text_mlp", "audio_mlp", "text_head")),
    "h1": trial(seed=4, rank=20, dropout=0.2),
    "l2": trial(seed=5, rank=8, targets=("audio_mlp",)),
}
ONE_SCALE = {  # one scale in the attention's matmuls, which "between" does not target; two in the MLP's
    "first": trial(seed=1, rank=8, alpha=16.0, dropout=0.2),
    "between": trial(seed=2, rank=4, alpha=4.0, targets=("text_mlp",)),
    "last": trial(seed=3, rank=4, alpha=8.0, dropout=0.2),
}


def test_a_run_of_adapters_with_one_scale_uses_it_for_all():
    engine = Engine(tiny_base(), PackLimits.of([*ONE_SCALE.values()], 3), share_matmuls=True)
    for name, config in ONE_SCALE.items():
        engine.add(name, config)
    groups = dict(engine.lora_groups)
    for masks, scale in ((None, 2.0), (Masks(engine.device, {}), 2.5)):
        weights = engine.bank.pack((0, 1, 2)).training(masks)
        (attention,), (mlp,) = (weights.runs(groups[path]) for path in ("attention", "text_mlp"))
        assert (attention.scale, attention.scales_k11) == (scale, None)
        assert mlp.scale == 1
        assert mlp.scales_k11.flatten().tolist() == [scale, 1, scale]


@pytest.mark.parametrize(
    "pack, name", [(pack, name) for pack in (CLASSES, ONE_SCALE) for name in pack]
)
def test_rank_classes_in_any_order_give_the_gradients_of_each_alone(pack, name):
    limits = PackLimits.of(list(pack.values()), num_slots=len(pack))
    found = []
    for names in (list(pack), [name]):
        engine = Engine(tiny_base(), limits, share_matmuls=len(names) > 1)
        for slot, own in enumerate(names):
            # take the other slots, so that each adapter gets its own, as when trials come and go
            for other in range(len(names)):
                if other != slot and len(names) > 1:
                    engine.residents[f"taken {other}"] = Resident("", other, pack[own], {})
            assert engine.add(own, pack[own]).slot == slot
            for taken in [r for r in engine.residents if r.startswith("taken")]:
                del engine.residents[taken]
            generator = torch.Generator().manual_seed(7)
            for view in engine.bank.views(slot, "master").values():
                view.copy_(0.1 * torch.randn(view.shape, generator=generator))
        examples = {n: [example("clone", list(pack).index(o), 6)] for n, o in enumerate(names)}
        counts = {slot: count_targets(own, 4) for slot, own in examples.items()}
        engine.forward_backward(engine.batch(examples), counts)
        found.append(engine.bank.views(engine.residents[name].slot, "grad"))
    total = torch.cat([g.flatten() for g in found[1].values()]).norm()
    assert total > 0
    for parameter, gradient in found[1].items():
        assert (found[0][parameter] - gradient).norm() / total < 1e-5, parameter


@pytest.mark.parametrize(
    "highest, expected",
    [(8, 8), (12, 12), (16, 16), (32, 8), (48, 16), (64, 16), (100, 8), (128, 8)],
)
def test_the_lowest_rank_class_ends_where_it_suits_a_gpu(highest, expected):
    limits = PackLimits.of([trial(rank=highest, targets=("text_head",))], num_slots=2)
    engine = Engine(tiny_base(num_layers=1), limits, share_matmuls=True)
    assert engine.bank.layout_rank(8) == expected
    assert engine.bank.layout_rank(highest) == highest


def test_parameters_that_an_adapter_lacks_stay_zero_with_shared_matmuls():
    """No weight, moment or gradient in ranks and modules that only other adapters have."""
    engine = engine_of(True, *TRIALS)
    train(engine, list(TRIALS), range(3))
    examples = {r.slot: examples_of(t, 3) for t, r in engine.residents.items()}
    counts = {slot: count_targets(e, 4) for slot, e in examples.items()}
    engine.forward_backward(engine.batch(examples), counts)
    for trial_id, resident in engine.residents.items():
        for kind in ("master", "exp_avg", "exp_avg_sq", "grad"):
            row = getattr(engine.bank.lora, kind)[resident.slot]
            own = engine.bank.views(resident.slot, kind).items()
            num_own = sum(int(view.count_nonzero()) for name, view in own if "lora_" in name)
            assert 0 < num_own == int(row.count_nonzero()), (trial_id, kind)


def test_each_combination_of_slots_has_its_own_factors():
    configs = [trial(seed=n, targets=("attention",)) for n in range(3)]
    engine = Engine(tiny_base(), PackLimits.of(configs, num_slots=3), share_matmuls=True)
    for n, config in enumerate(configs):
        engine.add(str(n), config)
    _, group = engine.lora_groups[0]
    for slots in ((0, 1), (0, 1, 2), (0,)):
        (run,) = engine.bank.pack(slots).runs(group)
        factors = run.factors
        for whole in (factors.a_krD, factors.a_grad_krD, *factors.b_kOr, *factors.b_grad_kOr):
            assert whole.shape[:-2] == ((len(slots),) if len(slots) > 1 else ())
