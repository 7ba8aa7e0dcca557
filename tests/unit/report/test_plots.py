"""The data behind the figures; every figure can be drawn even from odd results."""

from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from higgs_tune import metrics as m
from higgs_tune.report.build import draw
from higgs_tune.report.draw import draw_curves
from higgs_tune.report.draw_planes import draw_scatter, draw_space
from higgs_tune.report.findings import find
from higgs_tune.report.plots import (
    CurvesInfo,
    Line,
    SpaceInfo,
    SpacePoint,
    curves_info,
    gain_info,
    scatter_info,
    space_info,
)
from higgs_tune.report.results import Results, read_results
from tests.unit.report.builder import BASE, Builder, curve, realistic, trial_config


@pytest.fixture
def results(tmp_path: Path) -> Results:
    realistic(tmp_path)
    return read_results(tmp_path)


def test_curves_start_at_the_base_and_end_before_nan(results: Results) -> None:
    text, audio, _ = curves_info(results, None)
    assert {line.points[0] for line in text.lines} == {(0, BASE[m.VAL_TEXT_NLL])}
    diverged = next(line for line in text.lines if line.status == "diverged")
    assert diverged.points[-1][0] == 50
    assert audio.limit == pytest.approx(3.93 * 1.05)
    assert text.limit is None


def test_scatter_has_a_point_for_each_trial_with_losses(results: Results) -> None:
    info = scatter_info(results, find(results).choice)
    assert len(info.points) == 19  # 20 less the diverged one
    assert [point.trial_id for point in info.points if point.role == "baseline"] == ["t000"]
    assert [point.role for point in info.points].count("best") == 1
    assert info.base == (BASE[m.VAL_TEXT_NLL], BASE[m.VAL_AUDIO_NLL])


def test_gain_bars_include_the_base_the_best_and_trials_0_and_1(results: Results) -> None:
    bars = gain_info(results, find(results).choice, most=4)
    assert [bar.role for bar in bars] == ["base", "best", "other", "baseline_fixed", "baseline"]
    assert bars[0].gain == pytest.approx(0.01)


def test_space_compares_all_trials_at_one_step(results: Results) -> None:
    info = space_info(results, None)
    assert info is not None
    assert info.step == 50  # the first rung
    assert info.ranks == (4, 8, 16, 32)
    assert len(info.points) == 20


def test_space_needs_more_than_one_trial(tmp_path: Path) -> None:
    config = trial_config()
    Builder(tmp_path).start().trial("t000", config, curve(config, 3.0, 0.1, 3.9, 150))
    assert space_info(read_results(tmp_path), None) is None


def space(directory: Path, sampled: list[float], by_hand: list[float]) -> SpaceInfo:
    """The space of full-budget trials that end at these text losses."""
    builder = Builder(directory).start()
    for number, text in enumerate([*by_hand, *sampled]):
        origin = ("baseline", "baseline_fixed")[number] if number < len(by_hand) else "search"
        config = trial_config(learning_rate=1e-3 * (1 + number))
        rows = curve(config, text, 0.1, 3.9, 150)
        builder.trial(f"t{number:03d}", config, rows, origin=origin)
    info = space_info(read_results(directory), None)
    assert info is not None
    return info


@pytest.mark.parametrize(
    "sampled, by_hand, top",
    [
        ([1.0, 2.0, 3.0, 4.0, 9.0], [5.0, 5.5], 7.0),  # quartiles 2 and 4: 4 + 1.5 * 2
        ([1.0, 2.0, 3.0, 4.0, 5.0], [5.5, 8.5], 7.0),
        ([1.0, 2.0, 3.0, 4.0, 5.0], [5.5, 5.6], 5.6),  # all within
        ([2.0, 2.0], [5.0, 5.5], 5.5),  # no spread to define an outlier
    ],
)
def test_outliers_do_not_stretch_the_scale_of_space(
    tmp_path: Path, sampled: list[float], by_hand: list[float], top: float
) -> None:
    info = space(tmp_path, sampled, by_hand)
    assert info.top == pytest.approx(top)
    assert draw_space(info).png.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "low, high",
    [(1e-5, 1e-1), (1e-4, 5e-3), (1.7e-4, 5.9e-3), (3e-4, 7e-3), (1.25e-4, 2.66e-4), (1e-3, 1e-3)],
)
def test_labels_of_learning_rates_do_not_overlap(monkeypatch, low: float, high: float) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr("higgs_tune.report.draw_planes.render", figures.append)
    points = tuple(SpacePoint("other", rate, 16, "off", 2.0 + rate) for rate in (low, high))
    draw_space(SpaceInfo(points, (16,), 100, 3.0))
    (figure,) = figures
    figure.draw_without_rendering()
    axis = figure.axes[0].xaxis
    left, right = figure.axes[0].get_xlim()
    labels = [*axis.get_majorticklabels(), *axis.get_minorticklabels()]
    shown = [text for text in labels if text.get_text() and left <= text.get_position()[0] <= right]
    extents = sorted((text.get_window_extent() for text in shown), key=lambda box: box.x0)
    assert len(extents) > 1
    assert all(box.x1 < after.x0 for box, after in pairwise(extents))


def test_space_leaves_out_pbt_copies(tmp_path: Path) -> None:
    space(tmp_path, [2.0, 3.0], [5.0])
    change = {
        "step": 50, "learning_rate": 2e-3, "new_module_lr_factor": 0.1, "text_loss_weight": 1.0,
        "audio_loss_weight": 1.0, "copied_from": "t001",
    }  # fmt: skip
    config = trial_config(rank=4, schedule=(change,))
    Builder(tmp_path).trial("t009", config, curve(config, 1.0, 0.1, 3.9, 150))
    info = space_info(read_results(tmp_path), None)
    assert info is not None
    assert (len(info.points), info.ranks) == (3, (16,))


def test_every_figure_is_drawn(results: Results) -> None:
    pictures = draw(results, find(results))
    assert list(pictures) == ["curves", "scatter", "gain", "importance", "space"]
    for picture in pictures.values():
        assert picture.png.startswith(b"\x89PNG")
        assert "currentColor" in picture.svg
        assert "nats" in picture.svg or "share of the ranking" in picture.svg


def test_same_results_give_the_same_pictures(results: Results) -> None:
    first, second = (draw_scatter(scatter_info(results, None)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("text, audio", [(7.72, 3.93), (20.0, 9.0), (0.001, 0.001)])
def test_single_trial_with_odd_values_is_drawn(tmp_path: Path, text: float, audio: float) -> None:
    config = trial_config()
    Builder(tmp_path).start().trial("t000", config, curve(config, text, -0.5, audio, 150))
    results = read_results(tmp_path)
    assert {"curves", "scatter", "gain"} <= set(draw(results, find(results)))


def test_trials_without_base_are_drawn(tmp_path: Path) -> None:
    config = trial_config()
    Builder(tmp_path, base=None).start().trial(
        "t000", config, curve(config, 3.0, 0.1, 3.9, 50), status=None
    )
    results = read_results(tmp_path)
    assert set(draw(results, find(results))) == {"curves", "scatter"}


def test_base_below_all_trials_is_within_the_axes(tmp_path: Path) -> None:
    base = BASE | {m.VAL_TEXT_NLL: 1.0}
    builder, config = Builder(tmp_path, base=base).start(), trial_config()
    for number, text in enumerate([3.5, 4.0]):  # training has made text worse
        builder.trial(f"t{number:03d}", config, curve(config, text, 0.1, 3.9, 150))
    assert ">base</text>" in draw_scatter(scatter_info(read_results(tmp_path), None)).svg


def with_wild(directory: Path) -> Results:
    """A usual sweep and three outliers: in both losses, in text loss, in audio loss."""
    builder = realistic(directory)
    for number, (text, gain, audio) in enumerate([(402, -31, 19), (36, 6, 4), (3.1, 0.2, 7.1)]):
        config = trial_config(learning_rate=2e-2)
        builder.trial(f"t{90 + number:03d}", config, curve(config, text, gain, audio, 150))
    return read_results(directory)


def test_wild_trials_do_not_stretch_the_scales(results: Results, tmp_path: Path) -> None:
    wild = with_wild(tmp_path / "wild")
    usual, info = scatter_info(results, None), scatter_info(wild, None)
    assert (info.top_text, info.top_audio) == (usual.top_text, usual.top_audio)
    assert (usual.top_text, usual.top_audio) == (
        max(point.text for point in usual.points),
        max(point.audio for point in usual.points),
    )
    beyond = [point.trial_id for point in info.points if info.is_off_scale(point)]
    assert beyond == ["t090", "t091", "t092"]
    assert "t090: text 402, audio 19" in draw_scatter(info).svg
    for before, after in zip(curves_info(results, None), curves_info(wild, None), strict=True):
        values = [value for line in before.lines for _, value in line.points]
        assert before.scale == (min(values), max(values))
        assert after.scale[0] == pytest.approx(before.scale[0], abs=0.1)
        assert after.scale[1] == pytest.approx(before.scale[1], abs=0.1)
    assert "leaves the scale" in draw_curves(curves_info(wild, None)).svg
    assert "leaves the scale" not in draw_curves(curves_info(results, None)).svg


@pytest.mark.parametrize("end, leaves", [(12.9, False), (14.0, True)])
def test_curve_leaves_the_scale_only_beyond_the_end_of_the_axis(end: float, leaves: bool) -> None:
    line = Line("other", "completed", ((0, 7.7), (25, 11.0), (50, end)))
    panel = CurvesInfo("Text loss", "nats per token", (line,), None, (2.8, 12.6))
    drawn = draw_curves([panel, panel]).svg  # the axis ends at 13.6
    assert ("leaves the scale" in drawn) == leaves


def test_bars_of_wild_gains_are_marked(tmp_path: Path) -> None:
    wild = with_wild(tmp_path)
    bars = gain_info(wild, None, most=30)
    assert [bar.label for bar in bars if bar.wild] == ["t091 off", "t090 off"]


def test_losses_that_are_all_high_have_ticks(tmp_path: Path) -> None:
    builder = Builder(tmp_path).start()
    for number, text in enumerate([30.0, 60.0, 120.0, 240.0]):
        config = trial_config()
        builder.trial(f"t{number:03d}", config, curve(config, text, 0.1, 3.9, 150))
    results = read_results(tmp_path)
    panels = curves_info(results, None)
    assert panels[0].scale == (BASE[m.VAL_TEXT_NLL], 240.0)
    drawn = draw_curves(panels).svg
    assert all(f">{tick}</text>" in drawn for tick in (10, 20, 50, 100, 200))
