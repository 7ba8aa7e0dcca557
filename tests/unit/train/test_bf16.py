"""A base in bf16: master weights and the gradient sums of a step stay in fp32."""

import contextlib
import threading
from functools import partial

import torch

from higgs_tune.data.collate import collate, count_targets
from higgs_tune.model.losses import nll_sum
from higgs_tune.train.engine import Engine
from higgs_tune.train.gradients import Clips, Gradients
from higgs_tune.train.lanes import Lanes
from higgs_tune.train.residents import PackLimits
from tests.models import NUM_CODEBOOKS, example, tiny_base, trial

CONFIG = trial(rank=3, alpha=7.0)
EXAMPLES = [example(("transcribe", "speak")[n % 2], n, 5 + n % 7, 4 + n % 5) for n in range(32)]


def engine_of(dtype, num_slots=1):
    base = tiny_base(dtype=torch.bfloat16)  # so that the fp32 base has rounded weights, too
    base.model.to(dtype)
    engine = Engine(base, PackLimits.of([CONFIG], num_slots))
    for name in "ab"[:num_slots]:
        resident = engine.add(name, CONFIG)
        generator = torch.Generator().manual_seed(0)
        for view in engine.bank.views(resident.slot, "master").values():
            view.copy_((0.1 * torch.randn(view.shape, generator=generator)).bfloat16())
    engine.bank.refresh_compute()
    return engine


def total(bank, slot=0):
    return torch.cat(
        [part.storage.gradient(part.where).flatten() for part in bank.seats[slot].parts]
    )


def gradients(engine):
    """A step's gradients, with one micro-batch per example."""
    counts = {0: count_targets(EXAMPLES, NUM_CODEBOOKS)}
    for number, one in enumerate(EXAMPLES):
        if number:
            engine.bank.accumulate_gradients([0])
        engine.forward_backward(collate({0: [one]}), counts)
    return total(engine.bank)


def test_gradients_of_many_micro_batches_have_the_direction_of_fp32():
    exact, ours = gradients(engine_of(torch.float32)), gradients(engine_of(torch.bfloat16))
    assert ours.dtype == torch.float32
    # bf16 activations lower the cosine by about 1e-4
    assert torch.cosine_similarity(exact, ours, dim=0) >= 0.999


def test_micro_batches_add_up_in_fp32():
    bank = engine_of(torch.bfloat16).bank
    for _ in range(1000):
        bank.lora.grad.fill_(0.001)
        bank.accumulate_gradients([0])
    added = total(bank)
    torch.testing.assert_close(added, torch.full_like(added, 1.0), rtol=2e-3, atol=0)
    bank.clear_gradients(bank.seats)
    assert not total(bank).any()


def test_compute_weights_are_the_rounded_master_after_each_change():
    engine = engine_of(torch.bfloat16)

    def check():
        assert engine.bank.lora.compute.dtype == torch.bfloat16
        assert torch.equal(engine.bank.lora.compute, engine.bank.lora.master.bfloat16())

    engine.remove("a")
    engine.add("a", CONFIG)
    check()
    before = engine.bank.lora.master.clone()
    gradients(engine)
    engine.forward_backward(collate({0: EXAMPLES}), {0: count_targets(EXAMPLES, NUM_CODEBOOKS)})
    engine.optim_step(["a"])
    assert not torch.equal(before, engine.bank.lora.master)
    check()
    state = engine.state("a")
    engine.remove("a")
    engine.add("a", CONFIG, state)
    check()


def test_lanes_that_create_the_fp32_sum_at_once_share_it(monkeypatch):
    bank = engine_of(torch.bfloat16, num_slots=2).bank
    bank.lora.grad.fill_(1.0)
    both = threading.Barrier(2)
    zeros_like = torch.zeros_like

    def slowly(*args, **kwargs):
        with contextlib.suppress(threading.BrokenBarrierError):  # the other waits for the lock
            both.wait(timeout=2)
        return zeros_like(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros_like", slowly)
    lanes = Lanes(torch.device("cpu"))
    lanes.count = 2
    lanes.run([partial(bank.accumulate_gradients, [slot]) for slot in (0, 1)])
    for slot in (0, 1):
        assert (total(bank, slot) == 1).all()


def test_losses_of_bfloat16_logits_are_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(2, 500, 3, 20, generator=generator)).bfloat16()
    labels = torch.randint(20, (2, 500, 3), generator=generator)
    exact = -logits.double().log_softmax(-1).gather(-1, labels[..., None])[..., 0].sum(1)
    audio_KC = nll_sum(logits, labels)
    text_K = nll_sum(logits[:, :, 0], labels[:, :, 0])
    assert audio_KC.dtype == text_K.dtype == torch.float32
    torch.testing.assert_close(audio_KC.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(text_K.double(), exact[:, 0], rtol=1e-5, atol=0)


def test_losses_of_micro_batches_add_up_to_those_of_one_batch():
    counts = {0: count_targets(EXAMPLES, NUM_CODEBOOKS)}
    sums = []
    for at_once in (1, len(EXAMPLES)):
        clips = {0: Clips(EXAMPLES, at_once, token_budget=4096)}
        sums.append(Gradients(engine_of(torch.float32)).add(clips, counts)[0])
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-4, atol=1e-3)
    engine = engine_of(torch.bfloat16)
    Gradients(engine).add({0: Clips(EXAMPLES, 1, token_budget=4096)}, counts)
    assert engine.bank.lora.grad_sum is not None, "bf16 gradients are added in fp32"
