import logging
import subprocess
import sys

from ray.tune.execution.class_cache import _ActorClassCache

from higgs_tune.sweep import runtime
from higgs_tune.sweep.trainable import PackTrial


def test_trials_of_a_ray_of_ones_own_have_no_environment_to_set_up():
    def environment():
        return _ActorClassCache().get(PackTrial)._default_options["runtime_env"]

    before = environment()
    assert before  # Tune's, as a cluster that is joined needs them
    with runtime.inherited_environment():
        assert environment() == {}
    assert environment() == before


def test_what_tune_logs_goes_to_a_file(tmp_path):
    logger = logging.getLogger("ray.tune.something")
    with runtime.tune_log(tmp_path / "tune.log"):
        logger.error("a detail")
    logger.debug("after")
    assert "ERROR ray.tune.something: a detail" in (tmp_path / "tune.log").read_text()


def test_a_sweep_starts_ray_before_it_imports_tune():
    slow = {"ray.tune", "ray.air", "pandas"}
    code = f"import sys, higgs_tune.sweep.driver; sys.exit(bool({slow} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
