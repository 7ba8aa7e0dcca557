"""The simulated sweep against closed forms and properties that every sweep has."""

import json
import sys

import pytest
import simulate
from sweep_model import Costs, Failures, Search
from sweep_model import simulate as run

from higgs_tune.config import SchedulerSettings
from higgs_tune.errors import DataError

FULL = SchedulerSettings(name="none")
ASHA = SchedulerSettings(name="asha", grace_fraction=0.25, reduction_factor=3)
COSTS = Costs((0.1, 0.12, 0.15, 0.2), 60.0, 0.5, 0.04, 10.0)
FREE = Costs((0.1, 0.12, 0.15, 0.2), 60.0, 0.5, 0.0, 10.0)


@pytest.mark.parametrize("num_trials", [4, 12, 14])
def test_the_time_on_one_gpu_has_a_closed_form(num_trials):
    outcome = run(COSTS, Search(num_trials, 400, 100, FULL), 1)
    whole, rest = divmod(num_trials, 4)
    packs = [4] * whole + ([rest] if rest else [])
    expected = 60.0 + sum(k * 0.04 + 0.5 + 4 * 110 * COSTS.step_s[k - 1] for k in packs)
    assert outcome.makespan_s == pytest.approx(expected)
    assert outcome.steps_kept == outcome.steps_done == 400 * num_trials
    assert outcome.num_stopped == outcome.num_failures == outcome.steps_lost == 0


def test_many_gpus_share_equal_trials_evenly():
    outcome = run(FREE, Search(64, 400, 100, FULL), 8)
    assert outcome.makespan_s == pytest.approx(60.0 + 2 * (0.5 + 4 * 110 * 0.2))


@pytest.mark.parametrize("num_trials", [1, 7, 30, 100])
@pytest.mark.parametrize("slots", [1, 4])
def test_more_gpus_are_never_slower(num_trials, slots):
    costs = Costs(FREE.step_s[:slots], 60.0, 0.5, 0.0, 10.0)
    search = Search(num_trials, 400, 100, FULL)
    spans = [run(costs, search, gpus).makespan_s for gpus in range(1, 12)]
    assert spans == sorted(spans, reverse=True)
    assert spans[0] > spans[-1] or num_trials == 1


@pytest.mark.parametrize("scheduler", [FULL, ASHA])
@pytest.mark.parametrize("seed", range(5))
def test_steps_lost_to_failures_are_repeated_and_cost_time(scheduler, seed):
    search = Search(40, 400, 100, scheduler)
    outcome = run(COSTS, search, 3, failures=Failures(20.0, 30.0), seed=seed)
    assert outcome.num_failures > 0 and outcome.steps_lost > 0
    assert outcome.steps_done == pytest.approx(outcome.steps_kept + outcome.steps_lost)
    assert 0 < outcome.occupancy < 1
    if scheduler is FULL:
        assert outcome.steps_kept == 40 * 400
        assert outcome.makespan_s > run(COSTS, search, 3, seed=seed).makespan_s


def test_early_stopping_saves_steps_and_time():
    search = Search(60, 400, 100, ASHA)
    outcome = run(COSTS, search, 2)
    assert 20 < outcome.num_stopped < 60
    assert outcome.steps_kept < 60 * 400
    assert outcome.makespan_s < run(COSTS, Search(60, 400, 100, FULL), 2).makespan_s


def test_a_serial_driver_limits_the_sweep():
    slow = Costs((0.001,), 0.0, 0.0, 2.0, 0.0)
    assert run(slow, Search(50, 100, 100, FULL), 64).makespan_s == pytest.approx(50 * 2.0 + 0.1)


def test_num_steps_must_be_a_multiple_of_the_report_interval():
    with pytest.raises(ValueError, match="multiple"):
        Search(1, 150, 100, FULL)


PACKS = [
    {"tokens": 100, "adapters": 1, "ours": {"ms": 10.0}, "stock": {"ms": 30.0}},
    {"tokens": 100, "adapters": 4, "ours": {"ms": 16.0}, "stock": {"ms": 32.0}},
    {"tokens": 400, "adapters": 1, "ours": {"ms": 99.0}, "stock": {"ms": 99.0}},
]


def test_step_times_come_from_measured_packs():
    ours, stock_s = simulate.step_times(PACKS, 100)
    assert ours == {1: 0.010, 4: 0.016} and stock_s == pytest.approx(0.031)
    assert simulate.table_of(ours, 4) == pytest.approx((0.010, 0.012, 0.014, 0.016))
    with pytest.raises(SystemExit, match="up to 4"):
        simulate.table_of(ours, 8)
    with pytest.raises(SystemExit, match="several lengths"):
        simulate.step_times(PACKS, None)


def test_the_script_writes_figures_and_a_picture(tmp_path, monkeypatch):
    steps, fixed, out = (tmp_path / name for name in ("steps.json", "fixed.json", "out.json"))
    steps.write_text(json.dumps({"packs": PACKS}))
    ours = {"command_to_first_step_s": 12.0, "between_s": 0.3}
    strong = {"command_to_first_step_s": 11.0, "between_s": 0.9}
    fixed.write_text(json.dumps({"ours": ours, "strong": strong}))
    options = [f"--steps={steps}", "--tokens=100", f"--fixed={fixed}", "--slots=4", "--gpus=1,2"]
    monkeypatch.setattr(sys, "argv", ["simulate.py", *options, "--trials=10", f"--out={out}"])
    simulate.main()
    result = json.loads(out.read_text())
    assert result["simulated"] is True and result["assumed"] == ["ask_tell_s", "validation_steps"]
    assert result["costs"]["stock"]["between_s"] == 0.9
    assert [result["costs"][way]["start_s"] for way in ("packed", "stock")] == [12.0, 11.0]
    assert "shared" not in result["costs"]
    spans = {(run["way"], run["gpus"]): run["makespan_h"] for run in result["runs"]}
    assert spans["packed", 1] < spans["alone", 1] < spans["stock", 1]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_speedup_is_over_stock_processes_that_share_a_gpu(tmp_path, monkeypatch, capsys):
    steps = tmp_path / "steps.json"
    packs = [
        {"adapters": 1, "ours": {"ms": 10.0}, "stock": {"ms": 12.0}},
        {"adapters": 4, "ours": {"ms": 16.0}, "stock": {"ms": 12.0}},
    ]
    shared = {"status": "ok", "processes": 4, "ms_per_adapter": 6.0}
    assert simulate.shared_steps({"shared": shared}, 0.012) == {1: 0.012, 4: 0.024}
    assert simulate.shared_steps({"shared": {"status": "out_of_memory"}}, 0.012) == {}
    steps.write_text(json.dumps({"packs": packs, "shared": shared}))
    options = [f"--steps={steps}", "--slots=4", "--gpus=1", "--trials=400", "--ask-tell=0"]
    options += ["--failures=0", "--scheduler=none", f"--out={tmp_path / 'out.json'}"]
    monkeypatch.setattr(sys, "argv", ["simulate.py", *options])
    simulate.main()
    result = json.loads((tmp_path / "out.json").read_text())
    hours = {run["way"]: run["makespan_h"] for run in result["runs"]}
    assert hours["packed"] < hours["shared"] < hours["stock"]
    assert float(capsys.readouterr().out.split("|")[-1]) == round(
        hours["shared"] / hours["packed"], 2
    )


def test_figures_of_another_benchmark_are_refused(tmp_path, monkeypatch):
    steps = tmp_path / "steps.json"
    steps.write_text(json.dumps({"ways": {}}))
    with pytest.raises(DataError, match="has no packs; is it from the right benchmark"):
        simulate.read(steps, "packs")
    steps.write_text("{")
    with pytest.raises(DataError, match=r"steps\.json: "):
        simulate.read(steps, "packs")
