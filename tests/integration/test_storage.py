"""A sweep whose study is in a database."""

import pytest
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage

from higgs_tune.errors import SweepError
from higgs_tune.sweep import storage
from tests.integration.test_sweep import run, trials_of

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]


def test_a_database_that_goes_away_ends_the_sweep_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "RETRY_DELAYS_S", (0.01, 0.01))
    write, calls = RDBStorage.set_trial_intermediate_value, []

    def away(self, *args):
        calls.append(args)
        if len(calls) == 4 or len(calls) > 8:  # once for a moment, then for good
            raise StorageInternalError("An exception is raised during the commit.")
        write(self, *args)

    tune = {"num_trials": 5, "seed": 3, "slots_per_worker": 1}
    tune["storage"] = f"sqlite:///{tmp_path}/studies.db"
    with monkeypatch.context() as patch:
        patch.setattr(RDBStorage, "set_trial_intermediate_value", away)
        with pytest.raises(SweepError, match=r"tune\.storage .*studies\.db.*--resume"):
            run(tmp_path, tune=tune)
    assert len(calls) == 8 + 3
    ended = [trial["status"]["status"] for trial in trials_of(tmp_path / "s").values()]
    assert "cancelled" in ended
    outcome = run(tmp_path, resume=True, tune=tune)
    assert (outcome.exit_code, outcome.num_trials) == (0, 5)
    trials = trials_of(tmp_path / "s")
    assert len(trials) == 5
    for trial in trials.values():
        assert trial["status"]["status"] in ("completed", "pruned")
        steps = [line["step"] for line in trial["metrics"]]
        assert steps == list(range(25, trial["status"]["step"] + 1, 25))
