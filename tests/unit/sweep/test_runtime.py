import logging

import pytest

from higgs_tune.errors import ConfigError
from higgs_tune.sweep import runtime


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"gpus_per_worker": 1}, r"tune\.num_workers \(1\) × tune\.gpus_per_worker \(1\)"),
        ({"num_workers": 2, "cpus_per_worker": 4}, r"tune\.cpus_per_worker \(4\) is more than"),
    ],
)
def test_workers_that_this_machine_cannot_hold_are_refused(make_config, monkeypatch, tune, message):
    monkeypatch.setattr(runtime.ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(ConfigError, match=message):
        runtime.Workers(make_config(tune=tune), is_own_cluster=True, loop_path="unused")


def test_what_tune_logs_goes_to_a_file(tmp_path):
    logger = logging.getLogger("ray.tune.something")
    with runtime.tune_log(tmp_path / "tune.log"):
        logger.error("a detail")
    logger.debug("after")
    assert "ERROR ray.tune.something: a detail" in (tmp_path / "tune.log").read_text()
