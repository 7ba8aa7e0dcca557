"""A Tune trial: asks its worker for the next result and hands it to Tune. Imports no torch."""

import logging
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError
from ray.tune import PlacementGroupFactory, Trainable

from higgs_tune.config import TrialConfig
from higgs_tune.errors import SweepError
from higgs_tune.metrics import HEALTHY, VAL_TEXT_NLL
from higgs_tune.sweep.seats import SITS_AT, Files, read_files, write_files

logger = logging.getLogger(__name__)

JOIN_PATIENCE_S = 120.0  # how long workers may answer that every slot is taken
REMIND_S = 60.0
START_S = 10.0  # what the worker that the driver chose gets: it may be about to be ready
ANSWER_S = 2.0  # what the others need to say that they are
AGAIN_S = 0.1  # after which those who were full, or are starting anew, are asked again


class PackTrial(Trainable):
    """One trial of a pack; `config` is what StudySearcher.suggest returns."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        """A trace of the driver's own node: trials stay beside the results folder."""
        return PlacementGroupFactory([{f"node:{ray.util.get_node_ip_address()}": 0.001}])

    def setup(self, config: dict[str, Any]) -> None:
        """Lease a slot, preferably on the worker that the driver chose."""
        self.reset_config(config)
        self._sit_down()

    def __repr__(self) -> str:
        """The name that the Ray dashboard shows for this process."""
        return f"Trial({self._name})"

    def step(self) -> dict[str, Any]:
        """Wait for the trial's next report."""
        self._sit_down()
        call = self._worker.next_result.options(name=f"{self._name} · next result")
        result: dict[str, Any] = self._answer(call.remote(self._trial_id))
        self._status = result["status"]
        if self._status not in HEALTHY:
            # Without its metric no scheduler can rank it: NaN passes every cutoff.
            result.pop(VAL_TEXT_NLL, None)
        return {**result, SITS_AT: self._sits_at, "done": self._status != "running"}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Bring the adapter and its training state here; Tune stores the folder.

        A trial that ended badly has nothing to keep: its folder stays empty.
        """
        self._sit_down()
        if self._status not in HEALTHY:
            return
        (reference,) = self._answer(self._worker.save.remote(self._trial_id))
        files: Files = self._answer(reference)
        write_files(files, Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint: dict[str, Any] | str | None) -> None:
        """Send a checkpoint back to the worker."""
        assert isinstance(checkpoint, str)
        self._sit_down()
        files = read_files(Path(checkpoint))
        self._answer(self._worker.restore.remote(self._trial_id, files))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial in the same process, which sits down once Tune lets it run.

        Tune does not try a trial again whose reset failed, or whose process died in it: a slot may be
        waited for during hours.
        """
        self._trial_id: str = new_config["id"]
        self._name: str = new_config["name"]
        self._status = "running"
        self._worker: Any = None
        return True

    def _sit_down(self) -> None:
        """Lease a slot, if it has none yet."""
        if self._worker is not None:
            return
        files = None
        if self.config["restore_from"]:  # stored once, however often workers are asked
            files = ray.put(read_files(Path(self.config["restore_from"])))
        self._worker, self._sits_at = self._lease(files)

    def _answer(self, reference: Any) -> Any:
        """What the worker answers; its death is this trial's failure, not this process's own."""
        try:
            return ray.get(reference)
        except (RayActorError, ObjectLostError) as error:  # it owns what it refers to
            raise SweepError(f"{self._name}: its worker died ({error})") from None

    def _lease(self, files: "ray.ObjectRef[Files] | None") -> tuple[Any, int]:
        """The worker that took the trial in, and its place in the list of workers."""
        first: int = self.config["worker"]
        names: list[str] = self.config["workers"]
        trial = TrialConfig.model_validate(self.config["trial"])
        deadline = time.monotonic() + JOIN_PATIENCE_S
        reminder = time.monotonic() + REMIND_S
        asked: dict[str, Any] = {}  # workers that are not ready yet
        while time.monotonic() < deadline:
            away = []
            for name in [names[first], *names[:first], *names[first + 1 :]]:
                try:
                    worker = ray.get_actor(name)
                    patience_s = START_S if name == names[first] else ANSWER_S
                    if not _is_ready(worker, name, asked, patience_s):
                        away.append(name)
                        continue
                    known = self.config["roster_version"], self.config["attempt"]
                    lease = ray.get(worker.join.remote(self._trial_id, trial, files, *known))
                    if lease == "away":
                        away.append(name)
                    elif lease != "full":  # if outdated, Tune lets this process go by itself
                        return worker, names.index(name)
                except (RayActorError, ValueError):  # it restarts, or is not registered yet
                    away.append(name)
            if len(asked) == len(names):  # whoever is ready first
                ray.wait(list(asked.values()), timeout=REMIND_S)
            else:
                time.sleep(AGAIN_S)
            if away:  # a machine that was taken back may return after hours
                deadline = time.monotonic() + JOIN_PATIENCE_S
                if time.monotonic() >= reminder:
                    reminder = time.monotonic() + REMIND_S
                    logger.warning("%s waits for %s", self._name, ", ".join(away))
        raise SweepError(f"{self._name}: no worker had a free slot for {JOIN_PATIENCE_S:.0f} s")


def _is_ready(worker: Any, name: str, asked: dict[str, Any], patience_s: float) -> bool:
    """Whether a worker takes trials; a call of one that has no process yet would wait for it.

    Raises:
        RayActorError: it has just died.
    """
    timeout_s = 0 if name in asked else patience_s  # it was waited for already
    if name not in asked:
        asked[name] = worker.ready.remote()
    if not ray.wait([asked[name]], timeout=timeout_s)[0]:
        return False
    ray.get(asked.pop(name))
    return True
