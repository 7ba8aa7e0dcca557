"""A crash while a population copies a trial, between the changes of the study and of the files."""

import json

import optuna
import pytest

from higgs_tune.files import read_json_lines
from higgs_tune.sweep import records
from higgs_tune.sweep import study as studies
from higgs_tune.sweep.records import TrialFiles
from higgs_tune.sweep.seats import CHECKPOINT_INFO
from tests.sweep_fakes import make_searcher, report


class Crash(BaseException):
    """Stands for the end of the process."""


def checkpoint(files, folder, name, step):
    folder.mkdir()
    (folder / "weights").write_text(f"{name} at {step}")
    (folder / CHECKPOINT_INFO).write_text(json.dumps({"trial_id": name, "step": step}))
    files.checkpoint(name, folder)


def copy_and_crash(study, config, tmp_path, on_copy):
    """Crash while t003 becomes a copy of t002 at step 50; returns what a new process finds."""
    files = TrialFiles(tmp_path)
    searcher, _, _ = make_searcher(study, config, on_copy=lambda *copy: on_copy(files, *copy))
    for tune_id, text in (("a", None), ("b", None), ("c", 3.0), ("d", 5.0)):
        searcher.suggest(tune_id)
        record = searcher.live[tune_id].record
        files.start(record)
        if text is not None:
            searcher.on_trial_result(tune_id, report(text, 50))
            files.result(record.trial_id, report(text, 50) | {"account": {"of": record.trial_id}})
            checkpoint(files, tmp_path / tune_id, record.trial_id, 50)
    rates = searcher._tune_config(searcher.live["c"], "")["rates"]
    with pytest.raises(Crash):
        searcher.copied("d", "t002", {**rates, "learning_rate": 2e-3}, 50)
    studies.fail_stale(study)
    record = studies.record_of(studies.unfinished(study)[3])
    assert record is not None
    return TrialFiles(tmp_path), record


def crash(*_):
    raise Crash


@pytest.mark.parametrize("torn", ["before the files", "before the checkpoint"])
def test_a_resumed_sweep_finishes_a_copy_that_the_study_already_has(
    study, make_config, tmp_path, monkeypatch, torn
):
    def on_copy(files, record, donor_id):
        if torn == "before the checkpoint":
            monkeypatch.setattr(TrialFiles, "checkpoint", crash)
            files.copied(record, donor_id)
        raise Crash

    with monkeypatch.context() as monkeypatch:
        files, record = copy_and_crash(study, make_config(), tmp_path, on_copy)
    assert [change.copied_from for change in record.config.schedule] == ["t002"]
    weights = tmp_path / "trials/t003/adapter/weights"
    assert weights.read_text() == "t003 at 50"
    files.mend_copy(record)
    assert weights.read_text() == "t002 at 50"
    folder = tmp_path / "trials/t003"
    assert [line["val/text/nll"] for line in read_json_lines(folder / "metrics.jsonl")] == [3.0]
    assert records.read_json(folder / "config.json") == {
        **record.to_dict(),
        "account": {"of": "t002"},
    }
    again, _, _ = make_searcher(study, make_config(), {"t003": files.checkpoint_of("t003")})
    resumed = [again.suggest(name) for name in "efgh"][3]
    assert resumed["trial"] == record.config.model_dump(mode="json")
    assert again.live["h"].trial is not None
    assert study.trials[again.live["h"].trial.number].intermediate_values == {50: 3.0}


def test_a_finished_copy_is_left_alone(study, make_config, tmp_path):
    def on_copy(files, record, donor_id):
        files.copied(record, donor_id)
        raise Crash

    files, record = copy_and_crash(study, make_config(), tmp_path, on_copy)
    before = (tmp_path / "trials/t003/adapter").stat().st_ino
    files.mend_copy(record)
    assert (tmp_path / "trials/t003/adapter").stat().st_ino == before
    checkpoint(files, tmp_path / "later", "t003", 75)
    files.mend_copy(record)
    assert (tmp_path / "trials/t003/adapter/weights").read_text() == "t003 at 75"


def test_a_crash_before_the_study_has_the_copy_leaves_the_trial_as_it_was(
    study, make_config, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr("optuna.Trial.report", _report_but_not_after(2))
        files, record = copy_and_crash(study, make_config(), tmp_path, crash)
    assert record.config.schedule == ()
    files.mend_copy(record)
    assert (tmp_path / "trials/t003/adapter/weights").read_text() == "t003 at 50"


def _report_but_not_after(count):
    original, calls = optuna.Trial.report, []

    def patched(self, value, step):
        calls.append(step)
        if len(calls) > count:
            raise Crash
        original(self, value, step)

    return patched
