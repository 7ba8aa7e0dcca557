"""Runs a step of a full-size pack by PyTorch's rules for a GPU, without one (benchmarks/stand_in_gpu.py).

Prints as JSON, for each dtype, on GPU and CPU: the memory model's result, the attention that PyTorch chose,
and the operations that depend on values.
"""

import json
from dataclasses import asdict
from typing import Any, get_args

import torch
from host_syncs import HostReads
from stand_in_gpu import enable_fake_cuda
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import HiggsAudioV2Config

from higgs_tune.config import CrossAttention, TargetPath
from higgs_tune.train import memory
from higgs_tune.train.residents import PackLimits

MODES: tuple[CrossAttention, ...] = ("off", "audio_self", "text_to_audio")
LIMITS = PackLimits(len(MODES), max_rank=16, paths=frozenset(get_args(TargetPath)))
STEP = memory.StepShape(
    num_clips=4, text_rows=120, audio_rows=480, text_targets=60, num_micro_batches=2
)


class Attention(TorchDispatchMode):
    """Records the names of operations that compute attention, whole or in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Record the operation, and run it."""
        name = func.overloadpacket.__name__
        if "attention" in name or name.endswith("softmax"):
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def step_on(device: str, dtype: str) -> dict[str, Any]:
    """The memory of a step of one layer on this device, and what the step did."""
    attention, reads = Attention(), HostReads()
    empty_model, run_step = memory.empty_model, memory.run_step

    def model_there(*args: Any) -> Any:
        with torch.device(device):
            return empty_model(*args)

    def watched(*args: Any) -> None:
        with attention, reads:
            run_step(*args)

    memory.empty_model, memory.run_step = model_there, watched
    try:
        found = memory.run_fake(
            HiggsAudioV2Config(num_hidden_layers=1), dtype, LIMITS, MODES, STEP, dropout=0.1
        )
    finally:
        memory.empty_model, memory.run_step = empty_model, run_step
    return {
        "memory": asdict(found),
        "attention": sorted(attention.names),
        "reads": dict(reads.found),
    }


def main() -> None:
    """Print the results."""
    enable_fake_cuda()
    found = {
        dtype: {device: step_on(device, dtype) for device in ("cpu", "cuda")}
        for dtype in ("bfloat16", "float32")
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
