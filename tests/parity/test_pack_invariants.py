"""Packed training equals training alone, neighbours change nothing, resuming equals not stopping.

Both where each adapter has its own matmuls, as on a CPU, and where adapters share them, as on a GPU.
"""

import pytest
import torch

from higgs_tune.data.collate import collate, count_targets, split_micro_batches
from higgs_tune.train.engine import Engine
from higgs_tune.train.residents import PackLimits
from tests.mixed_pack import LIMITS, TRIALS, engine_of, examples_of, train
from tests.models import example, tiny_base, trial


def alone(trial_id, num_steps):
    engine = Engine(tiny_base(), PackLimits.of([TRIALS[trial_id]], num_slots=1))
    engine.add(trial_id, TRIALS[trial_id])
    return engine, train(engine, [trial_id], range(num_steps))[trial_id]


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
def test_packed_losses_match_single_runs(pack, trial_id):
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


def test_resumed_training_equals_uninterrupted(pack, share):
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


def test_padding_rows_change_nothing():
    """Alone an adapter has no padding, in a pack up to the longest; rounding up to a multiple pads all."""
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


def test_bfloat16_batches_on_a_cpu_are_padded_to_few_shapes():
    config = trial(seed=1)
    widths = set()
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine(tiny_base(dtype=dtype), PackLimits.of([config], num_slots=1))
        for num_frames in range(3, 9):
            batch = engine.batch({0: [example("clone", 1, num_frames=num_frames)]})
            widths.add((dtype, batch.audio_codes_KAC.shape[1]))
    assert [dtype for dtype, _ in widths].count(torch.float32) == 6
    assert [width for dtype, width in widths if dtype == torch.bfloat16] == [32]


def test_an_adapter_without_audio_labels_learns_from_text():
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


@pytest.mark.parametrize("head", ["text_head", "audio_head"])
@pytest.mark.parametrize("task", ["transcribe", "speak"])
def test_an_adapter_of_only_a_head_has_no_backward_through_the_layers(head, task):
    config = trial(targets=(head,))
    engine = Engine(tiny_base(num_layers=4), PackLimits.of([config], num_slots=1))
    engine.add("a", config)
    engine.bank.lora.master.normal_(generator=torch.Generator().manual_seed(0))
    examples = {0: [example(task, 1)]}
    text_K, audio_KC = engine.nll(engine.batch(examples), engine.bank.pack((0,)))
    assert num_linears([text_K.sum() + audio_KC.sum()]) == 1
    engine.forward_backward(engine.batch(examples), {0: count_targets(examples[0], 4)})
    learns = (head == "text_head") == (task == "transcribe")
    assert (float(engine.bank.lora.grad.norm()) > 0) == learns


def num_linears(losses):
    """The number of linears that a backward would differentiate."""
    todo, seen = [loss.grad_fn for loss in losses], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    return sum("AdaptedLinear" in node.name() for node in seen)


@pytest.mark.parametrize("ill", TRIALS)
def test_nan_weights_in_any_slot_do_not_reach_the_others(pack, share, ill):
    _, clean = pack
    engine = engine_of(share, *TRIALS)
    for view in engine.bank.views(engine.residents[ill].slot, "master").values():
        view.fill_(float("nan"))
    losses = train(engine, list(TRIALS), range(3))
    assert torch.isnan(losses[ill]).any()
    assert engine.alive_K.tolist() == [
        resident.trial_id != ill
        for resident in sorted(engine.residents.values(), key=lambda resident: resident.slot)
    ]
    for trial_id in set(TRIALS) - {ill}:
        torch.testing.assert_close(losses[trial_id], clean[trial_id][:3], rtol=0, atol=0)


SAME_MODE = {0: [example("clone", 1, 12, 9), example("speak", 3)], 1: [example("clone", 2, 4, 3)]}


def gradients_of(mode, slots, ill=None):
    """Gradients of adapters with the same new modules, the second one padded; those of `ill` are NaN."""
    configs = {
        n: trial(seed=n, cross_attention=mode, targets=("attention", "audio_attention"))
        for n in slots
    }
    engine = Engine(tiny_base(), PackLimits.of([*configs.values()], num_slots=len(slots)))
    examples = {}
    for n, config in configs.items():
        slot = engine.add(str(n), config).slot
        examples[slot] = SAME_MODE[n]
        generator = torch.Generator().manual_seed(n)  # o_proj and B of 0 would hide a lot
        for view in engine.bank.views(slot, "master").values():
            view.copy_(0.1 * torch.randn(view.shape, generator=generator))
            if n == ill:
                view.fill_(float("nan"))
    counts = {slot: count_targets(own, 4) for slot, own in examples.items()}
    engine.forward_backward(engine.batch(examples), counts)
    return {n: engine.bank.views(engine.residents[str(n)].slot, "grad") for n in slots}


@pytest.mark.parametrize("mode", ["audio_self", "text_to_audio"])
def test_adapters_with_the_same_new_modules_do_not_affect_each_other(mode):
    packed = gradients_of(mode, (0, 1))
    for n in (0, 1):
        alone = gradients_of(mode, (n,))[n]
        beside_nan = gradients_of(mode, (0, 1), ill=1 - n)[n]
        for name, gradient in alone.items():
            torch.testing.assert_close(packed[n][name], gradient, rtol=1e-4, atol=1e-5, msg=name)
            assert torch.equal(beside_nan[name], packed[n][name]), name


def test_the_slot_of_a_diverged_trial_can_be_reused(share):
    engine = engine_of(share, "small")
    train(engine, ["small"], range(1), poison=0)
    slot = engine.residents["small"].slot
    assert not engine.alive_K[slot]
    engine.remove("small")
    assert engine.add("plain", TRIALS["plain"]).slot == slot
    before = engine.state("plain").weights
    train(engine, ["plain"], range(1))
    assert engine.alive_K[slot]
    assert any(
        not torch.equal(w, before[name]) for name, w in engine.state("plain").weights.items()
    )


@pytest.mark.parametrize("task, factor", [("transcribe", 3.0), ("speak", 0.5)])
def test_a_loss_weight_scales_the_gradient_of_its_own_loss(task, factor):
    gradients = []
    for weights in ({}, {"text_loss_weight": 3.0, "audio_loss_weight": 0.5}):
        config = trial(**weights)
        engine = Engine(tiny_base(), PackLimits.of([config], num_slots=1))
        engine.add("a", config)
        examples = [example(task, 1)]
        engine.forward_backward(engine.batch({0: examples}), {0: count_targets(examples, 4)})
        gradients.append(engine.bank.lora.grad.clone())
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], factor * gradients[0], rtol=1e-5, atol=1e-7)
