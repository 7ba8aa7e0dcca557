"""Where the workers' time went."""

import json
from pathlib import Path

from higgs_tune.report.build import build_report
from higgs_tune.report.results import read_results
from higgs_tune.report.workers import workers_sentence
from higgs_tune.sweep.worker.meter import Meter
from tests.unit.report.builder import Builder


def figures_of(train_s: float, wait_s: float) -> dict[str, float]:
    meter = Meter()
    meter.add({"train_s": 0.0, "validate_s": 10.0}, busy=4, wanted=4)
    meter.add({"wait_s": wait_s}, busy=4, wanted=4)
    meter.add({"train_s": train_s, "validate_s": 0.0}, busy=4, wanted=4)
    return meter.figures()


def test_worker_shares_are_of_the_total_time_of_all_workers(tmp_path: Path) -> None:
    Builder(tmp_path).start()
    both = {"worker-0": figures_of(180.0, 0.0), "worker-1": figures_of(170.0, 30.0)}
    (tmp_path / "workers.json").write_text(json.dumps(both))
    sentence = workers_sentence(read_results(tmp_path))
    assert sentence == (
        "Computing for 92.5% of the 400 s from first step to last (87.5% forward, backward and optimizer of "
        "training, 5.0% forwards of validation), 7.5% waiting for decisions or processes; 92.5% of the "
        "slots that trials could fill were filled."
    )
    summary = build_report(tmp_path)
    assert sentence in " ".join(summary.text.split())
    assert summary.facts["workers"] == both
    assert sentence in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_sweep_without_recorded_worker_times_says_nothing(tmp_path: Path) -> None:
    Builder(tmp_path).start()
    assert workers_sentence(read_results(tmp_path)) is None
    (tmp_path / "workers.json").write_text(json.dumps({"worker-0": Meter().figures()}))
    assert workers_sentence(read_results(tmp_path)) is None
    assert "Workers" not in build_report(tmp_path).text
