"""The results folder of a sweep: whether it may be used and can be written, and what started it."""

import fcntl
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from higgs_tune.config import SweepConfig
from higgs_tune.config_file import read_yaml, to_yaml, validate
from higgs_tune.errors import ConfigError, SweepError, reason_of
from higgs_tune.files import write_json, write_text
from higgs_tune.sweep.records import read_json

LOCK = ".lock"  # held by the process that runs the sweep; the system frees it when that ends
BASE = "base.json"  # what the first worker measured of base and data
TUNE = "ray"  # Ray Tune's storage; removed once a sweep has ended
# What a sweep that ended before its first result leaves; a new sweep of that name removes it.
FILES = (
    "trials", TUNE, "study.journal", BASE, "env.json", "workers.json", "tune.log",
    "workers.log", "sweep.yaml", "tensorboard",
)  # fmt: skip
_SECRET = re.compile(r"(://)\S*@")  # user and password of tune.storage
PROBE_BYTES = 4 * 1024 * 1024
PACKAGES = ("higgs-tune", "torch", "torchaudio", "transformers", "peft", "ray", "optuna", "pyarrow")
# What a resumed sweep may change: how and how long it runs, never what its trials are. Data may be at
# another path, as on another machine, because its content is compared, and the study in another database, or
# have another password, because it must have the folder's trials.
MAY_CHANGE = (
    "results_dir", "base.device", "data.path", "confirm.", "tune.num_trials", "tune.num_workers",
    "tune.slots_per_worker", "tune.cpus_per_worker", "tune.gpus_per_worker", "tune.max_failures",
    "tune.time_limit_s", "tune.ahead_fraction", "tune.storage",
)  # fmt: skip


@contextmanager
def open_folder(config: SweepConfig, *, resume: bool, command: list[str]) -> Iterator[Path]:
    """The sweep's results folder, checked, writable and locked, with sweep.yaml and env.json in it.

    Raises:
        ConfigError: it holds a sweep and `resume` is false, or another sweep and `resume` is true,
            or there is nothing to resume, or another process runs a sweep there, or it cannot be locked.
        SweepError: it cannot be written, or the disk is full.
    """
    folder = config.results_root.absolute() / config.name
    _check(folder, config, resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise disk_error(folder, error) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder}: a sweep is running here. Wait for its end, or give --name NAME for "
                "another one."
            ) from None
        except OSError as error:  # such as Lustre mounted without flock
            raise ConfigError(
                f"{folder}: this file system cannot lock a file ({error.strerror}), as is needed to keep "
                "a second sweep out. Give --set results_dir=FOLDER with a folder on another disk."
            ) from None
        _check(folder, config, resume)  # another sweep may have ended here since
        try:
            # Tune would overwrite an earlier run's checkpoints, whose files the adapters are links to.
            _clear(folder, (TUNE,) if resume else FILES)
            probe(folder)
            write_text(folder / "sweep.yaml", to_yaml(config))
            _record_environment(folder / "env.json", command)
        except OSError as error:
            raise disk_error(folder, error) from None
        yield folder


def record_slots(folder: Path, config: SweepConfig) -> None:
    """Record the number that `tune.slots_per_worker: auto` has become."""
    write_text(folder / "sweep.yaml", to_yaml(config))
    environment = read_json(folder / "env.json") or {}
    slots = {"slots_per_worker": config.tune.slots_per_worker}
    write_json(folder / "env.json", environment | slots)


def _check(folder: Path, config: SweepConfig, resume: bool) -> None:
    settings = folder / "sweep.yaml"
    if settings.exists():
        if not resume:
            if not _has_begun(folder):
                return
            raise ConfigError(
                f"{folder} already holds a sweep. Give --resume to go on with it, "
                "or --name NAME for a new one."
            )
        _refuse_other_sweep(
            folder, validate(SweepConfig, read_yaml(settings), str(settings)), config
        )
    elif resume:
        raise ConfigError(
            f"{folder} holds no sweep to resume. Leave --resume out, give the sweep's --name, or, if it is "
            "in another folder, --set results_dir=FOLDER."
        )
    elif folder.exists() and (
        not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())
    ):
        raise ConfigError(
            f"{folder} exists and is not the folder of a sweep. Give --name NAME for a new one."
        )


def is_free(folder: Path) -> bool:
    """Whether a new sweep may use this folder: there is none, or only what a sweep without a result left."""
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    if (folder / "sweep.yaml").exists():
        if _has_begun(folder):
            return False
    # a start that failed on a full disk leaves a lone lock
    elif [path.name for path in folder.iterdir()] != [LOCK]:
        return False
    if not (folder / LOCK).exists():
        return True
    with (folder / LOCK).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _has_begun(folder: Path) -> bool:
    """Whether a sweep left a result or a study in a database, which a new one must not touch."""
    stored = read_yaml(folder / "sweep.yaml")
    if (stored.get("tune") or {}).get("storage") is not None:
        return True
    return any(path.stat().st_size for path in folder.glob("trials/*/metrics.jsonl"))


def _clear(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def disk_error(folder: Path, error: OSError) -> SweepError:
    """The error for a results folder that cannot be written."""
    return SweepError(
        f"{folder}: cannot be written ({error.strerror or reason_of(error)}). What was recorded is kept. "
        "Free space, fix the permissions or choose another results_dir; then start again, with "
        "--resume if the sweep had begun."
    )


def disk_fault(folder: Path) -> SweepError | None:
    """The error if the results folder cannot be written, else None."""
    try:
        probe(folder)
    except OSError as error:
        return disk_error(folder, error)
    return None


def differing(left: Mapping[str, Any], right: Mapping[str, Any]) -> Iterator[str]:
    """Names of the settings that differ between two dumped configurations."""
    for name in sorted({*left, *right}):
        if left.get(name) == right.get(name):
            continue
        if isinstance(left.get(name), Mapping) and isinstance(right.get(name), Mapping):
            yield from (f"{name}.{inner}" for inner in differing(left[name], right[name]))
        else:
            yield name


def _refuse_other_sweep(folder: Path, stored: SweepConfig, config: SweepConfig) -> None:
    changed = [
        name
        for name in differing(stored.model_dump(mode="json"), config.model_dump(mode="json"))
        if not name.startswith(MAY_CHANGE)
    ]
    if changed:
        raise ConfigError(
            f"{folder} holds another sweep; these settings differ: {', '.join(changed)}. "
            "Set them as in its sweep.yaml, or give --name NAME for a new sweep."
        )


def probe(folder: Path) -> None:
    """Write and remove a file of a few MiB; OSError if that fails."""
    path = folder / ".probe"
    try:
        with path.open("wb") as file:
            file.write(b"\0" * PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)


def _record_environment(path: Path, command: list[str]) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    content = {
        "versions": {name: _version(name) for name in PACKAGES},
        "git_sha": git_sha(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "gpus": _gpus(),
        "command": [_SECRET.sub(r"\1…@", word) for word in command],
        "started_at": now,
    }
    former = read_json(path)
    if former is not None:
        content["started_at"] = former["started_at"]
        content["resumed_at"] = [*former.get("resumed_at", []), now]
    write_json(path, content)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return None


def git_sha(package: Path) -> str | None:
    """The commit of a package's checkout; None if git does not track the package.

    With `-dirty` if the checkout was changed, with `-unchecked` if git cannot tell. An installed package
    may be inside its user's own repository, which does not track it.
    """
    git = ["git", "-C", str(package)]
    if _output([*git, "ls-files", "--error-unmatch", "__init__.py"]) is None:
        return None
    found = _output([*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])
    if found is not None:
        return found
    commit = _output([*git, "rev-parse", "HEAD"])  # cluster.yaml does not copy git's objects
    return commit and f"{commit}-unchecked"


def _gpus() -> list[str]:
    listed = _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    return listed.splitlines() if listed else []


def _output(command: list[str]) -> str | None:
    """Standard output of a command, or None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, no driver: unknown
        return None
    return done.stdout.strip()
