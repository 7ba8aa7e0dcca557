"""Export the best configuration: best_config.yaml and best_adapter/."""

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from higgs_tune import metrics as m
from higgs_tune.files import RESUME_FILES, write_text
from higgs_tune.report.choose import Choice
from higgs_tune.report.findings import Findings
from higgs_tune.report.results import (
    BEST_ADAPTER,
    BEST_CONFIG,
    Results,
    adapter_of,
    read_optional_json,
)


def export_best(results: Results, findings: Findings) -> str | None:
    """Write best_config.yaml and best_adapter/; without a best configuration, remove older ones.

    The configuration, seed included, is that of the run whose adapter is exported, so that training it
    again repeats that run.

    Returns:
        The text of best_config.yaml; None if there is no best configuration.
    """
    path = results.directory / BEST_CONFIG
    target = results.directory / BEST_ADAPTER
    choice = findings.choice
    source = None if choice is None else adapter_of(results, choice.adapter_run)
    if source is None and target.exists():
        shutil.rmtree(target)  # left by another configuration
    elif source is not None and source != target:
        _copy_adapter(source, target)
    if choice is None:
        path.unlink(missing_ok=True)
        return None
    content = best_config(results, choice, findings.headline)
    header = (
        f"# {findings.headline}.\n# The best configuration of the sweep {results.sweep.name}. "
        f"{findings.answers[0].figure}.\n"
    )
    text = header + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=96)
    write_text(path, text)
    return text


def best_config(results: Results, choice: Choice, note: str) -> dict[str, Any]:
    """Everything needed to train the configuration again, and what it reached."""
    versions = results.env.get("versions", {})
    val = {name: stat.as_dict() for name in _val_names(choice) if (stat := choice.stat(name))}
    baseline = {name: stat.as_dict() for name in val if (stat := choice.baseline_stat(name))}
    return {
        "higgs_tune": {
            "version": versions.get("higgs-tune"),
            "git_sha": results.env.get("git_sha"),
            "versions": versions,
        },
        "base": results.sweep.base.model_dump(mode="json"),
        "data": results.sweep.data.model_dump(mode="json")
        | {"content_hash": results.base_file.get("content_hash")},
        "trial": choice.adapter_run.config.model_dump(mode="json"),
        # Training again picks its best_adapter/ under the same audio limit as the sweep.
        "run": {"audio_tolerance": results.sweep.objective.audio_tolerance},
        # the resolved peft.LoraConfig of the run's adapter
        "lora_config": read_optional_json(results.directory / BEST_ADAPTER / "adapter_config.json")
        or None,
        "results": {
            "note": note,
            "val": val,
            "base": results.base,
            "baseline": baseline or None,
            "paired_difference_to_baseline": choice.difference and choice.difference.as_dict(),
            "seeds": [run.config.seed for run in choice.runs],
            "runs": [run.id for run in choice.runs],
        },
        "command": f"higgs-tune train --config {BEST_CONFIG}",
    }


def _copy_adapter(source: Path, target: Path) -> None:
    """Copy, removing an older `target` only once the copy is complete.

    A sweep and `report` may do so at the same time: temporary names contain the process id.
    """
    fresh = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        shutil.copytree(source, fresh, ignore=shutil.ignore_patterns(*RESUME_FILES))
        while True:
            try:
                fresh.rename(target)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            with suppress(FileNotFoundError):  # another process has moved it meanwhile
                target.rename(old)
                shutil.rmtree(old)
    finally:
        for leftover in (fresh, old):
            if leftover.exists():
                shutil.rmtree(leftover)


def _val_names(choice: Choice) -> list[str]:
    """The validation metrics, the objective first."""
    reported = [name for name in choice.adapter_run.history[-1] if name.startswith("val/")]
    return sorted(reported, key=lambda name: (name != m.VAL_TEXT_NLL, name))
