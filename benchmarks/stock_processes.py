"""Several stock processes that train at the same time on one device, each with its own base."""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_step import NUM_BATCHES
from random_base import PRESETS, random_base, random_clips
from sides import stock_step, synchronise

from higgs_tune.device import resolve_device
from higgs_tune.errors import is_out_of_memory
from higgs_tune.model.load import Base

START_PATIENCE_S = 300.0


def base_of(args: argparse.Namespace) -> Base:
    """The preset's random base, on the device."""
    device = resolve_device(args.device, "--device")
    return random_base(PRESETS[args.preset], device, getattr(torch, args.dtype))


def clips_of(base: Base, args: argparse.Namespace, adapter: int, number: int) -> list[Any]:
    """One adapter's examples of a step, as gpu_step.py draws them."""
    return random_clips(base, args.clips, args.tokens, args.text_share, (adapter, number))


def run_stock_process(args: argparse.Namespace) -> None:
    """Run as one of several stock processes: print "ready", wait for a line, train, print the step count."""
    torch.set_num_threads(args.threads)
    try:
        base = base_of(args)
        device = next(base.model.parameters()).device
        batches = [[clips_of(base, args, 0, number)] for number in range(NUM_BATCHES)]
        step = stock_step(base, args.rank)
        for batch in batches:
            step(batch)
        synchronise(device)
        print("ready", flush=True)
        sys.stdin.readline()
        steps, started = 0, time.perf_counter()
        while time.perf_counter() - started < args.seconds:
            step(batches[steps % NUM_BATCHES])
            synchronise(device)
            steps += 1
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(json.dumps({"status": "out_of_memory"}), flush=True)
        return
    seconds = time.perf_counter() - started
    print(json.dumps({"status": "ok", "steps": steps, "seconds": seconds}), flush=True)


def measure_shared(args: argparse.Namespace, command: Sequence[str]) -> dict[str, Any]:
    """Run several stock processes on the device at once; returns figures such as their ms per adapter-step.

    Args:
        command: the command that calls `run_stock_process`, without the options of such a process.
    """
    command = [*command, "--as-process"]
    command += ["--threads", str(max(1, torch.get_num_threads() // args.processes))]
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(args.processes)
    ]
    patience = threading.Timer(
        START_PATIENCE_S + args.seconds, lambda: [process.kill() for process in started]
    )
    patience.start()
    try:
        heard = [_line(process) for process in started]
        # a barrier: by now every process has warmed up, or has said what failed
        if set(heard) == {"ready"}:
            for process in started:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            heard = [_line(process) for process in started]
    finally:
        patience.cancel()
        for process in started:
            process.kill()
            process.communicate()
    found = [json.loads(line) for line in heard if line != "ready"]
    return shared_figures(found, args.processes) | {"mps": has_mps()}


def has_mps() -> bool:
    """Whether a daemon of NVIDIA's Multi-Process Service lets processes use a GPU at the same time."""
    folder = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps")
    return (folder / "control").exists()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    return line or json.dumps({"status": "failed", "exit_code": process.wait()})


def shared_figures(found: Sequence[Mapping[str, Any]], processes: int) -> dict[str, Any]:
    """Figures of processes that trained at the same time, from the steps that each counted."""
    bad = [one for one in found if one["status"] != "ok"]
    if bad:
        return {**bad[0], "processes": processes}
    rate = sum(one["steps"] / one["seconds"] for one in found)
    return {
        "status": "ok",
        "processes": processes,
        "ms_per_adapter": round(1000 / rate, 3),
        "steps": [one["steps"] for one in found],
    }
