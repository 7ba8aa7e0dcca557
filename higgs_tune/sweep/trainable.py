"""A Tune trial: asks its worker for the next result and hands it to Tune. Imports no torch."""

import logging
import tempfile
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
START_S = 10.0  # how long to wait for the worker that the driver chose: it may be almost ready
ANSWER_S = 2.0  # how long to wait for the others to say that they are ready
AGAIN_S = 0.1  # until workers that were full, or are restarting, are asked again


class PackTrial(Trainable):
    """One trial of a pack; `config` is what StudySearcher.suggest returns."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        """A tiny share of the driver's own node, so that trials run where the results folder is."""
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
            # Without its metric no scheduler ranks it: NaN would pass every cutoff.
            result.pop(VAL_TEXT_NLL, None)
        return {**result, SITS_AT: self._sits_at, "done": self._status != "running"}

    def save(self, checkpoint_dir: str | None = None) -> Any:
        """Save a checkpoint on the disk of the results; by default Tune writes it to /tmp first.

        /tmp may be small or in memory, and keeps for good what a failed save has written.
        """
        assert self._storage is not None
        place = self._storage.experiment_fs_path
        with tempfile.TemporaryDirectory(prefix="saving-", dir=place) as folder:
            return super().save(checkpoint_dir or folder)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the adapter and its training state, from the worker, to the folder that Tune stores.

        The folder of a trial that ended badly stays empty, because there is nothing to keep.
        """
        self._sit_down()
        if self._status not in HEALTHY:
            return
        (reference,) = self._answer(self._worker.save.remote(self._trial_id))
        files: Files = self._answer(reference)
        write_files(files, Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint: dict[str, Any] | str | None) -> None:
        """Send a checkpoint back to the worker, to start from."""
        assert isinstance(checkpoint, str)
        self._sit_down()
        files = read_files(Path(checkpoint))
        self._answer(self._worker.restore.remote(self._trial_id, files))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial in the same process; it leases a slot only once Tune lets it run.

        Waiting for a slot may take hours, and Tune does not retry a trial whose reset failed or whose
        process died during the reset.
        """
        self._trial_id: str = new_config["id"]
        self._name: str = new_config["name"]
        self._status = "running"
        self._worker: Any = None
        return True

    def _sit_down(self) -> None:
        """Lease a slot, if the trial has none yet."""
        if self._worker is not None:
            return
        files = None
        if self.config["restore_from"]:  # stored once, however often workers are asked
            files = ray.put(read_files(Path(self.config["restore_from"])))
        self._worker, self._sits_at = self._lease(files)

    def _answer(self, reference: Any) -> Any:
        """What the worker answers; its death counts as this trial's failure, not as this process's."""
        try:
            return ray.get(reference)
        except (RayActorError, ObjectLostError) as error:  # a dead worker's objects are lost
            raise SweepError(f"{self._name}: its worker died ({error})") from None

    def _lease(self, files: "ray.ObjectRef[Files] | None") -> tuple[Any, int]:
        """The worker that took the trial in, and its index in the list of workers."""
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
                    elif lease != "full":  # if outdated, Tune will drop this process itself
                        return worker, names.index(name)
                except (RayActorError, ValueError):  # it restarts, or is not registered yet
                    away.append(name)
            if len(asked) == len(names):  # none is ready: wait for the first that is
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
    """Whether a worker takes trials; waits for `patience_s` at most, even if it has no process yet.

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
