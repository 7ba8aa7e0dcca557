"""The compiled forward computes what the eager one does, with one graph for all lengths."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from higgs_tune.data.collate import PackBatch, collate, count_targets
from higgs_tune.data.tokens import Encoded
from higgs_tune.model.compiled import CompiledForward
from higgs_tune.train.engine import Engine
from higgs_tune.train.residents import PackLimits
from tests.compilers import needs_compiler
from tests.models import NUM_CODEBOOKS, example, tiny_base, trial

REPOSITORY = Path(__file__).parents[2]
A = trial(
    rank=4,
    targets=("attention", "text_mlp", "text_head", "audio_attention"),
    cross_attention="audio_self",
    dropout=0.3,
)
B = trial(
    rank=8,
    alpha=4.0,
    targets=("attention", "audio_mlp", "audio_head", "audio_attention"),
    cross_attention="text_to_audio",
    seed=3,
)


def _engine(backend: str | None, *, share: bool = False, dtype=torch.float32) -> Engine:
    """Both adapters on a base of one layer, with weights that give every module an effect."""
    base, limits = tiny_base(num_layers=1, dtype=dtype), PackLimits.of([A, B], num_slots=2)
    engine = Engine(base, limits, share_matmuls=share)
    engine.add("a", A)
    engine.add("b", B)
    generator = torch.Generator().manual_seed(0)
    for slot in range(2):
        for view in engine.bank.views(slot, "master").values():
            view.copy_(0.1 * torch.randn(view.shape, generator=generator))
    engine.bank.refresh_compute()
    if backend:
        engine.nll = CompiledForward(engine.base.model, backend)
    return engine


def _batches(engine: Engine) -> list[tuple[PackBatch, dict[int, list[Encoded]]]]:
    """Batches of various lengths and numbers of sequences (at least two), one without any text target."""
    of_step: list[dict[int, list[Encoded]]] = [
        {
            0: [example("transcribe", 0), example("speak", 1, 9)],
            1: [example("clone", 2, 5, 4), example("speak", 9)],
        },
        {
            0: [example("speak", 3, 4), example("speak", 10)],
            1: [example("speak", 4, 12), example("clone", 5)],
        },
        {
            0: [example("clone", 6), example("transcribe", 7)],
            1: [example("transcribe", 8, 11, 9)] * 3,
        },
    ]
    return [(engine.batch(examples), examples) for examples in of_step]


@pytest.mark.slow
@pytest.mark.parametrize(
    "share, dtype, tolerance",
    [
        (False, torch.float32, 1e-5),  # rounding
        (True, torch.float32, 1e-5),
        (True, torch.bfloat16, 2e-2),
    ],
)
def test_compiled_pack_has_the_eager_losses_and_gradients_with_one_graph(share, dtype, tolerance):
    eager, compiled = (_engine(b, share=share, dtype=dtype) for b in (None, "aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    for batch, examples in _batches(eager):
        found = []
        for engine in (eager, compiled):
            counts = {slot: count_targets(own, NUM_CODEBOOKS) for slot, own in examples.items()}
            losses = engine.forward_backward(batch, counts)
            found.append([*losses, *(s.grad.clone() for s in engine.bank.storages())])
        for ours, theirs in zip(found[1], found[0], strict=True):
            assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm())
        assert all(float(theirs.norm()) > 0 for theirs in found[0][1:])
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_evaluation_has_the_eager_losses_with_one_graph():
    eager, compiled = _engine(None), _engine("aot_eager")
    torch._dynamo.reset()
    counters.clear()
    for batch, _ in _batches(eager):
        expected = eager.evaluate(batch, bare=True)
        torch.testing.assert_close(compiled.evaluate(batch, bare=True), expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("share, expected", [(False, [1, 1, 2]), (True, [1, 1, 1])])
def test_adapters_of_one_kind_share_a_graph(share, expected):
    """Rates, alpha, seed and slot are not part of a graph; the rank is, unless matmuls are shared."""
    same = [trial(rank=4, targets=("text_head",), alpha=a, seed=int(a)) for a in (4.0, 8.0)]
    configs = [*same, trial(rank=8, targets=("text_head",))]
    limits = PackLimits.of(configs, num_slots=3)
    engine = Engine(tiny_base(num_layers=1), limits, share_matmuls=share)
    for n, config in enumerate(configs):
        engine.add(str(n), config)
    engine.nll = CompiledForward(engine.base.model, "eager")
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for slot in range(3):
        engine.evaluate(collate({slot: [example("transcribe", 0), example("speak", 1)]}))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == expected


_PROCESS = """
import dataclasses, json, sys
import torch
from torch._dynamo.utils import counters
from higgs_tune.data.collate import collate
from higgs_tune.model.compile_cache import prepare_compile
from higgs_tune.train.engine import Engine
from higgs_tune.train.residents import PackLimits
from tests.models import example, tiny_base, trial

prepare_compile(torch.device("cpu"))
base = tiny_base(num_layers=1)
batch = collate({0: [example("transcribe", 0), example("speak", 1)]})
found = []
for compiled in (False, True):
    one = dataclasses.replace(base, compile=compiled)
    text_K, audio_KC = Engine(one, PackLimits.of([trial()], 1)).evaluate(batch, bare=True)
    found.append([float(text_K.sum()), float(audio_KC.sum())])
hits, misses = (counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss"))
print(json.dumps({"losses": found, "hits": hits, "misses": misses}))
"""


@needs_compiler
@pytest.mark.slow
def test_second_process_takes_graphs_from_the_users_cache(tmp_path):
    names = {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    names["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # more are processes that each import torch
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"} | names
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", _PROCESS],
            env=environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert (found[0]["hits"], found[0]["misses"]) == (0, 1)
    assert (found[1]["hits"], found[1]["misses"]) == (1, 0)
    for eager, compiled in (one["losses"] for one in found):
        assert compiled == pytest.approx(eager, rel=1e-5)
    assert (tmp_path / "higgs-tune" / "inductor").is_dir()
