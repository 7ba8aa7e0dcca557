"""A pack on any device computes what a CPU computes in float32, one adapter at a time.

On a machine with a GPU, run: make test ARGS="-m gpu". Every test that can also runs on a CPU, by a GPU's
rules for packs, so that it is tried even where there is no GPU.
"""

import logging

import pytest
import torch
from host_syncs import count_host_syncs

from higgs_tune.config import ALL_LINEAR
from higgs_tune.data.collate import count_targets
from higgs_tune.device import resolve_device
from higgs_tune.model.audio_attention import with_cross_attention
from higgs_tune.model.compiled import CompiledForward
from higgs_tune.train.engine import Engine
from higgs_tune.train.residents import PackLimits
from tests import packs
from tests.mixed_pack import TRIALS, engine_of, examples_of, train
from tests.models import make_dataset, tiny_base, trial
from tests.parity.test_generation import prompts

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
ROUNDING = {"rtol": 2e-3, "atol": 2e-3}  # of float32, grown by ten steps of Adam


@pytest.fixture(scope="module", params=["cpu", GPU])
def device(request):
    return resolve_device(request.param, "device")


def base_on(device, dtype=torch.float32, **shape):
    base = tiny_base(dtype=dtype, **shape)
    base.model.to(device)
    return base


def mixed_weights(trial_id, dtype):
    engine = Engine(tiny_base(), PackLimits.of([TRIALS[trial_id]], num_slots=1))
    engine.add(trial_id, TRIALS[trial_id])
    state = engine.state(trial_id)
    generator = torch.Generator().manual_seed(7)
    for weight in state.weights.values():
        weight.copy_((0.1 * torch.randn(weight.shape, generator=generator)).to(dtype))
    return state


def gradients(engine, trial_ids):
    """Trial → the gradients of one micro-batch, on the host."""
    slots = {engine.residents[t].slot: t for t in trial_ids}
    examples = {slot: examples_of(t, 0) for slot, t in slots.items()}
    counts = {slot: count_targets(own, 4) for slot, own in examples.items()}
    engine.forward_backward(engine.batch(examples), counts)
    return {
        t: {name: g.cpu() for name, g in engine.bank.views(slot, "grad").items()}
        for slot, t in slots.items()
    }


DTYPES = pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)]
)


def check_gradients(device, dtype, tolerance, compiled=False):
    """Compare adapters of all kinds that share matmuls, with weights that give every module an effect."""
    pack = engine_of(True, base=base_on(device, dtype))
    for trial_id, config in TRIALS.items():
        pack.add(trial_id, config, mixed_weights(trial_id, dtype))
    if compiled:
        pack.nll = CompiledForward(pack.base.model)
    ours = gradients(pack, list(TRIALS))
    for trial_id, config in TRIALS.items():
        base = tiny_base(dtype=dtype)
        base.model.float()
        alone = Engine(base, PackLimits.of([config], num_slots=1))
        alone.add(trial_id, config, mixed_weights(trial_id, dtype))
        theirs = gradients(alone, [trial_id])[trial_id]
        total = torch.cat([g.flatten() for g in theirs.values()]).norm()
        assert total > 0
        for name, gradient in theirs.items():
            error = float((ours[trial_id][name] - gradient).norm() / total)
            assert error < tolerance, (trial_id, name, error)


@DTYPES
def test_pack_gradients_match_each_adapter_alone_on_a_cpu(device, dtype, tolerance):
    check_gradients(device, dtype, tolerance)


@pytest.mark.gpu  # on a CPU this takes minutes; test_compiled.py covers it
@DTYPES
def test_compiled_pack_gradients_match_each_adapter_alone_on_a_cpu(dtype, tolerance):
    check_gradients(resolve_device("cuda", "device"), dtype, tolerance, compiled=True)


@pytest.fixture(scope="module")
def reference():
    """The losses of each trial alone on a CPU."""
    losses = {}
    for trial_id, config in TRIALS.items():
        engine = Engine(tiny_base(), PackLimits.of([config], num_slots=1))
        engine.add(trial_id, config)
        losses |= train(engine, [trial_id], range(10))
    return losses


def fresh_pack(device, dtype=torch.float32):
    return engine_of(True, *TRIALS, base=base_on(device, dtype))


def test_pack_losses_of_ten_steps_match_each_trial_alone_on_a_cpu(device, reference):
    losses = train(fresh_pack(device), list(TRIALS), range(10))
    for trial_id, expected in reference.items():
        torch.testing.assert_close(losses[trial_id].cpu(), expected, **ROUNDING)


@pytest.mark.parametrize("back", [False, True])
def test_training_continues_on_another_device(device, reference, back):
    places = (device, torch.device("cpu")) if back else (torch.device("cpu"), device)
    first = fresh_pack(places[0])
    train(first, list(TRIALS), range(5))
    second = engine_of(True, base=base_on(places[1]))
    for trial_id, config in TRIALS.items():
        second.add(trial_id, config, first.state(trial_id))
    losses = train(second, list(TRIALS), range(5, 10))
    for trial_id, expected in reference.items():
        torch.testing.assert_close(losses[trial_id].cpu(), expected[5:], **ROUNDING)


def test_a_diverging_trial_does_not_affect_its_neighbours(device, reference):
    engine = fresh_pack(device)
    losses = train(engine, list(TRIALS), range(8), poison=4)
    assert engine.alive_K.tolist() == [trial_id != "small" for trial_id in TRIALS]
    for trial_id in TRIALS.keys() - {"small"}:
        torch.testing.assert_close(losses[trial_id].cpu(), reference[trial_id][:8], **ROUNDING)
    assert all(weight.isfinite().all() for weight in engine.state("small").weights.values())


def test_bfloat16_compute_weights_stay_the_rounded_master_weights(device):
    engine = fresh_pack(device, torch.bfloat16)
    train(engine, list(TRIALS), range(3))
    for storage in engine.bank.storages():
        assert storage.compute.dtype == torch.bfloat16 and storage.master.dtype == torch.float32
        assert torch.equal(storage.compute, storage.master.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_does_not_make_the_host_wait(device, dtype):
    engine = fresh_pack(device, dtype)
    train(engine, list(TRIALS), range(2))  # one-time setup may wait
    examples = {engine.residents[t].slot: examples_of(t, 2) for t in TRIALS}
    counts = {slot: count_targets(own, 4) for slot, own in examples.items()}

    def step():
        engine.forward_backward(engine.batch(examples), counts)
        engine.optim_step(list(TRIALS))

    assert count_host_syncs(step, device) == 0


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


def loop_on(device, dataset, names, trials=packs.TRIALS, **shape):
    return packs.loop_of(
        dataset, names, like_gpu=True, base=base_on(device, **shape), trials=trials
    )


def test_a_pack_with_dropout_reports_what_each_trial_reports_alone(device, dataset):
    pack = loop_on(device, dataset, packs.TRIALS)
    results = [pack.advance() for _ in range(2)]
    for name in packs.TRIALS:
        alone = loop_on(device, dataset, [name])
        clean = [alone.advance() for _ in range(2)]
        packs.same(results, (clean, None), [name], rel=2e-3, abs=2e-3)


def test_the_bases_metrics_match_those_on_a_cpu(device, dataset):
    ours, theirs = (loop_on(where, dataset, []).base_metrics for where in (device, "cpu"))
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("mode", ["off", "audio_self", "text_to_audio"])
def test_generated_speech_equals_that_on_a_cpu(device, mode):
    made = []
    for where in (device, torch.device("cpu")):
        model = with_cross_attention(tiny_base().model, mode, seed=1).to(where)
        prompt = {name: value.to(where) for name, value in prompts([4, 11]).items()}
        made.append(model.generate(**prompt, do_sample=False, max_new_tokens=14).cpu())
    assert torch.equal(*made)


@pytest.mark.gpu
def test_running_out_of_gpu_memory_fails_no_trial(tmp_path, caplog):
    """The same steps with enough memory, and with two thirds of what they took."""
    device = resolve_device("cuda", "device")
    dataset = make_dataset(tmp_path / "long", num_frames=400)
    steps = {"num_steps": 4, "report_every_steps": 4, "batch_clips": 8, "targets": ALL_LINEAR}
    configs = {f"t{n}": trial(seed=n, rank=2 ** (n % 3), **steps) for n in range(6)}
    shape = {"num_layers": 8}
    found, needed = [], 0
    for share in (1.0, 2 / 3):
        loop = loop_on(device, dataset, configs, configs, **shape)
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved(device)
        if share < 1:
            allowed = held + share * needed
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(allowed / total, device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            with caplog.at_level(logging.WARNING):
                found.append(loop.advance())
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        needed = torch.cuda.max_memory_reserved(device) - held
        assert ("memory ran out in a training step" in caplog.text) == (share < 1)
        del loop
    packs.same([found[1]], ([found[0]], None), configs, rel=2e-3, abs=2e-3)
