"""What the findings say about an unfinished sweep."""

import shutil
from pathlib import Path

import pytest

from higgs_tune.report.findings import comparison, trial_counts
from higgs_tune.report.results import read_results
from higgs_tune.report.summary import summary_text
from tests.unit.report.builder import Builder, curve, report_row, sweep_config, trial_config
from tests.unit.report.test_findings import (
    CONFIG,
    diverged_in_confirm,
    findings,
    pairs,
    sentence,
)


def test_sweep_without_a_full_run_says_so(tmp_path: Path) -> None:
    rows = curve(CONFIG, 2.0, 0.4, 3.9, 100)
    Builder(tmp_path).start().trial("t000", CONFIG, rows, status="pruned", origin="baseline")
    found = findings(tmp_path)
    assert "No trial has run all 150 steps" in sentence(found, "found")
    assert any("Trial 0 ended pruned at step 100" in note for note in found.notes)
    labels = [label for label, _ in comparison(read_results(tmp_path), None)]
    assert labels == ["base", "t000 off, by hand, pruned at 100"]


def test_sweep_cut_short_names_the_leading_trial(tmp_path: Path) -> None:
    builder = Builder(tmp_path).start()
    for trial_id, text, audio, num_steps in (
        ("t000", 4.0, 3.9, 100),
        ("t001", 1.0, 3.9, 50),  # did not get as far
        ("t002", 1.0, 5.0, 100),  # audio beyond its limit
        ("t003", 2.0, 3.9, 100),
    ):
        rows = [report_row(step, text, 0.4, audio) for step in range(0, num_steps + 1, 25)]
        builder.trial(trial_id, CONFIG, rows, status="cancelled")
    found = findings(tmp_path)
    said = "to step 100, t003 is ahead with a text loss of 2.00."
    assert sentence(found, "found").endswith(said)
    assert "t003 ahead, cancelled at 100" in summary_text(read_results(tmp_path), found)
    assert "--resume continues" in found.notes[0]
    builder.trial("t004", CONFIG, curve(CONFIG, 3.0, 0.4, 5.0, 150))
    assert "ahead" not in summary_text(read_results(tmp_path), findings(tmp_path))


@pytest.mark.parametrize(
    "status, said",
    [
        ("cancelled", ["Trial 0 was cancelled at step 50 with a text loss of 4.50."]),
        ("diverged", ["Trial 0 ended diverged at step 50 with a text loss of 4.50."]),
        (None, []),  # still running
    ],
)
def test_early_end_of_trial_0_is_noted_unless_it_still_runs(
    tmp_path: Path, status: str | None, said: list[str]
) -> None:
    rows = [report_row(50, 4.5, 0.1, 3.9)]
    Builder(tmp_path).start().trial("t000", CONFIG, rows, status=status, origin="baseline")
    assert [note for note in findings(tmp_path).notes if note.startswith("Trial 0")] == said


def test_sweep_without_any_result_says_so(tmp_path: Path) -> None:
    Builder(tmp_path, base=None).start()
    found = findings(tmp_path)
    assert (found.outcome, found.notes) == ("no_trials", ())
    assert summary_text(read_results(tmp_path), found).startswith("Sweep quick: No trial")


def test_no_result_yet_is_said_only_while_a_trial_may_still_report(tmp_path: Path) -> None:
    builder = Builder(tmp_path).start()
    builder.trial("t000", CONFIG, [], status="failed", reason="RuntimeError: no")
    found = findings(tmp_path)
    assert (found.outcome, found.headline) == ("no_trials", "No trial reported a result")
    builder.trial("t001", CONFIG, [], status=None)
    assert findings(tmp_path).headline == "No trial has reported a result yet"


def test_interrupted_sweep_counts_its_unfinished_trials(tmp_path: Path) -> None:
    builder = Builder(tmp_path).start()
    builder.trial("t000", CONFIG, curve(CONFIG, 3.0, 0.1, 3.9, 150), origin="baseline")
    builder.trial("t001", CONFIG, curve(CONFIG, 3.0, 0.1, 3.9, 50), status="cancelled")
    builder.trial("t002", CONFIG, [], status=None)
    found = findings(tmp_path)
    assert "1 running or lost, 1 cancelled" in found.notes[0]
    assert trial_counts(read_results(tmp_path)).startswith("3 in the search: 1 ran to the end")


def test_each_kind_of_reason_for_cancelled_trials_is_noted(tmp_path: Path) -> None:
    builder = Builder(tmp_path).start()
    given_up = "Ray Tune gave it up; --resume goes on with it: ActorDiedError"
    ends = [given_up, "interrupted by SIGINT", f"{given_up} of another process"]
    for number, reason in enumerate(ends):
        builder.trial(f"t{number:03d}", CONFIG, [], status="cancelled", reason=reason)
    found = findings(tmp_path)
    assert "The sweep is not finished: 3 cancelled" in found.notes[0]
    assert f"2 trials cancelled. Reason of t000: {given_up}" in found.notes
    assert "1 trial cancelled. Reason of t001: interrupted by SIGINT" in found.notes


@pytest.mark.parametrize(
    "status, said", [("cancelled", "1 cancelled"), (None, "1 running or lost")]
)
def test_unfinished_confirm_run_is_noted(tmp_path: Path, status: str | None, said: str) -> None:
    pairs(tmp_path, [3.0, 3.1], [2.0, 2.1])
    builder = Builder(tmp_path)
    builder.trial("t002", CONFIG, curve(CONFIG, 2.5, 0.4, 3.9, 150))
    for seed in range(2):
        config, ends = trial_config(seed=100 + seed), "completed" if seed == 0 else status
        rows = curve(config, 1.0, 0.4, 3.9, 150)[: None if seed == 0 else 3]
        run_id = f"c{20 + seed:03d}"
        builder.trial(run_id, config, rows, origin="confirm", confirms="t002", status=ends)
    found = findings(tmp_path)
    assert found.choice is not None
    assert (found.choice.trial.id, found.choice.confirm) == ("t001", "done")
    note = next(note for note in found.notes if note.startswith("Unfinished confirm runs"))
    assert said in note
    assert "is not confirmed" in note
    assert "--resume" in note


def test_unfinished_confirm_run_that_is_no_longer_needed_is_not_noted(tmp_path: Path) -> None:
    pairs(tmp_path, [3.0, 3.1], [2.0, 2.1])
    config = trial_config(seed=102)  # a third seed, from before confirm.num_seeds was lowered
    options = {"origin": "confirm", "status": "cancelled"}
    Builder(tmp_path).trial("c012", config, [], confirms="t001", **options)
    notes = findings(tmp_path).notes
    assert not [note for note in notes if note.startswith("Unfinished confirm runs")]


def test_a_finished_confirm_stage_needs_no_note(tmp_path: Path) -> None:
    found = pairs(tmp_path, [3.0, 3.1], [2.0, 2.1])
    short = "The search ended after 2 of 16 trials."
    assert found.notes == (short,)
    shutil.rmtree(tmp_path / "trials" / "c010" / "adapter")  # of the run to be exported
    lost = "c010 left no adapter; train it again to get one."
    assert findings(tmp_path).notes == (short, lost)


def test_choice_by_the_search_alone_is_noted_and_excludes_no_trial(tmp_path: Path) -> None:
    diverged_in_confirm(tmp_path, {"t001": (0, 1)})
    (tmp_path / "trials" / "c000" / "status.json").unlink()  # a confirm run of trial 0 still runs
    found = findings(tmp_path)
    assert found.choice is not None and found.choice.trial.id == "t001"
    said = "The confirm stage has not finished; the choice rests on the search alone."
    assert said in found.notes
    assert not [note for note in found.notes if "cannot be chosen" in note]


def test_search_that_ended_before_its_last_trial_is_noted(tmp_path: Path) -> None:
    for name, num_trials in (("short", 5), ("whole", 2)):
        sweep = sweep_config(tune={"num_trials": num_trials}, confirm={"num_configs": 0})
        builder = Builder(tmp_path / name, sweep).start()
        for trial_id in ("t000", "t001"):
            builder.trial(trial_id, CONFIG, curve(CONFIG, 3.0, 0.4, 3.9, 150))
    said = "The search ended after 2 of 5 trials."
    assert said in findings(tmp_path / "short").notes
    assert not [n for n in findings(tmp_path / "whole").notes if n.startswith("The search ended")]
    Builder(tmp_path / "short").trial("t002", CONFIG, [], status=None)
    assert not [n for n in findings(tmp_path / "short").notes if n.startswith("The search ended")]


def test_a_search_that_mostly_diverged_says_what_to_lower(tmp_path: Path) -> None:
    builder = Builder(tmp_path).start()
    ends = ["completed", "diverged", None, "cancelled"]  # half of those that ended diverged
    for number, status in enumerate(ends):
        builder.trial(
            f"t{number:03}", CONFIG, [], status=status, reason="a gradient was not finite"
        )
    assert not any("Lower" in note for note in findings(tmp_path).notes)
    builder.trial("t004", CONFIG, [], status="diverged", reason="a gradient was not finite")
    assert (
        "2 of 3 trials diverged. Reason of t001: a gradient was not finite. "
        "Lower space.learning_rate."
    ) in findings(tmp_path).notes
