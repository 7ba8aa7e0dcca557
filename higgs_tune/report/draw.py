"""Draw curves and bars: losses by step, audio gain, importance of the settings."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from higgs_tune.report.findings import GAIN_CLEAR
from higgs_tune.report.importance import ImportanceInfo
from higgs_tune.report.ink import (
    BEST,
    INK,
    OTHER,
    POOR,
    ROLE_COLORS,
    ROLE_NAMES,
    STYLE,
    Picture,
    log_ticks,
    marker,
    render,
)
from higgs_tune.report.plots import CurvesInfo, GainBar, Line
from higgs_tune.report.wording import setting_name, signed

_ON_THE_RIGHT: Any = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "center"}
_CHANCE_MARK: Any = {"ls": "none", "marker": "|", "color": INK, "ms": 19, "mew": 2.2}


def draw_curves(panels: Sequence[CurvesInfo]) -> Picture:
    """One panel per metric, side by side, with every trial's curve by step."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 4.1), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
            _draw_panel(axes, panel)
        roles = {line.role for panel in panels for line in panel.lines}
        handles = [
            Line2D([], [], color=color, lw=2.4 if name != "other" else 1.2, label=ROLE_NAMES[name])
            for name, color in ROLE_COLORS.items()
            if name in roles
        ]
        ends = {line.status for panel in panels for line in panel.lines}
        if "diverged" in ends:
            handles.append(marker("X", POOR, "diverged after this"))
        if "pruned" in ends:
            handles.append(marker("o", OTHER, "stopped early", size=4))
        if any(_ends_outside(line, _edges(panel)) for panel in panels for line in panel.lines):
            handles.append(marker("^", OTHER, "leaves the scale", size=6))
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        return render(figure)


def _draw_panel(axes: Axes, panel: CurvesInfo) -> None:
    if _is_log(panel):
        _log_axis(axes, *panel.scale)
    edges = _edges(panel)
    axes.set_ylim(edges)  # by default, matplotlib makes room for every curve
    order = ("other", "baseline_fixed", "baseline", "best")  # the last is drawn on top
    for line in sorted(panel.lines, key=lambda line: order.index(line.role)):
        _draw_line(axes, line, edges)
    if panel.limit is not None:
        axes.axhline(panel.limit, color=POOR, lw=1.1, ls=(0, (4, 3)))
        axes.annotate(
            "limit",
            (1, panel.limit),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            color=POOR,
            fontsize=8.5,
        )
    unit = f"{panel.unit} (log scale)" if _is_log(panel) else panel.unit
    axes.set(title=panel.title, xlabel="optimizer step", ylabel=unit)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _ends_outside(line: Line, edges: tuple[float, float]) -> bool:
    return not edges[0] <= line.points[-1][1] <= edges[1]


def _edges(panel: CurvesInfo) -> tuple[float, float]:
    """Axis limits: the scale, extended to the audio limit, plus a margin."""
    low, high = panel.scale
    if panel.limit is not None:
        high = max(high, panel.limit)
    if _is_log(panel):
        pad = (high / low) ** 0.05
        return low / pad, high * pad
    pad = 0.05 * (high - low) or 0.1
    return low - pad, high + pad


def _is_log(panel: CurvesInfo) -> bool:
    """Whether to use a log axis: on a linear one, a base far above the trials would squeeze their ends."""
    low, high = panel.scale
    return "loss" in panel.title and low > 0 and high > 2.5 * low


def _log_axis(axes: Axes, low: float, high: float) -> None:
    axes.set_yscale("log")
    steps = (1, 2, 5) if high > 20 * low else (1, 1.5, 2, 2.5, 3, 4, 5, 7)
    ticks = log_ticks(low, high, steps)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ticks]))
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_line(axes: Axes, line: Line, edges: tuple[float, float]) -> None:
    steps, values = zip(*line.points, strict=True)
    plain = line.role == "other"
    color = ROLE_COLORS[line.role]
    axes.plot(
        steps,
        values,
        color=color,
        lw=1.1 if plain else 2.4,
        alpha=0.65 if plain else 1,
        ls={"baseline": (0, (5, 2)), "baseline_fixed": (0, (1.5, 1.5))}.get(line.role, "-"),
    )
    if _ends_outside(line, edges):
        _mark_exit(axes, line, edges)
    elif line.status == "diverged":
        axes.plot(steps[-1], values[-1], marker="X", color=POOR, ms=7, mec="none")
    elif line.status == "pruned":
        axes.plot(steps[-1], values[-1], marker="o", color=color, ms=3.5, mec="none")


def _mark_exit(axes: Axes, line: Line, edges: tuple[float, float]) -> None:
    """Draw an arrowhead where the curve leaves the axes for good."""
    is_above = line.points[-1][1] > edges[1]
    edge = edges[1] if is_above else edges[0]
    inside = [n for n, (_, v) in enumerate(line.points) if edges[0] <= v <= edges[1]]
    step = line.points[0][0]
    if inside:
        (step, value), (next_step, next_value) = line.points[inside[-1] :][:2]
        flat = math.log if axes.get_yscale() == "log" else float
        share = (flat(edge) - flat(value)) / (flat(next_value) - flat(value))
        step += share * (next_step - step)
    shape = "^" if is_above else "v"
    color = POOR if line.status == "diverged" else ROLE_COLORS[line.role]
    axes.plot(step, edge, marker=shape, color=color, ms=7, mec="none", clip_on=False)


def draw_gain(bars: Sequence[GainBar]) -> Picture:
    """Bars of audio gain, each labelled with the two text losses that it is the difference of."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.3, 1.5 + 0.36 * len(bars)), layout="constrained")
        axes = figure.subplots()
        gains = [bar.gain for bar in bars if not bar.wild]
        low, high = min([0.0, *gains]), max([GAIN_CLEAR, *gains])
        for row, bar in enumerate(bars):
            color, end = ROLE_COLORS.get(bar.role, INK), min(max(bar.gain, low), high)
            axes.barh(row, end, color=color, height=0.6)
            if end != bar.gain:
                axes.plot(end, row, marker=">" if end > 0 else "<", color=color, ms=11, mec="none")
            words = f"{signed(bar.gain)}  ({bar.right:.2f} → {bar.swapped:.2f})"
            axes.annotate(words, (1, row), **_ON_THE_RIGHT, fontsize=9)
        axes.axvline(0, color=INK, lw=1)
        axes.axvline(GAIN_CLEAR, color=BEST, lw=1.1, ls=(0, (4, 3)))
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
        for label, bar in zip(axes.get_yticklabels(), bars, strict=True):
            label.set_fontweight("bold" if bar.role == "best" else "normal")
        axes.invert_yaxis()
        axes.set_xlim(low - 0.04 * (high - low), high + 0.42 * (high - low))  # room for the words
        axes.grid(axis="y", visible=False)
        axes.set(
            title="Audio gain of the base and of the best full runs",
            xlabel="val/text/audio_gain  (nats per token);  beside it: own → other's",
        )
        clear = Line2D(
            [], [], color=BEST, lw=1.1, ls=(0, (4, 3)), label="from here on, text clearly listens"
        )
        figure.legend(handles=[clear], loc="outside lower center")
        return render(figure)


def draw_importance(info: ImportanceInfo) -> Picture:
    """Bars of the settings' shares, each with its limit by chance; the one furthest beyond it on top."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.3, 1.5 + 0.36 * len(info.shares)), layout="constrained")
        axes = figure.subplots()
        for row, (name, share) in enumerate(info.shares.items()):
            stands_out = name in info.mattered
            axes.barh(row, 100 * share, color=BEST if stands_out else OTHER, alpha=0.75, height=0.6)
            axes.plot(100 * info.by_chance[name], row, **_CHANCE_MARK)
            weight = "bold" if stands_out else "normal"
            axes.annotate(f"{100 * share:.0f}%", (1, row), **_ON_THE_RIGHT, fontweight=weight)
        axes.set_yticks(range(len(info.shares)), [setting_name(name) for name in info.shares])
        axes.invert_yaxis()
        axes.set_xlim(0, 115)  # room for the words
        axes.set_xticks(range(0, 101, 20))
        axes.grid(axis="y", visible=False)
        axes.set(
            title="Which setting mattered for text loss",
            xlabel=f"share of the ranking, %  ({info.num_trials} trials at step {info.step})",
        )
        limit = Line2D([], [], **_CHANCE_MARK, label="chance reaches up to here")
        figure.legend(handles=[limit], loc="outside lower center")
        return render(figure)
