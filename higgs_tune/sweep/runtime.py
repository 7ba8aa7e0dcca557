"""A sweep's settings for Ray: its environment variables, those of trials, and Tune's log."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from higgs_tune import cluster

ENVIRONMENT = cluster.ENVIRONMENT | {
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's newer console output prints even at verbose=0
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # train.signals handles it
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a diverged trial has no metric to rank
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's own experiment state is never used
}


@contextmanager
def inherited_environment() -> Iterator[None]:
    """Let trials inherit their environment variables from a Ray that this process has started.

    Tune sets variables for each trial that all of this Ray's processes have anyway (and one for PyTorch
    Lightning). To set them, Ray would start Python and import itself again for each trial instead of
    using the idle processes that it keeps ready.
    """
    from ray.tune.execution import class_cache

    former = class_cache.DEFAULT_ENV_VARS, class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.DEFAULT_ENV_VARS, class_cache.ENV_VARS_TO_PROPAGATE = {}, set()
    try:
        yield
    finally:
        class_cache.DEFAULT_ENV_VARS, class_cache.ENV_VARS_TO_PROPAGATE = former


@contextmanager
def tune_log(path: Path) -> Iterator[None]:
    """Send Tune's log to a file; the sweep's own display shows what a user needs."""
    tune = logging.getLogger("ray.tune")
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # e.g. a full disk
    tune.addHandler(handler)
    propagate, tune.propagate = tune.propagate, False
    try:
        yield
    finally:
        tune.propagate = propagate
        tune.removeHandler(handler)
        handler.close()
