"""Colours, style and output of the figures: PNG for slides, SVG for the page.

In the SVG, axes and text are `currentColor` and the background is transparent, so that one picture
suits a light and a dark page. Series colours are readable on both.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

INK = "#5a6472"  # replaced by currentColor in SVG
BEST = "#0f8f6a"
BASELINE = "#d9822b"
FIXED = "#8a5bd1"
OTHER = "#9aa5b1"
POOR = "#c8453b"
ROLE_COLORS = {"best": BEST, "baseline": BASELINE, "baseline_fixed": FIXED, "other": OTHER}
ROLE_NAMES = {
    "best": "best",
    "baseline": "trial 0, by hand",
    "baseline_fixed": "trial 1, by hand with audio_self",
    "other": "other trials",
}
CROSS_MARKERS = {"off": "o", "audio_self": "s", "text_to_audio": "^"}
CROSS_COLORS = {"off": "#3b82c4", "audio_self": "#8a5bd1", "text_to_audio": "#0f8f6a"}
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.16,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "higgs-tune",  # fixed, so that the same figure gives the same file
}


@dataclass(frozen=True)
class Picture:
    """A drawn figure in both formats."""

    png: bytes
    svg: str


def log_ticks(low: float, high: float, steps: Sequence[float]) -> list[float]:
    """The ticks of a log axis: these multiples of each power of ten."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for d in decades for s in steps if low <= (tick := s * 10.0**d) <= high]


def marker(shape: str, color: str, label: str, hollow: bool = False, size: float = 7.5) -> Line2D:
    """A legend entry."""
    face = "none" if hollow else color
    return Line2D([], [], ls="none", marker=shape, mfc=face, mec=color, ms=size, label=label)


def png_of(figure: Figure) -> bytes:
    """The figure as PNG; the same figure gives the same bytes."""
    png, metadata = io.BytesIO(), {"Software": None}
    FigureCanvasAgg(figure).print_png(png, metadata=metadata)
    return png.getvalue()


def render(figure: Figure) -> Picture:
    """Both formats of a figure; the same figure gives the same bytes."""
    svg = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
    figure.set_facecolor("white")
    figure.set_dpi(160)
    text = svg.getvalue().decode("utf-8")
    return Picture(png_of(figure), text[text.index("<svg") :].replace(INK, "currentColor"))
