"""Train one configuration: a pack of one, with a checkpoint after every interval."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from higgs_tune.config import BaseSettings, DataSettings, TrialConfig
from higgs_tune.config_file import validate
from higgs_tune.errors import ConfigError, DataError
from higgs_tune.train.checkpoint import read_trial
from higgs_tune.train.engine import PackLimits
from higgs_tune.train.loop import PackLoop

METRICS, ADAPTER, SETTINGS = "metrics.jsonl", "adapter", "config.json"


def train_single(
    base: BaseSettings,
    data: DataSettings,
    trial: TrialConfig,
    out: Path,
    *,
    resume: bool,
    report: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Train a configuration to its full budget.

    `out/adapter` always holds the newest checkpoint in PEFT's format, `out/metrics.jsonl` a line per
    interval; the first line is the untouched base.

    Args:
        out: new or empty folder, or with `resume` one that an earlier run left.
        report: called with each line as it is written.

    Returns:
        The last interval's metrics, with "status" completed or diverged.

    Raises:
        ConfigError: `out` is in use, or `resume` finds nothing there or a run of other settings.
        DataError: the disk is full or `out` cannot be written.
    """
    adapter, lines = out / ADAPTER, out / METRICS
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file, needed a folder. Give another --out.")
    old = _old(adapter)
    if (
        resume and not adapter.exists() and old.exists()
    ):  # stopped between the two renames of a swap
        with _writing(out):
            old.rename(adapter)
    if resume and not adapter.exists():
        raise ConfigError(f"{out}: no {ADAPTER}/ to go on from. Leave out --resume to start.")
    if not resume and out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out}: not empty. Give another --out, or --resume to go on there.")
    if resume:
        _check_same_settings(out, base, data, trial)
    loop = PackLoop.load(base, data, PackLimits.of([trial], num_slots=1))
    account = loop.join("run", trial, adapter if resume else None)
    settings = {
        "base": base.model_dump(mode="json"),
        "data": data.model_dump(mode="json"),
        "trial": trial.model_dump(mode="json"),
        "account": account,
        "preflight": loop.preflight,
    }
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
        _replace(out / SETTINGS, json.dumps(settings, indent=1) + "\n")
    result: dict[str, Any] = {"step": 0, **loop.base_metrics, "status": "running"}
    if not resume:
        with _writing(out):
            _append(lines, result)
        report(result)
    while result["status"] == "running":
        result = loop.advance()["run"]
        with _writing(out):
            if result["status"] != "diverged":
                _save(loop, adapter)
            _append(lines, result)
        report(result)
    return result


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Name the folder and the way on when a write fails; safetensors has an error of its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{out}: cannot be written: {error}. The last complete checkpoint is kept; free space "
            "and go on with --resume."
        ) from error


def _check_same_settings(
    out: Path, base: BaseSettings, data: DataSettings, trial: TrialConfig
) -> None:
    """Refuse to go on with other settings; only the device may change."""
    path = out / SETTINGS
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        raw_base, raw_data = saved["base"], saved["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: the settings of the run to go on with cannot be read: {error!r}. "
            "Start again with another --out."
        ) from None
    pairs = (
        ("base", validate(BaseSettings, raw_base, f"{path}, base"), base),
        ("data", validate(DataSettings, raw_data, f"{path}, data"), data),
        ("trial", read_trial(out / ADAPTER), trial),
    )
    differing = [
        f"{section}.{name} was {before!r}, now {getattr(now, name)!r}"
        for section, then, now in pairs
        for name, before in then
        if before != getattr(now, name) and (section, name) != ("base", "device")
    ]
    if differing:
        raise ConfigError(
            f"{out}: --resume with other settings: {'; '.join(differing)}. Give the settings of the "
            "first start, or another --out to start anew."
        )


def _save(loop: PackLoop, adapter: Path) -> None:
    """Write beside the old checkpoint, then swap, so that one of the two is always whole.

    A run that stops between the two renames leaves the old one aside; the next one puts it back.
    """
    fresh, old = adapter.with_name(f".{adapter.name}.new"), _old(adapter)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir()
    loop.save("run", fresh)
    if adapter.exists():
        adapter.rename(old)
    fresh.rename(adapter)
    shutil.rmtree(old, ignore_errors=True)


def _old(adapter: Path) -> Path:
    return adapter.with_name(f".{adapter.name}.old")


def _append(path: Path, line: dict[str, Any]) -> None:
    """Append a line of JSON, which has no NaN: a figure without a value is null."""
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in line.items()
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain, allow_nan=False) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
