"""What the report's figures show, as plain data; `draw.py` and `draw_planes.py` turn it into pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from higgs_tune import metrics as m
from higgs_tune.report.choose import Choice
from higgs_tune.report.importance import common_step
from higgs_tune.report.results import Results, Trial

Role = Literal["best", "baseline", "baseline_fixed", "other"]

CURVES = (
    (m.VAL_TEXT_NLL, "Text loss", "nats per token"),
    (m.VAL_AUDIO_NLL, "Audio loss", "nats per code"),
    (m.VAL_AUDIO_GAIN, "Audio gain", "nats per token"),
)


@dataclass(frozen=True)
class Line:
    """One trial's curve, from the base at step 0."""

    role: Role
    status: str
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class CurvesInfo:
    """All trials' curves of one metric."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    limit: float | None  # the audio limit, on the audio panel
    scale: tuple[float, float]  # lowest and highest value shown; outliers lie beyond


@dataclass(frozen=True)
class Point:
    """A trial in the plane of its two losses."""

    trial_id: str
    role: Role
    status: str
    cross_attention: str
    text: float
    audio: float


@dataclass(frozen=True)
class ScatterInfo:
    """Text against audio loss at each trial's last report."""

    points: tuple[Point, ...]
    base: tuple[float, float] | None  # (text, audio)
    audio_limit: float | None
    top_text: float  # where the scales end; outliers lie beyond
    top_audio: float

    def is_off_scale(self, point: Point) -> bool:
        """Whether the point lies beyond the end of either scale."""
        return point.text > self.top_text or point.audio > self.top_audio


@dataclass(frozen=True)
class GainBar:
    """Text loss after the clip's own audio (`right`) and after another clip's (`swapped`)."""

    label: str
    role: Role | Literal["base"]
    right: float
    swapped: float
    wild: bool  # the text loss lies beyond the scale of the other trials

    @property
    def gain(self) -> float:
        """How much its own audio lowers text loss, in nats per token."""
        return self.swapped - self.right


@dataclass(frozen=True)
class SpacePoint:
    """A trial in the plane of learning rate and rank."""

    role: Role
    learning_rate: float
    rank: int
    cross_attention: str
    text: float


@dataclass(frozen=True)
class SpaceInfo:
    """Text loss over learning rate and rank at the common step."""

    points: tuple[SpacePoint, ...]
    ranks: tuple[int, ...]
    step: int
    top: float  # where the colour scale of text loss ends; outliers lie above


def role(trial: Trial, choice: Choice | None) -> Role:
    """How the figures mark the trial; a fixed configuration that is the best is marked as best."""
    if choice is not None and trial.id == choice.trial.id:
        return "best"
    return trial.origin if trial.origin in ("baseline", "baseline_fixed") else "other"


def curves_info(results: Results, choice: Choice | None) -> tuple[CurvesInfo, ...]:
    """One panel per metric of `CURVES`, with the search's trials only."""
    panels = []
    for metric, title, unit in CURVES:
        lines = []
        start = [] if results.base is None else [(0, results.base.get(metric))]
        origin = [(step, value) for step, value in start if value is not None]
        for trial in results.search:
            points = trial.curve(metric)
            if points:
                lines.append(Line(role(trial, choice), trial.status, (*origin, *points)))
        limit = results.audio_limit if metric == m.VAL_AUDIO_NLL else None
        scale = _scale(results, metric, lines)
        panels.append(CurvesInfo(title, unit, tuple(lines), limit, scale))
    return tuple(panels)


def _scale(results: Results, metric: str, lines: Sequence[Line]) -> tuple[float, float]:
    """Range of a panel: losses up to `_axis_end`, gains of reports whose text loss is on its scale."""
    if metric != m.VAL_AUDIO_GAIN:
        values = [value for line in lines for _, value in line.points]
        return min(values, default=0.0), _axis_end(values, _reference(results, metric))
    top = _text_top(results)
    base = [] if results.base is None else [results.base.get(metric)]
    gains = [
        gain
        for trial in results.search
        for step, gain in trial.curve(metric)
        if (text := trial.at(step, m.VAL_TEXT_NLL)) is not None and text <= top
    ]
    shown = [*gains, *(value for value in base if value is not None)]
    return min(shown, default=0.0), max(shown, default=0.0)


def _text_top(results: Results) -> float:
    """Where the scale of text loss ends."""
    curves = [trial.curve(m.VAL_TEXT_NLL) for trial in results.search]
    values = [value for curve in curves for _, value in curve]
    if results.base is not None:
        values.append(results.base[m.VAL_TEXT_NLL])
    return _axis_end(values, _reference(results, m.VAL_TEXT_NLL))


def _reference(results: Results, metric: str) -> float | None:
    """The loss to compare trials with: the audio limit, or the untouched base's text loss."""
    if metric == m.VAL_AUDIO_NLL:
        return results.audio_limit
    return None if results.base is None else results.base[metric]


def _axis_end(values: Sequence[float], reference: float | None) -> float:
    """Where a scale of losses ends, so that an outlier does not squeeze all other trials.

    It ends at the highest loss that is at most twice as far above the lowest as the reference or the
    outlier threshold, whichever is higher: the median plus three scaled median absolute deviations.
    Source of the threshold: Leys et al., Journal of Experimental Social Psychology 49, 2013.
    """
    if not values:
        return 0.0
    low, median = min(values), float(np.median(values))
    deviation = 1.4826 * float(np.median(np.abs(np.asarray(values) - median)))
    usual = median + 3 * deviation
    end = low + 2 * (max(usual, low if reference is None else reference) - low)
    return max(value for value in values if value <= end)


def scatter_info(results: Results, choice: Choice | None) -> ScatterInfo:
    """Every search trial whose last report has two finite losses."""
    points = []
    for trial in results.search:
        text, audio = trial.last(m.VAL_TEXT_NLL), trial.last(m.VAL_AUDIO_NLL)
        if text is None or audio is None:
            continue
        points.append(
            Point(
                trial_id=trial.id,
                role=role(trial, choice),
                status=trial.status,
                cross_attention=trial.config.cross_attention,
                text=text,
                audio=audio,
            )
        )
    base = results.base
    corner = None if base is None else (base[m.VAL_TEXT_NLL], base[m.VAL_AUDIO_NLL])
    return ScatterInfo(
        points=tuple(points),
        base=corner,
        audio_limit=results.audio_limit,
        top_text=_axis_end([p.text for p in points], _reference(results, m.VAL_TEXT_NLL)),
        top_audio=_axis_end([p.audio for p in points], _reference(results, m.VAL_AUDIO_NLL)),
    )


def gain_info(results: Results, choice: Choice | None, most: int = 8) -> tuple[GainBar, ...]:
    """The base, then up to `most` full-budget trials by text loss, the fixed and best ones included."""
    bars, top = [], _text_top(results)
    for trial in results.search:
        right, swapped = trial.last(m.VAL_TEXT_NLL), trial.last(m.VAL_TEXT_NLL_SWAPPED)
        if right is None or swapped is None or not trial.full_budget:
            continue
        label = f"{trial.id} {trial.config.cross_attention}"
        bars.append(GainBar(label, role(trial, choice), right, swapped, right > top))
    bars.sort(key=lambda bar: bar.right)
    named = [bar for bar in bars if bar.role != "other"]
    others = [bar for bar in bars if bar.role == "other"][: max(0, most - len(named))]
    shown = sorted([*named, *others], key=lambda bar: bar.right)
    base = results.base
    if base is not None and m.VAL_TEXT_NLL_SWAPPED in base:
        right, swapped = base[m.VAL_TEXT_NLL], base[m.VAL_TEXT_NLL_SWAPPED]
        start = GainBar("base", "base", right, swapped, wild=False)
        return (start, *shown)
    return tuple(shown)


def space_info(results: Results, choice: Choice | None) -> SpaceInfo | None:
    """Trials that reached the common step and never changed settings; None if fewer than two did."""
    step = common_step(results)
    points, sampled = [], []
    for trial in results.search:
        text = trial.at(step, m.VAL_TEXT_NLL)
        config = trial.config
        if text is None or config.schedule:  # a copy has the first rate of its donor
            continue
        if trial.origin == "search":
            sampled.append(text)
        points.append(
            SpacePoint(
                role=role(trial, choice),
                learning_rate=config.learning_rate,
                rank=config.rank,
                cross_attention=config.cross_attention,
                text=text,
            )
        )
    if len(points) < 2:
        return None
    ranks = tuple(sorted({point.rank for point in points}))
    return SpaceInfo(tuple(points), ranks, step, _top([point.text for point in points], sampled))


def _top(losses: list[float], sampled: list[float]) -> float:
    """End of the colour scale: the highest loss, or the sampled trials' outlier fence if that is lower.

    Without the fence, one bad trial or those set by hand would make all others look alike.
    Source: Tukey, Exploratory Data Analysis, 1977 (third quartile + 1.5 interquartile ranges).
    """
    first, third = np.quantile(sampled, [0.25, 0.75])
    if first == third:
        return max(losses)
    return min(max(losses), float(third + 1.5 * (third - first)))
