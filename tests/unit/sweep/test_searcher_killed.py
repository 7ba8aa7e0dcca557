"""What the study holds when a sweep's process is killed between two writes to it."""

from pathlib import Path

import optuna
import pytest

from higgs_tune.sweep import study as studies
from tests.sweep_fakes import make_searcher, report


@pytest.mark.parametrize("num_written", [0, 1])
def test_a_kill_while_a_trial_is_resumed_loses_none_of_its_values(
    study, make_config, monkeypatch, num_written
):
    searcher, _, _ = make_searcher(study, make_config())
    searcher.suggest("a")
    for step in (25, 50):
        searcher.on_trial_result("a", report(100 / step, step))
    searcher.cancel_live("interrupted by SIGINT")

    write, written = optuna.Trial.report, []

    def killed(trial, value, step):
        if len(written) == num_written:
            raise KeyboardInterrupt
        written.append(step)
        write(trial, value, step)

    checkpoints = {"t000": (Path("/checkpoint"), 50)}
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Trial, "report", killed)
        with pytest.raises(KeyboardInterrupt):
            make_searcher(study, make_config(), checkpoints)[0].suggest("a2")

    studies.fail_stale(study)
    searcher, _, resumed = make_searcher(study, make_config(), checkpoints)
    assert searcher.suggest("a3")["id"] == "t000"
    assert resumed == [("a3", {25: 4.0, 50: 2.0})]
