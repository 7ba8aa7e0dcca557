import logging
import subprocess
import sys

from ray.tune.execution.class_cache import _ActorClassCache

from higgs_tune.sweep import runtime
from higgs_tune.sweep.trainable import PackTrial


def test_trials_need_no_runtime_environment_in_a_ray_of_this_process():
    def environment():
        return _ActorClassCache().get(PackTrial)._default_options["runtime_env"]

    before = environment()
    assert before  # Tune's own, which trials in a joined cluster need
    with runtime.inherited_environment():
        assert environment() == {}
    assert environment() == before


def test_tunes_log_goes_to_a_file(tmp_path):
    logger = logging.getLogger("ray.tune.something")
    with runtime.tune_log(tmp_path / "tune.log"):
        logger.error("a detail")
    logger.debug("after")
    assert "ERROR ray.tune.something: a detail" in (tmp_path / "tune.log").read_text()


def test_importing_the_driver_does_not_import_tune():
    slow = {"ray.tune", "ray.air", "pandas"}
    code = f"import sys, higgs_tune.sweep.driver; sys.exit(bool({slow} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
