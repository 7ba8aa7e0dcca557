"""The figures of an evaluation as a table for a terminal."""

from collections.abc import Mapping
from typing import Any

from higgs_tune import metrics as m
from higgs_tune.listen.page import LOSSES
from higgs_tune.listen.systems import RECORDING
from higgs_tune.report.listening import SHOWN

_NONE = "–"  # the system has no such figure


def figures_table(result: Mapping[str, Any]) -> str:
    """A line per figure that any system has, a column per system; then the page's notes.

    A mean over fewer clips than were spoken is followed by their number in brackets.

    Args:
        result: content of evaluate.json.
    """
    columns = [{"name": RECORDING, "losses": {}, "speech": result["recording"]}] * bool(
        result["recording"]
    )
    columns += result["systems"]
    num_spoken = result["systems"][0]["speech"][m.EOS_RATE]["num_clips"]
    counts = (
        f"losses on {result['data']['num_clips']} held-out clips, speech and text on {num_spoken}"
    )
    lines = [["", *(column["name"] for column in columns)]]
    for name, label in LOSSES.items():
        lines.append([label, *(_figure(column["losses"].get(name), 3) for column in columns)])
    for name, label in SHOWN.items():
        cells = [_mean(column["speech"].get(name), num_spoken) for column in columns]
        if any(cell != _NONE for cell in cells):
            lines.append([label, *cells])
    if any(cell.endswith(")") for _, *cells in lines[1:] for cell in cells):
        counts += " or the number in brackets"
    first, *widths = (max(map(len, cells)) for cells in zip(*lines, strict=True))
    table = [
        label.ljust(first)
        + "".join(f"  {cell:>{n}}" for cell, n in zip(cells, widths, strict=True))
        for label, *cells in lines
    ]
    return "\n".join([*table, counts, *result["notes"]])


def _figure(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"


def _mean(found: Mapping[str, Any] | None, num_spoken: int) -> str:
    if found is None:
        return _NONE
    fewer = f" ({found['num_clips']})" if found["num_clips"] < num_spoken else ""
    return _figure(found["mean"], 2) + fewer
