"""The files of a sweep's trials: config.json, metrics.jsonl, status.json and the adapter."""

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from higgs_tune.files import (
    append_json_line,
    former,
    read_json_lines,
    replace_folder,
    write_json,
    write_json_lines,
)
from higgs_tune.metrics import STATUSES, STEP
from higgs_tune.sweep.seats import CHECKPOINT_INFO
from higgs_tune.sweep.study import TrialRecord

ADAPTER = "adapter"
MOMENTS = "training_state.safetensors"  # the optimizer's: two thirds of a checkpoint
# Numbers that Tune and the worker add to a result beside the metrics.
NOT_METRICS = (
    "done", "pid", "sits_at", "timestamp", "training_iteration", "time_this_iter_s", "time_total_s",
    "time_since_restore", "iterations_since_restore", "should_checkpoint",
)  # fmt: skip


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file, or None when there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def metrics_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics in a Tune result."""
    return {
        name: value
        for name, value in result.items()
        if name not in NOT_METRICS and isinstance(value, int | float)
    }


class TrialFiles:
    """Writes trials/<id>/ below a results folder."""

    def __init__(self, results: Path) -> None:
        self._trials = results / "trials"
        self._started: dict[str, float] = {}  # trial id → monotonic time
        self._num_steps: dict[str, int] = {}  # trial id → step of the last line of its metrics
        self._earlier_s: dict[str, float] = {}  # trial id → seconds in earlier runs of the sweep

    def folder(self, trial_id: str) -> Path:
        """Where a trial's files are."""
        return self._trials / trial_id

    def records(self, prefix: str) -> list[TrialRecord]:
        """The trials whose ids begin with `prefix`, sorted by id."""
        found = (read_json(path) for path in sorted(self._trials.glob(f"{prefix}*/config.json")))
        fields = TrialRecord.__dataclass_fields__
        return [
            TrialRecord.from_dict({name: raw[name] for name in fields})
            for raw in found
            if raw is not None
        ]

    def start(self, record: TrialRecord) -> dict[str, Any]:
        """Prepare the files of a trial that starts, or that continues from its checkpoint.

        Returns:
            The last metrics that are kept: those beyond the checkpoint are dropped.
        """
        folder = self.folder(record.trial_id)
        known = read_json(folder / "config.json") or {"account": {}}
        if record.trial_id not in self._started:
            ended = read_json(folder / "status.json") or {"wall_s": 0.0}
            self._earlier_s[record.trial_id] = ended["wall_s"]
            self._started[record.trial_id] = time.monotonic()
        checkpoint = self.checkpoint_of(record.trial_id)
        steps = 0 if checkpoint is None else checkpoint[1]
        kept = [line for line in read_json_lines(folder / "metrics.jsonl") if line[STEP] <= steps]
        self._write(record, known["account"], kept)
        (folder / "status.json").unlink(missing_ok=True)
        return kept[-1] if kept else {}

    def result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Append a result to the metrics, and put the account that the first one brings into config.json."""
        folder = self.folder(trial_id)
        if result.get("account"):
            known = read_json(folder / "config.json")
            assert known is not None
            write_json(folder / "config.json", {**known, "account": result["account"]})
        metrics = metrics_of(result)
        # A trial that was killed between its last checkpoint and its end reports the last step again.
        if metrics.get(STEP, -1) > self._num_steps.get(trial_id, -1):
            append_json_line(folder / "metrics.jsonl", metrics)
            self._num_steps[trial_id] = metrics[STEP]

    def checkpoint(self, trial_id: str, source: Path) -> None:
        """Make one of Tune's checkpoint folders the trial's adapter, by hard links where possible."""
        target = self.folder(trial_id) / ADAPTER
        replace_folder(
            target,
            lambda draft: shutil.copytree(
                source, draft, copy_function=_link_or_copy, dirs_exist_ok=True
            ),
        )

    def copied(self, record: TrialRecord, donor_id: str) -> None:
        """Give a trial the donor's newest checkpoint and the metrics of those weights."""
        donor = self.folder(donor_id)
        known = read_json(donor / "config.json")
        assert known is not None
        self._write(record, known["account"], read_json_lines(donor / "metrics.jsonl"))
        # last, because it shows `mend_copy` that the copy is complete
        self.checkpoint(record.trial_id, donor / ADAPTER)

    def _write(self, record: TrialRecord, account: Any, lines: list[dict[str, Any]]) -> None:
        folder = self.folder(record.trial_id)
        write_json(folder / "config.json", {**record.to_dict(), "account": account})
        write_json_lines(folder / "metrics.jsonl", lines)
        self._num_steps[record.trial_id] = max((line[STEP] for line in lines), default=-1)

    def mend_copy(self, record: TrialRecord) -> None:
        """Complete a `copied` that the study has recorded but a crash has interrupted.

        Until the copy reports a result of its own, its checkpoint is the donor's and names the donor.
        """
        if not record.config.schedule:
            return
        change, known = record.config.schedule[-1], self.checkpoint_of(record.trial_id)
        if known is not None and known[1] > change.step:
            return
        info = None if known is None else read_json(known[0] / CHECKPOINT_INFO)
        if info is None or info["trial_id"] != change.copied_from:
            self.copied(record, change.copied_from)

    def checkpoint_of(self, trial_id: str) -> tuple[Path, int] | None:
        """The folder and step of a trial's last checkpoint, or None."""
        target = self.folder(trial_id) / ADAPTER
        for folder in (target, former(target)):
            info = read_json(folder / CHECKPOINT_INFO)
            if info is not None:
                return folder, info["step"]
        return None

    def end(self, trial_id: str, status: str, reason: str | None, is_feasible: bool | None) -> None:
        """Record how a trial ended; drops the optimizer's moments unless a resumed sweep continues it."""
        assert status in STATUSES, status
        spent_s = time.monotonic() - self._started.pop(trial_id, time.monotonic())
        content = {
            "status": status,
            "reason": reason,
            "step": self.last(trial_id).get(STEP, 0),
            "feasible": is_feasible,
            "wall_s": round(self._earlier_s.pop(trial_id, 0.0) + spent_s, 3),
        }
        write_json(self.folder(trial_id) / "status.json", content)
        if status not in ("cancelled", "completed"):  # a completed one's checkpoint has none
            (self.folder(trial_id) / ADAPTER / MOMENTS).unlink(missing_ok=True)

    def ended(self, trial_id: str) -> dict[str, Any] | None:
        """A trial's status.json; None if it has not ended or a resumed sweep continues it."""
        status = self.status(trial_id)
        return None if status is None or status["status"] == "cancelled" else status

    def last(self, trial_id: str) -> dict[str, Any]:
        """The metrics that a trial reported last; empty before its first report."""
        lines = read_json_lines(self.folder(trial_id) / "metrics.jsonl")
        return lines[-1] if lines else {}

    def status(self, trial_id: str) -> dict[str, Any] | None:
        """A trial's status.json, or None while it runs or when it never ran."""
        return read_json(self.folder(trial_id) / "status.json")


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
    return target
