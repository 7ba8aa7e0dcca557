import logging

from higgs_tune.sweep import runtime


def test_what_tune_logs_goes_to_a_file(tmp_path):
    logger = logging.getLogger("ray.tune.something")
    with runtime.tune_log(tmp_path / "tune.log"):
        logger.error("a detail")
    logger.debug("after")
    assert "ERROR ray.tune.something: a detail" in (tmp_path / "tune.log").read_text()
