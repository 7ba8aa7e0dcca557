"""Read a sweep's files into one object and one table.

The only input is the folder `results/<name>/`. The sweep may still be running, may have been interrupted,
or may have no trials.
"""

import io
import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from higgs_tune import metrics as m
from higgs_tune.config import SweepConfig, TrialConfig
from higgs_tune.config_file import read_yaml, validate
from higgs_tune.errors import ConfigError, SweepError
from higgs_tune.files import read_json_lines, write_bytes

Origin = Literal["baseline", "baseline_fixed", "search", "confirm"]
UNFINISHED = "unfinished"  # no status.json: still running, or its process died
BEST_CONFIG, BEST_ADAPTER = "best_config.yaml", "best_adapter"  # what `export_best` writes
OPEN = (UNFINISHED, "cancelled")  # --resume continues these
Metrics = dict[str, float]


@dataclass(frozen=True)
class Trial:
    """One trial, as read from its files."""

    id: str
    number: int
    name: str
    origin: Origin
    confirms: str | None
    config: TrialConfig
    account: dict[str, Any]
    status: str
    reason: str
    wall_s: float | None
    history: tuple[Metrics, ...]  # one dict per report, sorted by step
    directory: Path

    @property
    def step(self) -> int:
        """Optimizer steps done at the last report; 0 before the first."""
        return int(self.history[-1][m.STEP]) if self.history else 0

    def last(self, metric: str) -> float | None:
        """The metric in the last report; None before the first report or if it is not finite."""
        return self.at(self.step, metric)

    def at(self, step: int, metric: str) -> float | None:
        """The metric as reported at `step`; None if it was not reported or is not finite."""
        for row in self.history:
            if row[m.STEP] == step:
                value = row.get(metric)
                return value if value is not None and math.isfinite(value) else None
        return None

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of every finite report."""
        values = {int(row[m.STEP]): self.at(int(row[m.STEP]), metric) for row in self.history}
        return [(step, value) for step, value in values.items() if value is not None]

    @cached_property
    def full_budget(self) -> bool:
        """Whether the trial ran to its last step and ended with finite losses."""
        return (
            self.status == "completed"
            and self.step == self.config.num_steps
            and self.last(m.VAL_TEXT_NLL) is not None
            and self.last(m.VAL_AUDIO_NLL) is not None
        )


@dataclass(frozen=True)
class Results:
    """A sweep's results folder."""

    directory: Path
    sweep: SweepConfig
    env: dict[str, Any]
    base: Metrics | None  # of the untouched base; None if it was not evaluated
    base_file: dict[str, Any]
    trials: tuple[Trial, ...]  # by number, search trials before confirm runs
    workers: dict[str, dict[str, Any]] = field(default_factory=dict)  # by worker: seconds, slot use

    @cached_property
    def search(self) -> tuple[Trial, ...]:
        """The search's trials, including the two fixed configurations."""
        return tuple(trial for trial in self.trials if trial.origin != "confirm")

    @cached_property
    def confirm(self) -> tuple[Trial, ...]:
        """The confirm stage's trials."""
        return tuple(trial for trial in self.trials if trial.origin == "confirm")

    @property
    def num_val_clips(self) -> int | None:
        """Number of clips the losses are measured on; None if the sweep did not record it."""
        return self.base_file.get("num_val_clips")

    @cached_property
    def baseline(self) -> Trial | None:
        """Trial 0, the configuration set by hand; None if the folder has none."""
        return next((trial for trial in self.search if trial.origin == "baseline"), None)

    @property
    def audio_limit(self) -> float | None:
        """Highest feasible val/audio/nll_per_code; None if the base was not evaluated."""
        if self.base is None:
            return None
        return (1 + self.sweep.objective.audio_tolerance) * self.base[m.VAL_AUDIO_NLL]

    def feasible(self, trial: Trial) -> bool | None:
        """Whether the trial's last audio loss is within the limit; None if either of them is unknown."""
        audio = trial.last(m.VAL_AUDIO_NLL)
        if audio is None or self.audio_limit is None:
            return None
        return audio <= self.audio_limit


def read_results(directory: Path) -> Results:
    """Read a sweep's folder, finished or not.

    Raises:
        HiggsTuneError: the folder is not a sweep's, or one of its files is damaged.
    """
    sweep_file = directory / "sweep.yaml"
    if not sweep_file.is_file():
        raise SweepError(
            f"{directory}: found no sweep.yaml, needed the results folder of a sweep. "
            "Give a folder such as results/quick."
        )
    base_file = read_optional_json(directory / "base.json")
    folders = sorted((directory / "trials").glob("*/config.json"))
    trials = [_read_trial(path.parent) for path in folders]
    return Results(
        directory=directory,
        sweep=validate(SweepConfig, read_yaml(sweep_file), str(sweep_file)),
        env=read_optional_json(directory / "env.json"),
        base=base_file.get("metrics"),
        base_file=base_file,
        trials=tuple(sorted(trials, key=lambda t: (t.origin == "confirm", t.number, t.id))),
        workers=read_optional_json(directory / "workers.json"),
    )


def adapter_of(results: Results, run: Trial) -> Path | None:
    """The folder with a run's adapter: its own or, if that was deleted, what was exported of the same run."""
    own, exported = run.directory / "adapter", results.directory / BEST_ADAPTER
    if own.is_dir():
        return own
    try:
        config = read_yaml(results.directory / BEST_CONFIG).get("trial")
    except ConfigError:  # no such file, or a damaged one
        return None
    is_same = config == run.config.model_dump(mode="json")
    return exported if is_same and exported.is_dir() else None


def _read_trial(folder: Path) -> Trial:
    config = read_optional_json(folder / "config.json")
    status = read_optional_json(folder / "status.json", {"status": UNFINISHED})
    try:
        return Trial(
            id=config["trial_id"],
            number=config["number"],
            name=config["name"],
            origin=config["origin"],
            confirms=config["confirms"],
            config=validate(TrialConfig, config["config"], f"{folder / 'config.json'}, config"),
            account=config["account"] or {},
            status=status["status"],
            reason=status.get("reason") or "",
            wall_s=status.get("wall_s"),
            history=_read_history(folder / "metrics.jsonl"),
            directory=folder,
        )
    except KeyError as error:
        raise SweepError(
            f"{folder}: its config.json, status.json or metrics.jsonl lacks {error}."
        ) from None


def _read_history(path: Path) -> tuple[Metrics, ...]:
    """Reports sorted by step; if a resumed trial reported a step twice, the later report."""
    rows = {row[m.STEP]: row for row in read_json_lines(path)}
    return tuple(rows[step] for step in sorted(rows))


def read_optional_json(path: Path, absent: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in a file; `absent`, or an empty dict, if there is no file.

    Raises:
        SweepError: the file is damaged.
    """
    if not path.exists():
        return absent or {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SweepError(f"{path}: cannot be read: {error}") from None


_SETTINGS = tuple(n for n in TrialConfig.model_fields if n not in ("targets", "schedule"))
_TEXT_COLUMNS = ("id", "name", "origin", "confirms", "status", "reason", "targets", "schedule")


def table(results: Results) -> list[dict[str, Any]]:
    """One flat row per trial: identity, settings, parameter count and last metrics."""
    rows = []
    for trial in results.trials:
        config = trial.config.model_dump(mode="json")
        rows.append(
            {
                "id": trial.id,
                "number": trial.number,
                "name": trial.name,
                "origin": trial.origin,
                "confirms": trial.confirms,
                "status": trial.status,
                "reason": trial.reason,
                "feasible": results.feasible(trial),
                "full_budget": trial.full_budget,
                "wall_s": trial.wall_s,
                "parameters": trial.account.get("parameters"),
                "targets": ",".join(trial.config.targets),
                **{name: config[name] for name in _SETTINGS},
                "schedule": json.dumps(config["schedule"]) if config["schedule"] else None,
                m.STEP: trial.step,
                **(trial.history[-1] if trial.history else {}),
            }
        )
    return rows


def write_table(results: Results, path: Path) -> None:
    """Write `table` as Parquet; without trials, the file has no rows."""
    rows = table(results)
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["id", "status"]
    columns = {name: [row.get(name) for row in rows] for name in names}
    # Arrow would give a column without any value the type null.
    types = {
        name: pa.string() if name in _TEXT_COLUMNS else pa.float64()
        for name, values in columns.items()
        if all(value is None for value in values)
    }
    arrays = {name: pa.array(values, types.get(name)) for name, values in columns.items()}
    sink = io.BytesIO()
    pq.write_table(pa.table(arrays), sink)
    write_bytes(path, sink.getvalue())
