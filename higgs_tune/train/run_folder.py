"""The folder of a training run: settings, metrics, checkpoints. All files appear whole.

config.json      the settings that the run began with
metrics.jsonl    a line per validation; the first is the untouched base
samples.jsonl    texts transcribed at validations
adapter/         the newest checkpoint, in PEFT's format
best_adapter/    the one with the lowest text loss whose audio loss is within the tolerance
checkpoints/     the newest few, if asked for
tensorboard/     the metrics for TensorBoard
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from higgs_tune import files, metrics
from higgs_tune.config import BaseSettings, DataSettings, RunSettings, TrialConfig
from higgs_tune.config_file import validate
from higgs_tune.errors import ConfigError
from higgs_tune.files import (
    RESUME_FILES,
    former,
    read_json_lines,
    replace_folder,
    write_json,
    write_json_lines,
)
from higgs_tune.train.checkpoint import load_interval, read_step
from higgs_tune.train.samples import Sample

logger = logging.getLogger(__name__)

METRICS, SAMPLES, SETTINGS = "metrics.jsonl", "samples.jsonl", "config.json"
BEST_NOTE = "best.json"  # in best_adapter/: its step
ADAPTER, BEST, KEPT, BOARD = "adapter", "best_adapter", "checkpoints", "tensorboard"
_MAY_CHANGE = {("base", "device"), ("data", "path")}
Line = dict[str, Any]


@dataclass(frozen=True)
class Started:
    """What a run began with; a resume must have the same, except for what `_check_same` allows."""

    base: BaseSettings
    data: DataSettings
    trial: TrialConfig
    content_hash: str  # of the dataset
    clips_per_step: int
    num_processes: int
    start_from: str | None = None  # needed until there is a checkpoint

    def record(self) -> Line:
        """Plain data for config.json."""
        sections = {"base": self.base, "data": self.data, "trial": self.trial}
        return {name: section.model_dump(mode="json") for name, section in sections.items()} | {
            "content_hash": self.content_hash,
            "clips_per_step": self.clips_per_step,
            "num_processes": self.num_processes,
        }


def writing(out: Path) -> AbstractContextManager[None]:
    """Turn a failed write into a DataError with the run's folder and what to do next."""
    kept = "A complete checkpoint is kept; free space and go on with --resume."
    return files.writing(out, kept)


def check_new(out: Path) -> None:
    """Refuse a file, or a folder that is not empty."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file, needed a folder. Give another --out.")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out}: not empty. Give another --out, or --resume to go on there.")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock a folder against a second run; the system releases the lock when the process ends.

    Raises:
        ConfigError: a run is training there.
    """
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{out}: a run is training here. Wait for its end, or give another --out."
            ) from None
        except OSError as error:  # such as a network file system's
            logger.warning(
                "%s: this file system cannot lock a folder (%s): nothing keeps a second run out",
                out,
                error.strerror,
            )
        yield
    finally:
        os.close(handle)


def rewind(out: Path, started: Started) -> list[Line]:
    """Roll a run's folder back to its newest checkpoint, or to its start if it has none.

    Returns:
        The lines of its metrics up to there.

    Raises:
        ConfigError: there is no run here, or one with other settings or data.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file, needed a folder. Give another --out.")
    adapter, old = out / ADAPTER, former(out / ADAPTER)
    if not adapter.exists() and old.exists():  # killed between the two renames of a swap
        with writing(out):
            old.rename(adapter)
    if not (out / SETTINGS).exists():
        raise ConfigError(
            f"{out}: no {SETTINGS}, so no run to go on with. Leave out --resume to start."
        )
    _check_same(out / SETTINGS, started, has_checkpoint=adapter.exists())
    # a checkpoint that holds unreported steps was made before the line of its step
    last = -1
    if adapter.exists():
        last = read_step(adapter) - bool(load_interval(adapter).get("sums"))
    with writing(out):
        for path in (out / SAMPLES, out / METRICS):
            if path.exists():
                lines = read_json_lines(path)
                write_json_lines(path, [line for line in lines if line[metrics.STEP] <= last])
    return read_json_lines(out / METRICS)


def _check_same(path: Path, started: Started, *, has_checkpoint: bool) -> None:
    """Refuse to resume with other settings or data.

    May change: the device; the path of the data, whose content is compared; and how a batch is divided over
    processes, unless each draws its own dropout masks. `run.start_from` may be left out once there is a
    checkpoint.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        raw = [saved[section] for section in ("base", "data", "trial")]
        clips_then, processes_then = saved["clips_per_step"], saved["num_processes"]
        hash_then, start_then = saved["content_hash"], saved["run"].get("start_from")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: the run's settings cannot be read: {error!r}. Start again with another --out."
        ) from None
    pairs = (
        ("base", validate(BaseSettings, raw[0], f"{path}, base"), started.base),
        ("data", validate(DataSettings, raw[1], f"{path}, data"), started.data),
        ("trial", validate(TrialConfig, raw[2], f"{path}, trial"), started.trial),
    )
    differing = [
        f"{section}.{name} was {before!r}, now {getattr(now, name)!r}"
        for section, then, now in pairs
        for name, before in then
        if before != getattr(now, name) and (section, name) not in _MAY_CHANGE
    ]
    may_lack = has_checkpoint and started.start_from is None
    if start_then != started.start_from and not may_lack:
        differing.append(f"run.start_from was {start_then!r}, now {started.start_from!r}")
    if not differing and clips_then != started.clips_per_step:
        differing = [
            f"processes × run.gradient_accumulation_steps × trial.batch_clips was {clips_then}, "
            f"now {started.clips_per_step}"
        ]
    if differing:
        weights = f", from its weights with --start-from {path.parent / ADAPTER}"
        raise ConfigError(
            f"{path.parent}: --resume with other settings: {'; '.join(differing)}. Give the settings "
            f"of the first start, or another --out to start anew{weights if has_checkpoint else ''}."
        )
    if hash_then != started.content_hash:
        raise ConfigError(
            f"{path.parent}: --resume with other data: {started.data.path} has the content hash "
            f"{started.content_hash[:12]}, the run began with {hash_then[:12]}. Put that data back, "
            "or give another --out to start anew."
        )
    if started.trial.dropout and processes_then != started.num_processes:
        raise ConfigError(
            f"{path.parent}: --resume in {started.num_processes} process(es), the run began in "
            f"{processes_then}: with trial.dropout each draws its own masks. Start "
            f"{processes_then}, or give another --out to start anew."
        )


def check_base(out: Path, lines: Sequence[Line], base_metrics: Mapping[str, float]) -> None:
    """Refuse to resume with a base whose losses differ from those in the run's first line."""
    found = metrics.base_difference(lines[0], base_metrics) if lines else None
    if found is not None:
        raise ConfigError(
            f"{out}: --resume on another base: {found}. Put the weights of the first start back, or "
            "give another --out to start anew."
        )


def keep(out: Path, lines: Sequence[Line], run: RunSettings) -> None:
    """Copy the newest checkpoint to best_adapter/ if it is the best, and to checkpoints/ if asked for.

    Of those in checkpoints/, only the newest `run.keep_checkpoints` stay.
    """
    step = lines[-1][metrics.STEP]
    if best_step(lines, run.audio_tolerance) == step:
        _copy_best(out, out / ADAPTER, step)
    if run.keep_checkpoints:
        replace_folder(out / KEPT / f"step-{step:06d}", lambda fresh: _copy(out / ADAPTER, fresh))
        kept = sorted((out / KEPT).glob("step-*"), key=lambda f: int(f.name.removeprefix("step-")))
        for folder in kept[: -run.keep_checkpoints]:
            shutil.rmtree(folder)


def repair_best(out: Path, lines: Sequence[Line], run: RunSettings) -> None:
    """Make `best_adapter/` match the lines: another tolerance or checkpoint may have changed the best step.

    If no copy of the best step is kept, the folder is removed until a later step is better.
    """
    note = out / BEST / BEST_NOTE
    step = best_step(lines, run.audio_tolerance) if lines else None
    held = json.loads(note.read_text(encoding="utf-8"))[metrics.STEP] if note.exists() else None
    if step == held:
        return
    with writing(out):
        checkpoint = None if step is None else _checkpoint_of(out, step)
        if checkpoint is not None:
            _copy_best(out, checkpoint, step)
        elif held is not None:
            shutil.rmtree(out / BEST)
            logger.warning(
                "%s: removed, it was of step %d; with run.audio_tolerance %g the best is %s, of which no "
                "checkpoint is kept",
                out / BEST,
                held,
                run.audio_tolerance,
                "none" if step is None else f"step {step}",
            )


def _checkpoint_of(out: Path, step: int) -> Path | None:
    """The checkpoint of this step, if it is the newest one or in checkpoints/."""
    if read_step(out / ADAPTER) == step:
        return out / ADAPTER
    kept = out / KEPT / f"step-{step:06d}"
    return kept if kept.exists() else None


def _copy_best(out: Path, checkpoint: Path, step: int | None) -> None:
    def write(fresh: Path) -> None:
        _copy(checkpoint, fresh, shutil.ignore_patterns(*RESUME_FILES))
        write_json(fresh / BEST_NOTE, {metrics.STEP: step})

    replace_folder(out / BEST, write)


def keep_again(out: Path, lines: Sequence[Line], run: RunSettings) -> None:
    """Repeat `keep` for a finished run, which may have been killed before or during it."""
    if read_step(out / ADAPTER) == lines[-1][metrics.STEP]:  # not one from after an early stop
        with writing(out):
            keep(out, lines, run)


def best_step(lines: Sequence[Line], audio_tolerance: float) -> int | None:
    """The step with the lowest text loss whose audio loss is within the tolerance; the first if equal."""
    limit = (1 + audio_tolerance) * lines[0][metrics.VAL_AUDIO_NLL]
    feasible = [
        line
        for line in lines[1:]
        if line["status"] in metrics.HEALTHY and line[metrics.VAL_AUDIO_NLL] <= limit
    ]
    best = min(feasible, key=lambda line: line[metrics.VAL_TEXT_NLL], default=None)
    return None if best is None else best[metrics.STEP]


def write_samples(out: Path, step: int, samples: Sequence[Sample]) -> None:
    """Append the samples of a step to those of earlier steps."""
    before = [line for line in read_json_lines(out / SAMPLES) if line[metrics.STEP] < step]
    lines = [{metrics.STEP: step, **asdict(sample)} for sample in samples]
    write_json_lines(out / SAMPLES, [*before, *lines])


def last_sampled_step(out: Path) -> int | None:
    """The step of the newest samples."""
    steps = [line[metrics.STEP] for line in read_json_lines(out / SAMPLES)]
    return max(steps, default=None)


def _copy(source: Path, target: Path, ignore: Callable[..., Any] | None = None) -> None:
    shutil.copytree(source, target, ignore=ignore, dirs_exist_ok=True)
