"""Errors of Tune that end a stage, and what counts as the same base and the same data."""

import io
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from ray.exceptions import OutOfMemoryError

from higgs_tune.errors import SweepError
from higgs_tune.files import write_json
from higgs_tune.sweep import stages
from higgs_tune.sweep.control import Control
from higgs_tune.sweep.live import Display
from higgs_tune.sweep.records import TrialFiles, read_json
from higgs_tune.sweep.stages import Sweep, difference
from tests.sweep_fakes import make_searcher

KNOWN = {"content_hash": "aa", "metrics": {"val/text/nll": 9.0, "val/text/audio_gain": 0.001}}


@pytest.fixture
def run(study, make_config, tmp_path, monkeypatch):
    """Runs a stage in which a trial starts and Tune then fails; returns the error that ended it."""

    def run_until(error, given=None, stage="search", **tune):
        def fit(tuner):
            (callback,) = tuner.callbacks
            config = searcher.suggest("a")
            callback.on_trial_start(0, [], SimpleNamespace(trial_id="a", config=config))
            raise error

        def create(_, *, tune_config, run_config):
            if given is not None:
                given.update(tune=tune_config, run=run_config)
            tuner = SimpleNamespace(callbacks=run_config.callbacks)
            tuner.fit = lambda: fit(tuner)
            return tuner

        monkeypatch.setattr(stages, "Tuner", create)
        control = Control()
        display = Display(io.StringIO())
        config = make_config(tune=tune)
        searcher, _, _ = make_searcher(study, config)
        workers = SimpleNamespace(begin_stage=lambda: None, close=lambda: None)
        Sweep(config, tmp_path, workers, control, display).run(stage, searcher, None)
        return control.error

    return run_until


def unexpected(cause):
    """An error wrapped as Tune's actor manager wraps one that it does not know."""
    try:
        raise RuntimeError(f"Caught unexpected exception: {cause}") from cause
    except RuntimeError as error:
        return error


def test_a_trial_that_ray_kills_for_memory_ends_the_sweep_and_can_be_resumed(run, tmp_path):
    error = run(
        unexpected(OutOfMemoryError("Task was killed due to the node running low on memory."))
    )
    assert isinstance(error, SweepError)
    assert "memory ran out" in str(error) and "--resume" in str(error)
    assert str(error).endswith("Ray says: Task was killed due to the node running low on memory.")
    status = read_json(tmp_path / "trials" / "t000" / "status.json")
    assert status["status"] == "cancelled"


@pytest.mark.parametrize(("num_workers", "trials"), [(1, 6), (2, 10)])
def test_tune_gets_trials_beyond_the_slots_and_reuses_their_processes(run, num_workers, trials):
    """With four slots, two more trials wait at a single worker, one at each of several."""
    given = {}
    settings = {"num_workers": num_workers, "slots_per_worker": 4, "max_failures": 3}
    run(unexpected(OutOfMemoryError("?")), given, **settings)
    assert given["tune"].max_concurrent_trials == trials
    assert given["tune"].reuse_actors
    assert given["run"].failure_config.max_failures == 3


@pytest.mark.parametrize(("stage", "number"), [("search", 4), ("confirm", 1)])
def test_only_a_population_keeps_checkpoints_for_copies(run, stage, number):
    given = {}
    run(unexpected(OutOfMemoryError("?")), given, stage, scheduler={"name": "pbt"})
    (callback,) = given["run"].callbacks
    assert callback._num_checkpoints == number


def test_any_other_unexpected_error_is_raised(run):
    with pytest.raises(RuntimeError, match="Caught unexpected"):
        run(unexpected(ValueError("?")))


def test_a_resumed_sweep_shows_the_base_and_the_trials_that_ended(make_config, record, tmp_path):
    files, config = TrialFiles(tmp_path), make_config()
    first, second = record, replace(record, trial_id="t001", number=1)
    for each, status in ((first, "completed"), (second, "cancelled")):
        files.start(each)
        files.result(each.trial_id, {"step": 25, "val/text/nll": 2.0})
        files.end(each.trial_id, status, None, True)
    write_json(tmp_path / "base.json", {"metrics": {"val/text/nll": 8.0}})
    display = Display(io.StringIO())
    sweep = Sweep(config, tmp_path, SimpleNamespace(), Control(), display)
    sweep.show_earlier()
    assert display.board.base == {"val/text/nll": 8.0}
    # the other one continues, and is shown when it starts
    assert list(display.board.rows) == ["t000"]
    row = display.board.rows["t000"]
    assert (row.state, row.is_feasible, row.last["val/text/nll"]) == ("completed", True, 2.0)


def found(content_hash: str = "aa", **metrics: float) -> dict[str, object]:
    changed = {f"val/text/{name}": value for name, value in metrics.items()}
    return {"content_hash": content_hash, "metrics": KNOWN["metrics"] | changed}


def test_rounding_differences_between_devices_are_ignored():
    assert difference(KNOWN, found()) is None
    assert difference(KNOWN, found(nll=9.08, audio_gain=-0.008)) is None


def test_bases_are_compared_only_by_losses_that_were_finite():
    beside = {"val/audio/nll_per_code": None, "tokens_per_s": 100.0}  # null in base.json
    known = KNOWN | {"metrics": KNOWN["metrics"] | beside}
    assert difference(known, found()) is None


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (found("bb"), "its dataset has content_hash bb, needed aa"),
        (found(nll=9.2), "its base has val/text/nll 9.2000, needed 9.0000"),
        (found(nll=math.nan), "its base has val/text/nll nan, needed 9.0000"),
        (found(audio_gain=0.02), "its base has val/text/audio_gain 0.0200, needed 0.0010"),
        ({"content_hash": "aa", "metrics": {}}, "its base has val/text/nll nan, needed 9.0000"),
    ],
)
def test_a_difference_is_described_with_both_values(other, words):
    assert difference(KNOWN, other) == words
