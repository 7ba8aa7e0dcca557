"""A training step never makes the host wait for the device.

On a CPU nothing waits, so these tests use stand-ins: a mode that sees the operations that would wait, and
the meta device, whose tensors have no values to read and for which our code does what it does on a GPU.
Fake tensors on a device that does not exist show whether any tensor was left on the host.
"""

from contextlib import nullcontext

import pytest
import torch
from host_syncs import HostReads
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)

from higgs_tune.data.collate import count_targets
from higgs_tune.model import packed_forward
from higgs_tune.train.engine import Engine
from higgs_tune.train.residents import PackLimits
from tests.models import NUM_CODEBOOKS, example, tiny_base, trial

TRIALS = [
    trial(seed=1),
    trial(seed=2),  # in one run with the first
    trial(
        seed=3,
        rank=2,
        targets=("attention", "text_head", "audio_head", "audio_attention"),
        cross_attention="audio_self",
    ),
    trial(seed=4, targets=("audio_mlp", "audio_attention"), cross_attention="text_to_audio"),
]
NAMES = [f"t{n}" for n in range(len(TRIALS))]


def engine_on(device, dtype=torch.float32, mode=None):
    limits = PackLimits.of(TRIALS, num_slots=len(TRIALS))
    on_host = Engine(tiny_base(dtype=dtype), limits)
    for name, config in zip(NAMES, TRIALS, strict=True):
        on_host.add(name, config)
    if device == "cpu":
        return on_host
    base = tiny_base(dtype=dtype)
    with mode or nullcontext():
        base.model.to(device)
        engine = Engine(base, limits)
        for name, config in zip(NAMES, TRIALS, strict=True):
            engine.add(name, config, on_host.state(name))
    return engine


def step(engine):
    """Two micro-batches and an optimizer step, as in the training loop."""
    tasks = ("transcribe", "speak", "clone")
    micro = [
        {slot: [example(t, 9 * n + slot) for t in tasks] for slot in range(len(TRIALS))}
        for n in range(2)
    ]
    counts = {
        slot: count_targets(micro[0][slot] + micro[1][slot], NUM_CODEBOOKS) for slot in micro[0]
    }
    for number, part in enumerate(micro):
        if number:
            engine.bank.accumulate_gradients(part)
        batch = engine.batch(part)
        engine.forward_backward(batch, counts)
    return engine.optim_step(NAMES)


READS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "mask": lambda x: x[x > 0],
    "write by a mask": lambda x: x.detach().clone().index_put_((x > 0,), torch.zeros(())),
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
}


@pytest.fixture(params=["forward", "backward"])
def inject(request, monkeypatch):
    """Make the step read values in a layer's forward, or in its backward."""
    plain = packed_forward.swiglu

    def put(read):
        def swiglu(x):
            if request.param == "forward":
                read(x)
            else:
                x.register_hook(lambda gradient: [read(gradient), None][1])
            return plain(x)

        monkeypatch.setattr(packed_forward, "swiglu", swiglu)

    return put


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_has_no_operation_that_depends_on_values(dtype):
    engine = engine_on("cpu", dtype)
    with HostReads() as reads:
        norm_K = step(engine)
    assert reads.found == {}
    assert (norm_K > 0).all()


@pytest.mark.parametrize("name", READS)
def test_the_mode_sees_every_listed_read(name, inject):
    engine = engine_on("cpu")
    inject(READS[name])
    with HostReads() as reads:
        step(engine)
    assert reads.found.total() >= len(engine.base.model.model.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_runs_on_the_meta_device(dtype):
    engine = engine_on("meta", dtype)
    spans = engine.bank.pack((0, 1, 2, 3)).runs(
        {"model.layers.0.self_attn.o_proj": engine.base.model.model.layers[0].self_attn.o_proj}
    )
    assert [run.rows for run in spans] == [slice(0, 3)]  # shared, not one by one as on a CPU
    with HostReads() as reads:
        assert step(engine).shape == (len(TRIALS),)
    assert reads.found == {}


@pytest.mark.parametrize("name", ["item", "bool", "mask", "nonzero", "tolist", "cpu"])
def test_reading_a_value_fails_on_the_meta_device(name, inject):
    unseen = {"tolist": lambda x: x.sum().tolist(), "cpu": torch.Tensor.cpu}  # by HostReads
    engine = engine_on("meta")
    inject((READS | unseen)[name])
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        step(engine)


@pytest.fixture
def fakes():
    """A mode that makes tensors without values, on a device for which autograd needs no driver."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_a_step_stays_on_the_host(dtype, fakes):
    engine = engine_on("lazy", dtype, fakes)
    assert engine.bank.lora.compute.dtype == dtype
    with fakes, HostReads() as reads:
        found = step(engine), *engine.evaluate(engine.batch({0: [example("clone", 7)]}))
    assert reads.found == {}  # nor an index on the host, which a fake tensor accepts
    assert {tensor.device.type for tensor in found} == {"lazy"}


@pytest.mark.parametrize("name", ["item", "bool", "mask", "nonzero", "host"])
def test_fake_tensors_fail_on_a_read_or_on_a_tensor_left_on_the_host(name, inject, fakes):
    engine = engine_on("lazy", mode=fakes)
    inject((READS | {"host": lambda x: x + torch.ones(x.shape)})[name])
    kinds = (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorDeviceMismatchError,
    )
    with fakes, pytest.raises(kinds, match=r"aten\.|two devices"):
        step(engine)


def test_the_mode_sees_an_index_on_the_host(inject, fakes):
    engine = engine_on("lazy", mode=fakes)
    inject(lambda x: x[torch.zeros(1, dtype=torch.long)])
    with fakes, HostReads() as reads:
        step(engine)
    assert sum(n for name, n in reads.found.items() if "from the host" in name) > 0
