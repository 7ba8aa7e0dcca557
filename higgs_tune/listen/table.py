"""The figures of an evaluation as a table for a terminal."""

from collections.abc import Mapping
from typing import Any

from higgs_tune import metrics as m
from higgs_tune.listen.page import LOSSES
from higgs_tune.listen.systems import RECORDING
from higgs_tune.report.listening import SHOWN


def figures_table(result: Mapping[str, Any]) -> str:
    """A line for each figure that there is, a column for each system; then the page's notes.

    Args:
        result: what evaluate.json holds.
    """
    columns = [{"name": RECORDING, "losses": {}, "speech": result["recording"]}] * bool(
        result["recording"]
    )
    columns += result["systems"]
    lines = [["", *(column["name"] for column in columns)]]
    for name, label in LOSSES.items():
        lines.append([label, *(_figure(column["losses"].get(name), 3) for column in columns)])
    for name, label in SHOWN.items():
        means = [column["speech"].get(name, {}).get("mean") for column in columns]
        if any(mean is not None for mean in means):
            lines.append([label, *(_figure(mean, 2) for mean in means)])
    first, *widths = (max(map(len, cells)) for cells in zip(*lines, strict=True))
    table = [
        label.ljust(first)
        + "".join(f"  {cell:>{n}}" for cell, n in zip(cells, widths, strict=True))
        for label, *cells in lines
    ]
    num_spoken = result["systems"][0]["speech"][m.EOS_RATE]["num_clips"]
    counts = (
        f"losses on {result['data']['num_clips']} held-out clips, speech and text on {num_spoken}"
    )
    return "\n".join([*table, counts, *result["notes"]])


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
