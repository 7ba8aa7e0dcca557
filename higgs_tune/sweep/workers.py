"""The worker actors of a sweep, as the driver sees them."""

import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from higgs_tune.config import SweepConfig
from higgs_tune.errors import HiggsTuneError, NoMemoryError, SweepError
from higgs_tune.sweep.nodes import PATIENCE_S, cpus_of_worker, shortage
from higgs_tune.sweep.places import whole_paths
from higgs_tune.sweep.seats import Roster, num_seats
from higgs_tune.sweep.slots import slots_of
from higgs_tune.sweep.worker.actor import Worker

FIGURES_S = 10.0  # how often the workers are asked where their time went
PAUSE_S = 30.0  # until a worker that cannot load its base any more tries again
LOADING_S = 900.0  # after which a person is told that a worker still loads
GIVE_UP_S = 600.0  # how long it may try while nobody else trains


@dataclass
class Member:
    """One worker and what it was asked last."""

    name: str  # for people
    actor: Any
    answer: "ray.ObjectRef[Any]"  # of `describe`, or of `serve` once that was accepted
    figures: "ray.ObjectRef[dict[str, Any]]"
    since: float  # when its process was asked for, or was found dead
    accepted: bool = False
    begins: "ray.ObjectRef[Any] | None" = None  # answers once its pack trains
    trains: bool = False  # its pack has begun in this stage
    is_waited_for: bool = False  # a person was told
    has_served: bool = False
    complaint: str | None = None  # why it cannot load its base now; a person was told
    fails_since: float = 0.0
    retry_at: float | None = None  # when it tries again to load its base


class Workers:
    """Starts them, accepts what they have loaded, and hears what they say."""

    def __init__(self, config: SweepConfig, *, loop_path: str) -> None:
        tune = config.tune
        self._num_cpus, self._num_gpus = cpus_of_worker(tune), tune.gpus_per_worker
        device = config.base.device
        if device == "auto":
            device = "cuda" if tune.gpus_per_worker else "cpu"
        run = uuid.uuid4().hex[:8]  # a second sweep in the same process must not find these
        self.names = [f"{config.name}-worker-{n}-{run}" for n in range(tune.num_workers)]
        strict, self._num_slots = tune.num_workers == 1, slots_of(config)
        self._num_seats = num_seats(self._num_slots, strict=strict)
        remote: Any = ray.remote(Worker)
        actors = [
            remote.options(
                name=name,
                num_cpus=self._num_cpus,
                num_gpus=self._num_gpus,
                max_restarts=-1,
            ).remote(
                whole_paths(config),
                num_slots=self._num_slots,
                strict=strict,
                device=device,
                loop_path=loop_path,
            )
            for name in self.names
        ]
        self._asked_at = time.monotonic()
        self._members = [
            Member(
                f"worker-{number}",
                actor,
                actor.describe.remote(),
                actor.figures.remote(),
                self._asked_at,
            )
            for number, actor in enumerate(actors)
        ]
        self._figures: dict[str, dict[str, Any]] = {}
        self._trained_at = 0.0  # when one was last known to

    def publish(self, roster: Roster, beat: bool) -> None:
        """Tell everyone the roster; one that restarts just now hears it with the next heartbeat."""
        for member in self._members:
            member.actor.sync.remote(roster, beat=beat)

    def serving(self) -> list[int]:
        """The numbers of those that train: their process is there, its base and data accepted."""
        return [number for number, member in enumerate(self._members) if member.accepted]

    def begin_stage(self) -> None:
        """All start anew: with one trial a slot."""
        for member in self._members:
            member.begins, member.trains = None, False

    def rooms(self) -> list[int]:
        """How many trials each takes for now: none if it cannot load its base any more.

        Those who are to wait for a slot come when the pack trains: until then the processors, which
        their processes would need for seconds, have more urgent things to do.
        """
        rooms = (self._num_seats if each.trains else self._num_slots for each in self._members)
        return [
            0 if each.complaint else room for each, room in zip(self._members, rooms, strict=True)
        ]

    def hear(
        self,
        accept: Callable[[str, dict[str, Any]], None],
        warned: Callable[[str, list[str]], None],
        waits: Callable[[str], None],
        begun: Callable[[str], None],
    ) -> None:
        """Take what the workers have answered by now, and never wait for it.

        Args:
            accept: gets a worker's name and what it has loaded, before it trains; raises to refuse it.
            warned: gets a worker's name and its new warnings.
            waits: gets, once, which worker's process is not there, and what it needs.
            begun: gets, once a stage, the name of a worker whose pack trains.

        Raises:
            HiggsTuneError: a worker cannot load its base or its data, or `accept` refuses them. One that
                had served before tries again.
        """
        if any(member.accepted for member in self._members):
            self._trained_at = time.monotonic()
        for member in self._members:
            if member.retry_at is not None:
                if time.monotonic() < member.retry_at:
                    continue
                member.retry_at, member.answer = None, member.actor.describe.remote()
                member.since = time.monotonic()
            if not _is_there(member.answer):
                self._check_start(member, waits)
                continue
            try:
                answer = ray.get(member.answer)
            except RayActorError as error:
                if error.actor_init_failed:
                    raise SweepError(f"{member.name} cannot start: {error}") from None
                if member.accepted:  # it was there, and is not any more
                    member.since, member.is_waited_for = time.monotonic(), False
                member.accepted, member.begins, member.trains = False, None, False
                member.answer = member.actor.describe.remote()
                member.figures = member.actor.figures.remote()
                self._check_start(member, waits)
                continue
            except RayTaskError as error:
                if not isinstance(error.cause, HiggsTuneError):
                    raise
                if not member.has_served:
                    raise type(error.cause)(f"{member.name} {error.cause}") from None
                self._retry_later(member, error.cause, waits)
                continue
            if member.accepted:
                warned(member.name, answer)
            else:
                accept(member.name, answer)
                member.accepted = member.has_served = True
                member.complaint = None
            member.answer = member.actor.serve.remote()
        for member in self._members:
            if member.accepted and not member.trains and _begins(member):
                member.trains = True
                begun(member.name)

    def _retry_later(
        self, member: Member, cause: HiggsTuneError, waits: Callable[[str], None]
    ) -> None:
        """A worker that had served cannot load its base: its new machine, GPU or disk is to blame.

        Memory may be there later. After anything else the process starts anew, because a GPU's error
        stays with the process that met it.

        Raises:
            HiggsTuneError: it has tried for long, and nobody has trained meanwhile.
        """
        now, text = time.monotonic(), f"{member.name} {cause}"
        lacks_memory = isinstance(cause, NoMemoryError)
        if member.complaint is None:
            member.fails_since = now
        since = max(member.fails_since, self._trained_at)
        if not lacks_memory and now - since >= GIVE_UP_S:
            raise type(cause)(text)
        if member.complaint != text:
            waits(f"{text}; it tries again every {PAUSE_S:.0f} s")
        member.complaint, member.retry_at = text, now + PAUSE_S
        if not lacks_memory:
            ray.kill(member.actor, no_restart=False)

    def _check_start(self, member: Member, waits: Callable[[str], None]) -> None:
        """Say once that a worker's process is not there, or that one which is loads for very long."""
        waited_s = time.monotonic() - member.since
        if member.accepted or member.is_waited_for or waited_s < PATIENCE_S:
            return
        who = f"{member.name} (of {len(self._members)})"
        if not _lives(member):
            member.is_waited_for = True
            waits(shortage(who, self._num_cpus, self._num_gpus))
        elif waited_s >= LOADING_S:
            member.is_waited_for = True
            waits(f"{who} has been loading base and data for {waited_s / 60:.0f} minutes")

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
        self._asked_at = time.monotonic()
        for member in self._members:
            if member.accepted:  # else its first answer says that its process is there
                member.figures = member.actor.figures.remote()

    def _take_figures(self, timeout_s: float) -> dict[str, dict[str, Any]]:
        """What the workers have answered; one that does not keeps its former figures."""
        asked = [member.figures for member in self._members]
        ray.wait(asked, num_returns=len(asked), timeout=timeout_s)
        for member in self._members:
            if _is_there(member.figures):
                with suppress(RayActorError):  # it restarts, and counts anew
                    self._figures[member.name] = ray.get(member.figures)
        return self._figures

    def close(self) -> None:
        """Let every trial that waits for a result go."""
        for member in self._members:
            member.actor.close.remote()

    def kill(self) -> None:
        """End the processes."""
        for member in self._members:
            ray.kill(member.actor)


def _is_there(answer: "ray.ObjectRef[Any]") -> bool:
    return bool(ray.wait([answer], timeout=0)[0])


def _begins(member: Member) -> bool:
    """Whether its pack trains; asks it the first time."""
    begins = member.begins = member.begins or member.actor.trains.remote()
    if not _is_there(begins):
        return False
    try:
        ray.get(begins)
    except RayActorError:  # it restarts, which its next answer will tell
        member.begins = None
        return False
    return True


def _lives(member: Member) -> bool:
    """Whether its process has answered since it was last found dead."""
    if not _is_there(member.figures):
        return False
    try:
        ray.get(member.figures)
    except RayActorError:
        return False
    return True
