"""Draw the trials in a plane: text against audio loss, and text loss over learning rate and rank."""

from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

from higgs_tune.report.ink import (
    BEST,
    CROSS_COLORS,
    CROSS_MARKERS,
    INK,
    STYLE,
    Picture,
    log_ticks,
    marker,
    render,
)
from higgs_tune.report.plots import Point, ScatterInfo, SpaceInfo

_MAX_NAMED = 3  # off-scale trials whose losses the legend lists

_RING: Any = {"marker": "o", "mfc": "none", "mec": INK, "mew": 1.6}  # around the best


def draw_scatter(info: ScatterInfo) -> Picture:
    """Text against audio loss; the feasible side is shaded."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.3, 4.7), layout="constrained")
        axes = figure.subplots()
        _frame_scatter(axes, info)
        for point in info.points:
            color = CROSS_COLORS[point.cross_attention]
            hollow = point.status != "completed"
            audio, text = _place(axes, info, point)
            axes.plot(
                audio,
                text,
                marker=CROSS_MARKERS[point.cross_attention],
                ls="none",
                ms=11 if point.role == "best" else 7.5,
                mfc="none" if hollow else color,
                mec=color,
                mew=1.4 if hollow else 0,
                alpha=1 if point.role != "other" else 0.85,
                zorder=4 if point.role == "best" else 3,
                clip_on=False,
            )
        _name_points(axes, info)
        axes.set(
            title="Text against audio at each trial's last report",
            xlabel="val/audio/nll_per_code  (nats per code)",
            ylabel="val/text/nll  (nats per token)",
        )
        used = [
            name for name in CROSS_COLORS if any(p.cross_attention == name for p in info.points)
        ]
        handles = [marker(CROSS_MARKERS[n], CROSS_COLORS[n], f"cross_attention {n}") for n in used]
        if any(point.status != "completed" for point in info.points):
            handles.append(marker("o", INK, "hollow: did not run to the end", hollow=True))
        if info.audio_limit is not None:
            handles.append(
                Line2D([], [], color=BEST, lw=8, alpha=0.15, label="audio within its limit")
            )
        handles += _on_the_edge(info)
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        return render(figure)


def _place(axes: Axes, info: ScatterInfo, point: Point) -> tuple[float, float]:
    """The trial's place as (audio, text), on the edge if it is off the scale."""
    audio = axes.get_xlim()[1] if point.audio > info.top_audio else point.audio
    text = axes.get_ylim()[1] if point.text > info.top_text else point.text
    return audio, text


def _on_the_edge(info: ScatterInfo) -> list[Line2D]:
    """Legend entries with the losses of the worst off-scale trials, and the number of the others."""
    wild = [point for point in info.points if info.is_off_scale(point)]
    wild.sort(key=lambda point: (-point.text, -point.audio))
    lines = [f"{p.trial_id}: text {p.text:.3g}, audio {p.audio:.3g}" for p in wild[:_MAX_NAMED]]
    if len(wild) > _MAX_NAMED:
        lines.append(f"{len(wild) - _MAX_NAMED} more")
    return [Line2D([], [], ls="none", label=f"on the edge, {line}") for line in lines]


def _frame_scatter(axes: Axes, info: ScatterInfo) -> None:
    """Set limits around the trials, and draw the audio limit and the base; a far base becomes an arrow."""
    audios = [point.audio for point in info.points if point.audio <= info.top_audio]
    texts = [point.text for point in info.points if point.text <= info.top_text]
    edges = [] if info.audio_limit is None else [info.audio_limit]
    if info.base is not None:
        edges.append(info.base[1])
    low_x, high_x = min([*audios, *edges], default=0), max([*audios, *edges], default=1)
    low_y, high_y = min(texts, default=0), max(texts, default=1)
    if info.base is not None:
        low_y = min(low_y, info.base[0])
    pad_x, pad_y = 0.08 * (high_x - low_x) or 0.1, 0.1 * (high_y - low_y) or 0.1
    if info.base is not None and info.base[0] <= high_y + 0.5 * (high_y - low_y):
        high_y = max(high_y, info.base[0])
    axes.set_xlim(low_x - pad_x, high_x + pad_x)
    is_above = info.base is not None and info.base[0] > high_y + pad_y
    top = high_y + (3.2 if is_above else 1) * pad_y  # room for its arrow and label above all trials
    axes.set_ylim(low_y - pad_y, top)
    if info.audio_limit is not None:
        axes.axvspan(low_x - pad_x, info.audio_limit, color=BEST, alpha=0.08, lw=0, zorder=0)
        axes.axvline(info.audio_limit, color=BEST, lw=1, alpha=0.6)
    if info.base is None:
        return
    text, audio = info.base
    if not is_above:
        axes.plot(audio, text, marker="*", color=INK, ms=13, mec="none", zorder=3)
        axes.annotate("base", (audio, text), xytext=(9, 0), textcoords="offset points", va="center")
        return
    axes.annotate(
        f"base, text {text:.2f}",
        (audio, top),
        xytext=(0, -30),
        textcoords="offset points",
        ha="left" if audio < low_x + 0.15 * (high_x - low_x) else "center",
        va="top",
        fontsize=9,
        arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.3},
    )


def _name_points(axes: Axes, info: ScatterInfo) -> None:
    """Label the best and the fixed trials; those that overlap share one label."""
    names = {"best": "best", "baseline": "trial 0", "baseline_fixed": "trial 1"}
    low_x, high_x = axes.get_xlim()
    low_y, high_y = axes.get_ylim()
    labels: list[tuple[float, float, str]] = []
    for point in info.points:
        if point.role == "other":
            continue
        name, (audio, text) = names[point.role], _place(axes, info, point)
        for index, (x, y, others) in enumerate(labels):
            near_x = abs(audio - x) < 0.12 * (high_x - low_x)
            if near_x and abs(text - y) < 0.05 * (high_y - low_y):
                labels[index] = (max(x, audio), (y + text) / 2, f"{others}, {name}")
                break
        else:
            labels.append((audio, text, name))
    for x, y, name in labels:
        on_right = x < low_x + 0.8 * (high_x - low_x)
        axes.annotate(
            name,
            (x, y),
            xytext=(9 if on_right else -9, 0),
            textcoords="offset points",
            ha="left" if on_right else "right",
            va="center",
            fontweight="bold" if "best" in name else "normal",
            zorder=5,
        )


def draw_space(info: SpaceInfo) -> Picture:
    """Text loss over learning rate and rank."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.3, 4.2), layout="constrained")
        axes = figure.subplots()
        losses = [point.text for point in info.points]
        norm = Normalize(min(losses), info.top)
        colors = LinearSegmentedColormap.from_list("loss", ["#0b6e8f", "#a9b4bd", "#d9722b"])
        used = [n for n in CROSS_MARKERS if any(p.cross_attention == n for p in info.points)]
        for point in info.points:
            # Trials of one rank are spread out by cross_attention, so that they do not overlap.
            shift = 0.16 * (used.index(point.cross_attention) - (len(used) - 1) / 2)
            place = point.learning_rate, info.ranks.index(point.rank) + shift
            shape, color = CROSS_MARKERS[point.cross_attention], colors(norm(point.text))
            axes.plot(*place, marker=shape, color=color, ms=9.5, mec="none")
            if point.role == "best":
                axes.plot(*place, **_RING, ms=17)
        _rate_axis(axes)
        axes.set_yticks(range(len(info.ranks)), [str(rank) for rank in info.ranks])
        axes.set_ylim(-0.6, len(info.ranks) - 0.4)
        axes.set(
            title=f"Text loss over learning rate and rank, step {info.step}",
            xlabel="learning rate",
            ylabel="rank",
        )
        extend = "max" if max(losses) > info.top else "neither"
        bar = figure.colorbar(ScalarMappable(norm, colors), ax=axes, pad=0.02, extend=extend)
        bar.set_label("val/text/nll  (nats per token)")
        bar.outline.set_visible(False)
        handles = [marker(CROSS_MARKERS[name], INK, f"cross_attention {name}") for name in used]
        if any(point.role == "best" for point in info.points):
            handles.append(Line2D([], [], ls="none", **_RING, ms=11, label="best"))
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        return render(figure)


def _rate_axis(axes: Axes) -> None:
    """Make the axis of learning rates logarithmic; matplotlib's own labels for it often overlap."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = log_ticks(low, high, (1,) if high > 1000 * low else (1, 2, 5))
    axes.xaxis.set_major_locator(FixedLocator(ticks) if len(ticks) > 1 else MaxNLocator(4))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
