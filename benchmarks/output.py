"""What every benchmark records with its figures: the machine, the versions, the settings, a picture."""

import argparse
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from higgs_tune.files import write_bytes, write_json
from higgs_tune.report.ink import STYLE, render

PACKAGES = ("torch", "transformers", "peft", "ray", "optuna")
COLORS = ("#3b82c4", "#d9822b", "#0f8f6a", "#8a5bd1", "#c8453b", "#9aa5b1")


def num_cpus() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_name() -> str:
    """The processor's model name if Linux reports it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    """The installed version, or None, such as for Ray where only steps are measured."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The machine and the versions; `load` is the load average before the benchmark began.

    Warns if that is high.
    """
    load = [round(each, 2) for each in os.getloadavg()]
    if load[0] > num_cpus() / 2:
        print(
            f"warning: this machine is busy with other work (load {load[0]} on {num_cpus()} CPUs): times "
            "and their ratios are unreliable",
            file=sys.stderr,
        )
    device = torch.device(device)
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "cpus": num_cpus(),
        "load": load,
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
    }


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The command line's settings as JSON data, without the results file."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name != "out"
    }


def ratio(above: float | None, below: float | None, digits: int = 2) -> float | None:
    """`above / below`; None if either was not measured."""
    return round(above / below, digits) if above and below else None


def new_figure(columns: int = 1) -> tuple[Figure, list[Any]]:
    """A figure in the report's style, and its axes from left to right."""
    mpl.rcParams.update(STYLE)
    figure = Figure(figsize=(5.6 * columns, 4.1), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def save(out: Path | None, result: Mapping[str, Any], figure: Figure | None = None) -> None:
    """Write the JSON to `out` and the picture beside it under the same name; without `out` do nothing."""
    if out is None:
        return
    write_json(out, result)
    if figure is not None:
        write_bytes(out.with_suffix(".png"), render(figure).png)
