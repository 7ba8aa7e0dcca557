"""What a sweep asks of Ray: its environment, Tune's log and the worker actors."""

import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from higgs_tune import cluster
from higgs_tune.config import SweepConfig
from higgs_tune.errors import ConfigError
from higgs_tune.sweep.seats import Roster
from higgs_tune.sweep.slots import slots_of
from higgs_tune.sweep.worker import Worker

logger = logging.getLogger(__name__)

FIGURES_S = 10.0  # how often the workers are asked where their time went

ENVIRONMENT = cluster.ENVIRONMENT | {
    "RAY_AIR_NEW_OUTPUT": "0",  # the newer console of Tune prints even at verbose=0
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # control.signals handles it
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a diverged trial has no metric to rank
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's own experiment state is never used
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",  # two lines per checkpoint
}


@contextmanager
def tune_log(path: Path) -> Iterator[None]:
    """Send what Tune logs to a file: the sweep's own display says what a person needs."""
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


class Workers:
    """The worker actors of a sweep."""

    def __init__(self, config: SweepConfig, *, is_own_cluster: bool, loop_path: str) -> None:
        tune = config.tune
        total = ray.cluster_resources()
        num_cpus = tune.cpus_per_worker or max(1, int(total.get("CPU", 1)) // tune.num_workers)
        for name, each, have in (
            ("cpus_per_worker", num_cpus, total.get("CPU", 0)),
            ("gpus_per_worker", tune.gpus_per_worker, total.get("GPU", 0)),
        ):
            if is_own_cluster and tune.num_workers * each > have:
                raise ConfigError(
                    f"tune.num_workers ({tune.num_workers}) × tune.{name} ({each}) is more than "
                    f"this machine has ({have:g}). Lower one of them."
                )
        device = config.base.device
        if device == "auto":
            device = "cuda" if tune.gpus_per_worker else "cpu"
        run = uuid.uuid4().hex[:8]  # a second sweep in the same process must not find these
        self.names = [f"{config.name}-worker-{n}-{run}" for n in range(tune.num_workers)]
        remote: Any = ray.remote(Worker)
        self._actors = [
            remote.options(
                name=name,
                num_cpus=num_cpus,
                num_gpus=tune.gpus_per_worker,
                max_restarts=-1,
            ).remote(
                config,
                num_slots=slots_of(config),
                strict=tune.num_workers == 1,
                device=device,
                loop_path=loop_path,
            )
            for name in self.names
        ]
        self.description: ray.ObjectRef[dict[str, Any]] = self._actors[0].describe.remote()
        self._asked: list[ray.ObjectRef[dict[str, Any]]] = []  # for their figures
        self._asked_at = time.monotonic()
        self._figures: dict[str, dict[str, Any]] = {}

    def describe_again(self) -> None:
        """Ask the restarted worker for what the dead one did not answer."""
        self.description = self._actors[0].describe.remote()

    def publish(self, roster: Roster, beat: bool) -> None:
        """Tell everyone the roster; one that restarts just now hears it with the next heartbeat."""
        for actor in self._actors:
            actor.sync.remote(roster, beat=beat)

    def poll_figures(self) -> dict[str, dict[str, Any]] | None:
        """Now and then, where each worker's time went a while ago; asks them again."""
        if time.monotonic() - self._asked_at < FIGURES_S:
            return None
        figures = self._take_figures(timeout_s=0)
        self._ask_figures()
        return figures

    def last_figures(self) -> dict[str, dict[str, Any]]:
        """Where each worker's time went until now."""
        self._ask_figures()
        return self._take_figures(timeout_s=5)

    def _ask_figures(self) -> None:
        self._asked = [actor.figures.remote() for actor in self._actors]
        self._asked_at = time.monotonic()

    def _take_figures(self, timeout_s: float) -> dict[str, dict[str, Any]]:
        """What the workers have answered; one that does not keeps its former figures."""
        if self._asked:
            ray.wait(self._asked, num_returns=len(self._asked), timeout=timeout_s)
        for number, answer in enumerate(self._asked):
            if ray.wait([answer], timeout=0)[0]:
                with suppress(RayActorError):  # it restarts, and counts anew
                    self._figures[f"worker-{number}"] = ray.get(answer)
        return self._figures

    def close(self) -> None:
        """Let every trial that waits for a result go."""
        for actor in self._actors:
            actor.close.remote()

    def kill(self) -> None:
        """End the processes."""
        for actor in self._actors:
            ray.kill(actor)
