"""The summary's sentences claim what the runs show, and no more."""

import math
from pathlib import Path

import pytest

from higgs_tune.metrics import VAL_AUDIO_NLL
from higgs_tune.report.findings import Findings, comparison, find
from higgs_tune.report.results import read_results
from tests.unit.report.builder import (
    BASE,
    Builder,
    curve,
    report_row,
    sweep_config,
    trial_config,
)

CONFIG = trial_config()


def findings(directory: Path) -> Findings:
    return find(read_results(directory))


def sentence(found: Findings, key: str) -> str:
    return next(answer.sentence for answer in found.answers if answer.key == key)


def pairs(
    directory: Path,
    baseline: list[float],
    best: list[float],
    gain: float | tuple[float, ...] = 0.4,
    baseline_audio: float = 3.9,
    origin: str = "search",
) -> Findings:
    """Findings on a sweep of two trials whose confirm runs end at these text losses.

    Args:
        gain: the audio gain of all runs, or one per seed.
        origin: of trial 1.
    """
    gains = gain if isinstance(gain, tuple) else (gain,) * len(best)
    builder = Builder(directory, sweep_config(confirm={"num_seeds": len(best)})).start()
    for trial_id, text in (("t000", baseline), ("t001", best)):
        came_from = "baseline" if trial_id == "t000" else origin
        audio = baseline_audio if trial_id == "t000" else 3.9
        rows = curve(CONFIG, min(text) - 0.1, gains[0], audio, 150)
        builder.trial(trial_id, CONFIG, rows, origin=came_from)
        for seed, value in enumerate(text):
            config = trial_config(seed=100 + seed)
            rows = curve(config, value, gains[seed], audio, 150)
            run_id = f"c{10 * int(trial_id[1:]) + seed:03d}"
            builder.trial(run_id, config, rows, origin="confirm", confirms=trial_id)
    return findings(directory)


def test_clear_difference_is_called_better(tmp_path: Path) -> None:
    found = pairs(tmp_path, [3.0, 3.1], [2.0, 2.1])
    assert found.outcome == "better"
    said = "1.00 nats per token lower than trial 0's (95% interval −1.000 to −1.000, 2 seeds)."
    assert said in sentence(found, "found")


def test_losses_are_compared_with_the_base_and_trial_0(tmp_path: Path) -> None:
    found = pairs(tmp_path / "low", [3.0, 3.1], [2.0, 2.1])
    _, text, audio, *_ = found.answers
    assert (text.figure, text.tone) == ("7.72 → 2.05", "good")
    said = "−5.67 nats per token against the untouched base; trial 0 ended at 3.05."
    assert text.sentence == said
    assert audio.figure == "3.93 → 3.90"
    assert audio.sentence == "−0.8%; a rise of 5.0% is allowed."
    _, text, *_ = pairs(tmp_path / "high", [8.0, 8.1], [8.4, 8.5]).answers
    assert (text.figure, text.tone) == ("7.72 → 8.05", "poor")
    assert text.sentence == "+0.33 nats per token against the untouched base."  # best: trial 0


@pytest.mark.parametrize(
    "origin, best, verdict",
    [
        ("search", [2.0, 2.1], "Better than by hand"),
        ("search", [2.9, 3.1], "Not clearly better than by hand"),
        ("baseline_fixed", [2.0, 2.1], "Better than trial 0"),
        ("baseline_fixed", [2.9, 3.1], "Not clearly better than trial 0"),
    ],
)
def test_verdict_on_a_best_set_by_hand_compares_it_with_trial_0(
    tmp_path: Path, origin: str, best: list[float], verdict: str
) -> None:
    found = pairs(tmp_path, [3.0, 3.1 if best[0] < 2.5 else 3.3], best, origin=origin)
    assert found.answers[0].figure == verdict


def test_difference_within_seed_noise_is_reported_as_such(tmp_path: Path) -> None:
    found = pairs(tmp_path, [3.0, 3.3], [2.9, 3.1])
    assert found.outcome == "within_noise"
    said = "beyond the noise of the seeds (95% interval −0.79 to +0.49, 2 seeds)."
    assert said in sentence(found, "found")
    assert "Two seeds usually miss" in sentence(found, "found")
    found = pairs(tmp_path / "3", [3.0, 3.3, 3.2], [2.9, 3.1, 3.3])
    assert found.outcome == "within_noise"
    assert "Two seeds" not in sentence(found, "found")


@pytest.mark.parametrize(
    "differences, said",
    [
        (
            (-0.0030, -0.0031),
            "0.003 nats per token lower than trial 0's (95% interval −0.004 to −0.002",
        ),
        ((-0.0003, -0.0003), "0.0003 nats per token lower than trial 0's (95% interval −0.0003 to"),
        ((0.04, 0.05, 0.02), "(95% interval −0.001 to +0.075"),
        ((0.0, 0.0), "(95% interval +0.000 to +0.000"),
    ],
)
def test_a_small_difference_is_not_shown_as_zero(
    tmp_path: Path, differences: tuple[float, ...], said: str
) -> None:
    baseline = [3.0 + 0.01 * seed for seed in range(len(differences))]
    best = [text + rise for text, rise in zip(baseline, differences, strict=True)]
    # worse or equal: audio keeps trial 0 from being chosen
    assert said in sentence(pairs(tmp_path, baseline, best, baseline_audio=5.0), "found")


def test_best_worse_than_an_infeasible_trial_0_is_reported_as_worse(tmp_path: Path) -> None:
    found = pairs(tmp_path, [2.0, 2.1], [3.0, 3.1], baseline_audio=5.0)
    assert found.outcome == "worse"
    said = sentence(found, "found")
    assert "1.00 nats per token higher than trial 0's" in said
    assert "Trial 0 could not be chosen: it let audio loss rise beyond its limit." in said


@pytest.mark.parametrize("num_steps, said", [(150, "ran with another seed"), (75, "never reached")])
def test_single_runs_with_different_seeds_or_lengths_are_not_compared(
    tmp_path: Path, num_steps: int, said: str
) -> None:
    builder = Builder(tmp_path, sweep_config(confirm={"num_configs": 0})).start()
    rows = curve(CONFIG, 3.0, 0.4, 3.9, 150)[: num_steps // 25]
    builder.trial("t000", CONFIG, rows, origin="baseline")
    builder.trial("t001", trial_config(seed=7), curve(CONFIG, 2.0, 0.4, 3.9, 150))
    assert f"Trial 0 {said}" in sentence(findings(tmp_path), "found")


def test_table_shows_seed_means_for_both_trial_0_and_the_best(tmp_path: Path) -> None:
    found = pairs(tmp_path, [3.0, 3.2], [2.0, 2.2], origin="baseline_fixed")
    rows = comparison(read_results(tmp_path), found.choice)
    texts = {label: (round(text.mean, 2), text.n) for label, (text, *_) in rows if text is not None}
    assert texts == {
        "base": (7.72, 1),
        "t000 off, by hand, 2 seeds": (3.1, 2),
        "t001 off, by hand": (1.9, 1),
        "t001 best, 2 seeds": (2.1, 2),
    }


def test_table_shows_a_single_confirm_run_of_trial_0_and_not_its_search_run(tmp_path: Path) -> None:
    found = pairs(tmp_path, [3.0], [2.0])
    rows = comparison(read_results(tmp_path), found.choice)
    assert {label: text and round(text.mean, 2) for label, (text, *_) in rows} == {
        "base": 7.72,
        "t000 off, by hand, 1 seed": 3.0,  # 2.9 in the search
        "t001 best, 1 seed": 2.0,
    }


def diverged_in_confirm(directory: Path, seeds: dict[str, tuple[int, ...]]) -> Findings:
    """Trial 0 and a better trial 1, confirmed with two seeds each; `seeds` are those that diverge."""
    builder = Builder(directory).start()
    for trial_id, text in (("t000", 3.0), ("t001", 2.0)):
        origin = "baseline" if trial_id == "t000" else "search"
        builder.trial(trial_id, CONFIG, curve(CONFIG, text, 0.4, 3.9, 150), origin=origin)
        for seed in range(2):
            config = trial_config(seed=100 + seed)
            rows, status = curve(config, text, 0.4, 3.9, 150), "completed"
            if seed in seeds.get(trial_id, ()):
                rows, status = rows[:3], "diverged"
            run_id = f"c{10 * int(trial_id[1:]) + seed:03d}"
            builder.trial(run_id, config, rows, origin="confirm", confirms=trial_id, status=status)
    return findings(directory)


def test_trial_0_that_failed_only_its_confirm_runs_is_reported(
    tmp_path: Path,
) -> None:
    said = sentence(diverged_in_confirm(tmp_path, {"t000": (0, 1)}), "found")
    assert said.startswith("None of trial 0's confirm runs reached the full budget")


@pytest.mark.parametrize("who", [("t001",), ("t000", "t001")])
def test_trial_that_diverged_in_confirm_is_noted_as_excluded(
    tmp_path: Path, who: tuple[str, ...]
) -> None:
    found = diverged_in_confirm(tmp_path, dict.fromkeys(who, (1,)))
    reason = "not all of its 2 confirm runs reached the full budget (1 diverged)"
    for trial_id in ("t000", "t001"):
        note = f"{trial_id} was confirmed and cannot be chosen: {reason}."
        assert (note in found.notes) == (trial_id in who)
    if "t000" in who:
        assert found.headline == "No configuration held up in the confirm stage"
    else:
        assert found.outcome == "baseline_best"


def test_trial_beyond_the_audio_limit_in_confirm_is_noted_as_excluded(tmp_path: Path) -> None:
    found = pairs(tmp_path, [3.0, 3.1], [2.0, 2.1], baseline_audio=5.0)
    reason = f"its audio loss, 5.00 over 2 seeds, is beyond the limit of {3.93 * 1.05:.2f}"
    note = f"t000 was confirmed and cannot be chosen: {reason}."
    assert note in found.notes


def test_text_loss_that_rose_is_not_reported_as_fallen(tmp_path: Path) -> None:
    found = pairs(tmp_path, [9.0, 9.1], [8.0, 8.1], gain=0.0)
    assert "fell" not in sentence(found, "listening")
    (tmp_path / "fell").mkdir()
    found = pairs(tmp_path / "fell", [3.0, 3.1], [2.0, 2.1], gain=0.0)
    assert "fell by learning to write the language" in sentence(found, "listening")


@pytest.mark.parametrize("end, verb", [(7.718, "stayed at 7.72"), (7.7, "fell from 7.72 to 7.70")])
def test_text_loss_that_rounds_to_the_same_is_reported_as_unchanged(
    tmp_path: Path, end: float, verb: str
) -> None:
    builder = Builder(tmp_path).start()
    builder.trial("t000", CONFIG, curve(CONFIG, end, 0.0, 3.9, 150), origin="baseline")
    found = find(read_results(tmp_path))
    assert found.headline == f"Text loss {verb} nats per token"


def test_single_pair_of_runs_is_compared_but_called_unconfirmed(tmp_path: Path) -> None:
    builder = Builder(tmp_path, sweep_config(confirm={"num_configs": 0})).start()
    builder.trial("t000", CONFIG, curve(CONFIG, 3.0, 0.4, 3.9, 150), origin="baseline")
    builder.trial("t001", CONFIG, curve(CONFIG, 2.0, 0.4, 3.9, 150))
    found = findings(tmp_path)
    assert found.outcome == "unconfirmed"
    said = "Its text loss is 1.00 nats per token lower than trial 0's in one pair of runs."
    assert said in sentence(found, "found")
    assert "partly luck" in sentence(found, "found")
    assert any("switched off" in note for note in found.notes)


@pytest.mark.parametrize(
    "gain, word, tone",
    [
        (0.0, "No:", "poor"),
        (-0.1, "No:", "poor"),
        (0.1, "A little:", "fair"),
        (0.4, "Yes:", "good"),
    ],
)
def test_listening_is_judged_by_audio_gain_and_not_by_text_loss(
    tmp_path: Path, gain: float, word: str, tone: str
) -> None:
    found = pairs(tmp_path, [3.0, 3.1], [2.0, 2.1], gain)
    answer = next(answer for answer in found.answers if answer.key == "listening")
    assert answer.sentence.startswith(word)
    assert answer.tone == tone


@pytest.mark.parametrize(
    "gains, said",
    [
        ((0.23, 0.45), "Yes: ... 0.34 nats per token higher (0.23 to 0.45 over 2 seeds)."),
        ((0.9, 0.04), "A little: ... 0.47 nats per token higher (0.04 to 0.90 over 2 seeds)."),
        ((-0.1, 0.3), "A little: ... 0.10 nats per token higher (−0.10 to 0.30 over 2 seeds)."),
        ((0.1, -0.04), "No: ... 0.03 nats per token higher (−0.04 to 0.10 over 2 seeds)."),
        ((-0.2, -0.1), "No: ... 0.15 nats per token lower (0.10 to 0.20 over 2 seeds)."),
        ((0.297, 0.297), "Yes: ... 0.30 nats per token higher (0.30 to 0.30 over 2 seeds)."),
        ((0.047, 0.9), "Yes: ... 0.47 nats per token higher (0.05 to 0.90 over 2 seeds)."),
        ((0.047, 0.047), "A little: ... 0.05 nats per token higher (0.05 to 0.05 over 2 seeds)."),
        ((0.2949, 0.2949), "A little: ... 0.29 nats per token higher (0.29 to 0.29 over 2 seeds)."),
    ],
)
def test_listening_is_judged_by_the_rounded_figures_shown(
    tmp_path: Path, gains: tuple[float, ...], said: str
) -> None:
    found = sentence(pairs(tmp_path, [3.0, 3.1], [2.0, 2.1], gains), "listening")
    word, figures = said.split(" ... ")
    assert found.startswith(f"{word} after another clip's audio, text loss is {figures}")


def test_the_gain_of_a_single_run_has_no_range(tmp_path: Path) -> None:
    builder = Builder(tmp_path, sweep_config(confirm={"num_configs": 0})).start()
    builder.trial("t000", CONFIG, curve(CONFIG, 3.0, 0.4, 3.9, 150), origin="baseline")
    assert sentence(findings(tmp_path), "listening").endswith("0.40 nats per token higher.")


def test_no_trial_within_the_audio_limit_names_the_setting_to_change(tmp_path: Path) -> None:
    builder = Builder(tmp_path).start()
    for trial_id, audio in (("t000", 5.0), ("t001", 5.5)):
        builder.trial(trial_id, CONFIG, curve(CONFIG, 2.0, 0.4, audio, 150))
    found = findings(tmp_path)
    assert found.outcome == "no_feasible"
    assert "t000, +27.2%" in sentence(found, "found")
    assert "objective.audio_tolerance" in sentence(found, "found")


def test_audio_just_beyond_the_limit_is_shown_with_enough_digits(tmp_path: Path) -> None:
    builder = Builder(tmp_path).start()
    rows = curve(CONFIG, 2.0, 0.4, 1.0503 * BASE[VAL_AUDIO_NLL], 150)
    builder.trial("t000", CONFIG, rows, origin="baseline")
    said = "rise by more than 5.00% (the least: t000, +5.03%)"
    assert said in sentence(findings(tmp_path), "found")


def test_trial_0_without_a_rival_is_not_called_unbeaten(tmp_path: Path) -> None:
    builder = Builder(tmp_path).start()
    builder.trial("t000", CONFIG, curve(CONFIG, 3.0, 0.4, 3.9, 150), origin="baseline")
    builder.trial("t001", CONFIG, curve(CONFIG, 2.0, 0.4, 5.0, 150))  # audio beyond its limit
    said = "is the only one that ran the full budget within the audio limit (one run)."
    assert sentence(findings(tmp_path), "found").endswith(said)
    builder.trial("t002", CONFIG, curve(CONFIG, 3.5, 0.4, 3.9, 150))
    assert sentence(findings(tmp_path), "found").endswith("was not beaten (one run).")


def test_a_gain_that_rounds_to_zero_has_no_sign(tmp_path: Path) -> None:
    found = pairs(tmp_path, [3.0, 3.1], [2.0, 2.1], gain=-0.001)
    listening = next(answer for answer in found.answers if answer.key == "listening")
    assert listening.figure == "0.01 → 0.00"


def test_failed_and_out_of_memory_trials_are_noted_with_their_first_reason(tmp_path: Path) -> None:
    builder = Builder(tmp_path).start()
    ends = {"t000": "failed", "t001": "out_of_memory", "t002": "failed", "t003": "diverged"}
    for trial_id, status in ends.items():
        builder.trial(trial_id, CONFIG, [], status=status, reason=f"{trial_id} said so " * 30)
    notes = find(read_results(tmp_path)).notes
    (failed,) = (note for note in notes if note.startswith("2 trials failed."))
    (full,) = (note for note in notes if note.startswith("1 trial ran out of memory."))
    assert "Reason of t000: t000 said so" in failed and failed.endswith("[...]")
    assert "Reason of t001: t001 said so" in full and len(full) < 260
    assert not any("t003" in note for note in notes)


@pytest.mark.parametrize("stopped_audio, last_audio, said", [
    (3.9, 5.0, True), (5.0, 5.0, False), (3.9, 3.9, False),
])  # fmt: skip
def test_early_stopping_of_all_trials_within_the_audio_limit_is_noted(
    tmp_path: Path, stopped_audio: float, last_audio: float, said: bool
) -> None:
    builder = Builder(tmp_path).start()
    builder.trial("t000", CONFIG, curve(CONFIG, 3.0, 0.1, 3.9, 150), origin="baseline")
    builder.trial("t002", CONFIG, curve(CONFIG, 2.0, 0.1, last_audio, 150))
    rows = [report_row(50, 2.5, 0.1, stopped_audio)]
    builder.trial("t003", CONFIG, rows, status="pruned")
    notes = " ".join(findings(tmp_path).notes)
    assert ("1 within it had been stopped early" in notes) == said


def test_gain_that_is_not_finite_in_one_run_is_reported(tmp_path: Path) -> None:
    found = pairs(tmp_path, [3.0, 3.1], [2.0, 2.1], gain=(0.4, math.nan))
    assert sentence(found, "listening") == "Only 1 of 2 runs ended with a finite audio gain."
