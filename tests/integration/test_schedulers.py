"""Whole sweeps under each scheduler, with a loop whose learning curves are known."""

import errno
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from higgs_tune.config import TrialConfig
from higgs_tune.errors import SweepError
from higgs_tune.sweep import study as studies
from higgs_tune.sweep.records import TrialFiles
from tests.integration.test_sweep import run, study_of, trials_of

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]
EVERY = {name: {"name": name} for name in ("hyperband", "median", "pbt")}


def tune(scheduler: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"num_trials": 8, "seed": 3, "scheduler": scheduler, **changes}


def trained(results: Path, trial_id: str) -> list[list[Any]]:
    """The intervals behind a trial's adapter: seed, last step, rate; each step was done once."""
    state = results / "trials" / trial_id / "adapter" / "training_state.json"
    steps = json.loads(state.read_text())["trained"]
    assert [step for _, step, _ in steps] == list(range(1, len(steps) + 1))
    intervals = steps[24::25]
    for seed, step, rate in steps:
        interval = intervals[(step - 1) // 25]
        assert [seed, rate] == [interval[0], interval[2]]
    return intervals


def uninterrupted(config: TrialConfig, last_step: int) -> list[list[Any]]:
    """The same of a run of this configuration that nothing ever stopped."""
    return [[config.seed, step, config.learning_rate] for step in range(25, last_step + 1, 25)]


def values_at(trials: dict[str, dict[str, Any]], step: int) -> dict[str, float]:
    return {
        name: line["val/text/nll"]
        for name, trial in trials.items()
        for line in trial["metrics"]
        if line["step"] == step
    }


def config_of(trial: dict[str, Any]) -> TrialConfig:
    return TrialConfig.model_validate(trial["record"]["config"])


def check_nobody_was_lost(results: Path, num_trials: int = 8) -> None:
    """Every trial ended well, and trained each of its intervals once."""
    trials = trials_of(results)
    assert sorted(trials) == [f"t{n:03d}" for n in range(num_trials)]
    for name, trial in trials.items():
        assert trial["status"]["status"] in ("completed", "pruned"), trial["status"]
        steps = list(range(25, trial["status"]["step"] + 1, 25))
        assert [line["step"] for line in trial["metrics"]] == steps
        assert [step for _, step, _ in trained(results, name)] == steps


@pytest.mark.parametrize("num_slots", [1, 2, 4])
def test_hyperband_halves_full_brackets_whatever_the_number_of_slots(tmp_path, num_slots):
    outcome = run(tmp_path, tune=tune(EVERY["hyperband"], slots_per_worker=num_slots))
    check_nobody_was_lost(outcome.results)
    trials = trials_of(outcome.results)
    # 6 reports, factor 3: a bracket of 5 that is cut to 2 after 2 reports, then one of 3 that is not.
    first = {f"t{n:03d}" for n in range(5)}
    at_rung = sorted(values_at(trials, 50)[name] for name in first)
    for name, trial in trials.items():
        survives = name not in first or values_at(trials, 50)[name] <= at_rung[1]
        assert trial["status"]["status"] == ("completed" if survives else "pruned")
        assert trial["status"]["step"] == (150 if survives else 50)
        expected = uninterrupted(config_of(trial), trial["status"]["step"])
        assert trained(outcome.results, name) == expected
        told = studies.latest(study_of(outcome).trials)[int(name[1:])]
        assert told.state == (TrialState.COMPLETE if survives else TrialState.PRUNED)
        assert told.intermediate_values == {
            line["step"]: line["val/text/nll"] for line in trial["metrics"]
        }
    assert len(study_of(outcome).trials) == 8  # a paused trial was neither told nor lost


@pytest.mark.parametrize("name", ["hyperband", "pbt"])
def test_the_same_seed_gives_the_same_trials(tmp_path, name):
    scheduler = EVERY[name]
    left, right = (
        trials_of(
            run(tmp_path / side, tune=tune(scheduler, num_trials=7, slots_per_worker=3)).results
        )
        for side in ("left", "right")
    )
    assert list(left) == list(right)
    for trial_id in left:
        assert left[trial_id]["record"] == right[trial_id]["record"]
        for part in ("status", "step", "reason"):
            assert left[trial_id]["status"][part] == right[trial_id]["status"][part]


@pytest.mark.parametrize("name", EVERY)
def test_trials_that_diverge_hold_nobody_up(tmp_path, name):
    outcome = run(
        tmp_path,
        space={"learning_rate": {"low": 1e-2, "high": 0.3}},
        tune=tune(EVERY[name], slots_per_worker=2, seed=1),
    )
    statuses = [trial["status"]["status"] for trial in trials_of(outcome.results).values()]
    assert set(statuses) <= {"completed", "pruned", "diverged"}
    assert "diverged" in statuses and "completed" in statuses


def test_the_median_rule_stops_after_the_grace(tmp_path):
    outcome = run(tmp_path, tune=tune({"name": "median", "min_samples": 2}, num_trials=10))
    check_nobody_was_lost(outcome.results, 10)
    trials = trials_of(outcome.results)
    ended = {name: trial["status"] for name, trial in trials.items()}
    pruned = [name for name, status in ended.items() if status["status"] == "pruned"]
    assert pruned
    assert all(ended[name]["step"] >= 50 for name in pruned)
    best = min(values_at(trials, 50), key=values_at(trials, 50).__getitem__)
    assert ended[best]["status"] == "completed"


@pytest.fixture(scope="module")
def population(tmp_path_factory):
    """Two baselines and six others, compared at steps 50 and 100, in four slots."""
    folder = tmp_path_factory.mktemp("population")
    return run(
        folder,
        tune=tune({"name": "pbt", "quantile_fraction": 0.3}),
        confirm={"num_configs": 1, "num_seeds": 1},
    )


def test_a_copy_goes_on_from_its_donors_weights_at_another_rate(population):
    trials = {n: t for n, t in trials_of(population.results).items() if n[0] == "t"}
    assert {t["status"]["status"] for t in trials.values()} == {"completed"}
    steps = []
    for name, trial in trials.items():
        config = config_of(trial)
        expected, seed = [], config.seed
        schedule = list(config.schedule)
        steps += [change.step for change in schedule]
        done = trained(population.results, name)
        assert [step for _, step, _ in done] == [25, 50, 75, 100, 125, 150]
        if not schedule:
            assert done == uninterrupted(config, 150)
            continue
        last = schedule[-1]
        donor = trained(population.results, last.copied_from)
        shared = [interval for interval in donor if interval[1] <= last.step]
        own = [[seed, step, last.learning_rate] for step in range(last.step + 25, 151, 25)]
        expected = shared + own
        assert done == expected
        before = config.rates_at(last.step - 1)["learning_rate"]
        assert last.learning_rate != before
        assert 1e-4 <= last.learning_rate <= 3e-3
    assert set(steps) == {50, 100}


def test_the_baselines_stay_as_they_are(population):
    trials = trials_of(population.results)
    for name in ("t000", "t001"):
        assert config_of(trials[name]).schedule == ()
    copied = [c.copied_from for t in trials.values() for c in config_of(t).schedule]
    assert not {"t000", "t001"} & set(copied)


def test_a_copied_trial_is_told_as_no_single_configuration(population):
    study = study_of(population)
    newest = studies.latest(study.trials)
    assert sorted(newest) == list(range(8))
    given_up = [trial for trial in study.trials if trial.state == TrialState.PRUNED]
    num_copies = sum("became a copy of" in trial.user_attrs["reason"] for trial in given_up)
    assert num_copies == len(given_up) == 4  # two at each of two steps
    assert len(study.trials) == 8 + 4
    for index, trial in newest.items():
        record = studies.record_of(trial)
        assert record is not None
        assert trial.state == TrialState.COMPLETE
        assert bool(record.config.schedule) == (index > 1 and not trial.params)
        assert sorted(trial.intermediate_values) == [25, 50, 75, 100, 125, 150]
    best = min(newest.values(), key=lambda trial: trial.values[0])
    assert population.best_trial == studies.record_of(best).trial_id


def test_the_confirm_stage_repeats_the_schedule(population):
    trials = trials_of(population.results)
    confirmed = next(
        t for n, t in trials.items() if t["record"]["confirms"] == population.best_trial
    )
    config = config_of(confirmed)
    assert config.schedule == config_of(trials[population.best_trial]).schedule
    name = confirmed["record"]["trial_id"]
    assert trained(population.results, name) == [
        [config.seed, step, config.rates_at(step - 25)["learning_rate"]]
        for step in range(25, 151, 25)
    ]


@pytest.mark.parametrize("name", EVERY)
def test_an_interrupted_sweep_goes_on(tmp_path, monkeypatch, name):
    written = []

    def result(self, trial_id, content):
        written.append(trial_id)
        if len(written) > 14:  # some wait, some train, some are to come
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, trial_id, content)

    original = TrialFiles.result
    sections = {"tune": tune(EVERY[name], slots_per_worker=3)}
    with monkeypatch.context() as patch:
        patch.setattr(TrialFiles, "result", result)
        with pytest.raises(SweepError, match=r"No space left on device.*--resume"):
            run(tmp_path, **sections)
    outcome = run(tmp_path, resume=True, **sections)
    check_nobody_was_lost(outcome.results)


@pytest.mark.parametrize("name", ["hyperband", "pbt"])
def test_no_trial_is_lost_when_the_worker_dies(tmp_path, name):
    pids = tmp_path / "pids"

    def kill_once() -> None:
        while len(list(tmp_path.glob("s/trials/*/adapter"))) < 6:
            time.sleep(0.02)
        os.kill(int(pids.read_text().splitlines()[0]), signal.SIGKILL)

    killer = threading.Thread(target=kill_once, daemon=True)
    killer.start()
    outcome = run(
        tmp_path,
        base={"path": f"pid:{pids}"},
        tune=tune(EVERY[name], slots_per_worker=2),
    )
    assert len(pids.read_text().splitlines()) == 2
    check_nobody_was_lost(outcome.results)


@pytest.mark.parametrize("name", ["hyperband", "pbt"])
def test_several_workers_share_paused_trials(tmp_path, name):
    workers = {"num_workers": 2, "slots_per_worker": 2, "cpus_per_worker": 1}
    check_nobody_was_lost(run(tmp_path, tune=tune(EVERY[name], **workers)).results)
