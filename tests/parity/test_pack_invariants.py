"""Packed equals alone, neighbours change nothing, resumed equals uninterrupted.

With each adapter's own matmuls, as on a CPU, and with shared ones, as on a GPU.
"""

import pytest
import torch

from higgs_tune.config import ALL_LINEAR
from higgs_tune.data.collate import collate, count_targets, split_micro_batches
from higgs_tune.train.engine import Engine, PackLimits, Resident
from tests.models import example, tiny_base, trial

TRIALS = {
    "plain": trial(seed=1),
    "small": trial(seed=2, rank=2, alpha=32.0, targets=("attention",), learning_rate=3e-2),
    "heads": trial(
        seed=3, rank=8, targets=("text_mlp", "text_head", "audio_head"), weight_decay=0.1
    ),
    "audio_self": trial(
        seed=4, cross_attention="audio_self", targets=("audio_mlp", "audio_attention")
    ),
    "text_to_audio": trial(
        seed=5,
        cross_attention="text_to_audio",
        targets=(*ALL_LINEAR, "audio_attention"),
        new_module_lr_factor=0.5,
        audio_loss_weight=0.3,
    ),
}
LIMITS = PackLimits.of(list(TRIALS.values()), num_slots=len(TRIALS))


def examples_of(trial_id, step):
    """Ragged examples that depend on trial and step; "small" never sees audio targets."""
    seed = 1000 * list(TRIALS).index(trial_id) + 10 * step
    tasks = ("transcribe",) * 3 if trial_id == "small" else ("transcribe", "speak", "clone")
    count = 2 + (seed // 10) % 2
    return [
        example(task, seed + n, num_frames=4 + (seed + 3 * n) % 9, num_letters=2 + (seed + n) % 7)
        for n, task in enumerate(tasks[:count])
    ]


def train(engine, trial_ids, steps, poison=None):
    """Train residents together; returns losses per trial and step."""
    losses = {trial_id: [] for trial_id in trial_ids}
    for step in steps:
        slots = {engine.residents[t].slot: t for t in trial_ids}
        examples = {slot: examples_of(t, step) for slot, t in slots.items()}
        counts = {slot: count_targets(e, 4) for slot, e in examples.items()}
        batch = engine.batch(examples)
        text_K, audio_KC = engine.forward_backward(batch, counts)
        for k, slot in enumerate(batch.slots):
            losses[slots[slot]].append(torch.cat([text_K[k : k + 1], audio_KC[k]]))
        if poison == step:
            engine.bank.lora.grad[engine.residents["small"].slot, 3] = float("nan")
        engine.optim_step(trial_ids)
    return {t: torch.stack(values) for t, values in losses.items()}


def alone(trial_id, num_steps):
    engine = Engine(tiny_base(), PackLimits.of([TRIALS[trial_id]], num_slots=1))
    engine.add(trial_id, TRIALS[trial_id])
    return engine, train(engine, [trial_id], range(num_steps))[trial_id]


def engine_of(share, *trial_ids):
    engine = Engine(tiny_base(), LIMITS, share_matmuls=share)
    for trial_id in trial_ids:
        engine.add(trial_id, TRIALS[trial_id])
    return engine


def packed(share, num_steps, **kwargs):
    engine = engine_of(share, *TRIALS)
    return engine, train(engine, list(TRIALS), range(num_steps), **kwargs)


@pytest.fixture(scope="module", params=[False, True], ids=["each", "shared"])
def share(request):
    return request.param


@pytest.fixture(scope="module")
def pack(share):
    return packed(share, 10)


@pytest.mark.parametrize("trial_id", TRIALS)
def test_packed_adapters_match_single_runs(pack, trial_id):
    _, losses = pack
    _, single = alone(trial_id, 10)
    # fp32 rounding of differently shaped matmuls, grown by ten Adam steps
    torch.testing.assert_close(losses[trial_id][0], single[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses[trial_id], single, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("trial_id", TRIALS)
def test_packed_gradients_match_single_runs(trial_id, share):
    engine = engine_of(share, *TRIALS)
    single = Engine(tiny_base(), PackLimits.of([TRIALS[trial_id]], num_slots=1))
    single.add(trial_id, TRIALS[trial_id])
    gradients = []
    for one, trial_ids in ((engine, list(TRIALS)), (single, [trial_id])):
        for t in trial_ids:  # B = 0 would hide A's gradient
            generator = torch.Generator().manual_seed(7)
            for view in one.bank.views(one.residents[t].slot, "master").values():
                view.copy_(0.1 * torch.randn(view.shape, generator=generator))
        slots = {one.residents[t].slot: t for t in trial_ids}
        examples = {slot: examples_of(t, 0) for slot, t in slots.items()}
        counts = {slot: count_targets(e, 4) for slot, e in examples.items()}
        one.forward_backward(one.batch(examples), counts)
        gradients.append(one.bank.views(one.residents[trial_id].slot, "grad"))
    total = torch.cat([g.flatten() for g in gradients[1].values()]).norm()
    for name, ours in gradients[0].items():
        error = (ours - gradients[1][name]).norm() / total
        assert error < 1e-5, (name, float(error))


def test_nan_in_one_adapter_leaves_the_others_bit_equal(pack, share):
    clean_engine, clean = pack
    engine, losses = packed(share, 10, poison=4)
    assert engine.alive_K.tolist() == [t != "small" for t in TRIALS]
    for trial_id in TRIALS:
        if trial_id != "small":
            torch.testing.assert_close(losses[trial_id], clean[trial_id], rtol=0, atol=0)
            mine, theirs = engine.state(trial_id), clean_engine.state(trial_id)
            for name, weight in mine.weights.items():
                torch.testing.assert_close(weight, theirs.weights[name], rtol=0, atol=0)
    assert all(torch.isfinite(w).all() for w in engine.state("small").weights.values())


def test_nan_weights_of_one_adapter_do_not_reach_the_others(pack, share):
    _, clean = pack
    engine = engine_of(share, *TRIALS)
    for view in engine.bank.views(engine.residents["text_to_audio"].slot, "master").values():
        view.fill_(float("nan"))
    losses = train(engine, list(TRIALS), range(3))
    assert torch.isnan(losses["text_to_audio"]).any()
    for trial_id in set(TRIALS) - {"text_to_audio"}:
        torch.testing.assert_close(losses[trial_id], clean[trial_id][:3], rtol=0, atol=0)


def test_leaving_and_joining_changes_nothing_for_the_others(pack, share):
    _, clean = pack
    engine = engine_of(share, "plain", "small", "heads", "audio_self")
    first = train(engine, ["plain", "small", "heads", "audio_self"], range(4))
    engine.remove("small")
    engine.add("text_to_audio", TRIALS["text_to_audio"])
    assert engine.residents["text_to_audio"].slot == 1
    second = train(engine, ["plain", "heads", "audio_self"], range(4, 6))
    for trial_id in ("plain", "heads", "audio_self"):
        both = torch.cat([first[trial_id], second[trial_id]])
        torch.testing.assert_close(both, clean[trial_id][:6], rtol=1e-3, atol=1e-3)
    joined = train(engine, ["text_to_audio"], range(2))["text_to_audio"]
    torch.testing.assert_close(joined, clean["text_to_audio"][:2], rtol=1e-4, atol=1e-4)


def test_resumed_equals_uninterrupted(pack, share):
    _, clean = pack
    first = engine_of(share, *TRIALS)
    train(first, list(TRIALS), range(5))
    second = engine_of(share)
    for trial_id, config in TRIALS.items():
        second.add(trial_id, config, first.state(trial_id))
    losses = train(second, list(TRIALS), range(5, 10))
    for trial_id in TRIALS:
        torch.testing.assert_close(losses[trial_id], clean[trial_id][5:], rtol=0, atol=0)


def test_micro_batches_add_up_to_one_large_batch():
    config = trial(seed=1)
    examples = [
        example("speak", 1, 5, 4),
        example("transcribe", 2, 11, 9),
        example("speak", 3, 8, 2),
    ]
    counts = {0: count_targets(examples, 4)}
    gradients = []
    for parts in ([examples], split_micro_batches(examples, token_budget=90)):
        engine = Engine(tiny_base(), PackLimits.of([config], num_slots=1))
        engine.add("a", config)
        for part in parts:
            engine.forward_backward(collate({0: part}), counts)
        gradients.append(engine.bank.lora.grad.clone())
    assert len(split_micro_batches(examples, token_budget=90)) == 2
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_rows_that_only_pad_change_nothing():
    """Alone an adapter has no padding, in a pack only up to the longest; a multiple adds some to all."""
    sums, gradients = [], []
    for multiple in (1, 32):
        engine = Engine(tiny_base(), LIMITS)
        for trial_id, config in TRIALS.items():
            engine.add(trial_id, config)
        examples = {engine.residents[t].slot: examples_of(t, 0) for t in TRIALS}
        counts = {slot: count_targets(own, 4) for slot, own in examples.items()}
        batch = collate(examples, engine.modes(), multiple)
        widths = [batch.text_ids_KT, batch.audio_codes_KAC, batch.text_rows_KM, batch.audio_rows_KM]
        assert all(tensor.shape[1] % multiple == 0 for tensor in widths)
        sums.append(torch.cat([t.flatten() for t in engine.forward_backward(batch, counts)]))
        buffers = [storage.grad.flatten() for storage in engine.bank.storages()]
        gradients.append(torch.cat(buffers))
    assert gradients[0].any()
    for plain, padded in (sums, gradients):
        torch.testing.assert_close(plain, padded, rtol=1e-5, atol=1e-6)


def test_a_cpu_sees_few_shapes_of_bfloat16():
    config = trial(seed=1)
    widths = set()
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine(tiny_base(dtype=dtype), PackLimits.of([config], num_slots=1))
        for num_frames in range(3, 9):
            batch = engine.batch({0: [example("clone", 1, num_frames=num_frames)]})
            widths.add((dtype, batch.audio_codes_KAC.shape[1]))
    assert [dtype for dtype, _ in widths].count(torch.float32) == 6
    assert [width for dtype, width in widths if dtype == torch.bfloat16] == [32]


def test_an_adapter_without_targets_of_a_modality_learns_from_the_other():
    config = trial(targets=("attention",))
    engine = Engine(tiny_base(), PackLimits.of([config], num_slots=1))
    engine.add("a", config)
    examples = [example("transcribe", 1)]
    text_K, audio_KC = engine.forward_backward(
        collate({0: examples}), {0: count_targets(examples, 4)}
    )
    assert float(audio_KC.abs().sum()) == 0.0
    assert float(text_K) > 0.0
    assert float(engine.bank.lora.grad.norm()) > 0.0
    assert bool(torch.isfinite(engine.bank.lora.grad).all())


def test_a_checkpoint_goes_on_where_adapters_are_laid_out_otherwise():
    """Written where each multiplies alone, read where ranks share a layout, and back."""
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


RUNS = {  # what is asked of the pack → positions that share a matmul
    "everyone": ("attention", (0, 1, 2, 3), [slice(0, 4)]),  # though the third does not target it
    "targets at both ends": ("audio_mlp", (0, 1, 2, 3), [slice(0, 2)]),
    "a slot that rests": ("attention", (0, 2, 3), [0, 2]),
    "nobody": ("audio_mlp", (2, 3), []),
}


@pytest.mark.parametrize("case", RUNS)
def test_adapters_of_neighbouring_slots_share_a_matmul_whatever_they_are(case):
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


def test_ranks_of_one_class_sit_side_by_side():
    """Zeros that the optimizer steps over are few; classes of 64 end at 16."""
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


CLASSES = {  # low and high in turn, some of which target only what stands between
    "l0": trial(seed=1, rank=8),
    "h0": trial(seed=2, rank=64, targets=("attention", "text_mlp")),
    "l1": trial(seed=3, rank=4, alpha=8.0, targets=("text_mlp", "audio_mlp", "text_head")),
    "h1": trial(seed=4, rank=20, dropout=0.2),
    "l2": trial(seed=5, rank=8, targets=("audio_mlp",)),
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_in_any_order_give_the_gradients_of_each_alone(name):
    limits = PackLimits.of(list(CLASSES.values()), num_slots=len(CLASSES))
    found = []
    for names in (list(CLASSES), [name]):
        engine = Engine(tiny_base(), limits, share_matmuls=len(names) > 1)
        for slot, own in enumerate(
            names
        ):  # each in the slot that is free, as when trials come and go
            for other in range(len(names)):
                if other != slot and len(names) > 1:
                    engine.residents[f"taken {other}"] = Resident("", other, CLASSES[own], {})
            assert engine.add(own, CLASSES[own]).slot == slot
            for taken in [r for r in engine.residents if r.startswith("taken")]:
                del engine.residents[taken]
            generator = torch.Generator().manual_seed(7)
            for view in engine.bank.views(slot, "master").values():
                view.copy_(0.1 * torch.randn(view.shape, generator=generator))
        examples = {n: [example("clone", list(CLASSES).index(o), 6)] for n, o in enumerate(names)}
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
def test_classes_of_ranks_suit_a_gpu(highest, expected):
    limits = PackLimits.of([trial(rank=highest, targets=("text_head",))], num_slots=2)
    engine = Engine(tiny_base(num_layers=1), limits, share_matmuls=True)
    assert engine.bank.layout_rank(8) == expected
    assert engine.bank.layout_rank(highest) == highest


def test_what_an_adapter_lacks_stays_zero_where_matmuls_are_shared():
    """Ranks and modules that others have: no weight, no moment, no gradient."""
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
