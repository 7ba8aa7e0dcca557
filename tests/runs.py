"""Reads and compares the files of runs."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from higgs_tune import metrics
from tests.models import trial

TRIAL = trial(seed=1)
CLOCKS = {metrics.TOKENS_PER_S, metrics.TRAIN_TIME_S, metrics.PEAK_MEMORY_MIB}


def figures(result: dict) -> dict:
    """The metrics of a result that depend on the trial, not on the machine."""
    return {name: value for name, value in result.items() if name not in CLOCKS}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_run(out: Path, expected: Path) -> None:
    """Assert equal weights and moments, to the bit, and equal metrics apart from the machine's."""
    for name in ("adapter_model.safetensors", "training_state.safetensors"):
        ours, theirs = load_file(out / "adapter" / name), load_file(expected / "adapter" / name)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    ours, theirs = (
        [figures(line) for line in read_lines(path)]
        for path in (out / "metrics.jsonl", expected / "metrics.jsonl")
    )
    assert ours == theirs
