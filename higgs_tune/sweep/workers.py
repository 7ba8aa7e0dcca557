"""The worker actors of a sweep, as the driver sees them."""

import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from higgs_tune.config import SweepConfig
from higgs_tune.errors import HiggsTuneError, NoMemoryError, SweepError
from higgs_tune.sweep.member import Member, is_ready
from higgs_tune.sweep.nodes import PATIENCE_S, cannot_start, cpus_of_worker, shortage
from higgs_tune.sweep.places import absolute_paths
from higgs_tune.sweep.seats import Roster, num_seats
from higgs_tune.sweep.slots import slots_of
from higgs_tune.sweep.worker.actor import Worker

FIGURES_S = 10.0  # how often the workers are asked where their time went
PAUSE_S = 30.0  # until a worker that can no longer load its base tries again
LOADING_S = 900.0  # until the user is told that a worker is still loading
GIVE_UP_S = 600.0  # how long a worker may keep trying while none serves
MAX_DEATHS = 3  # in a row, while a worker loads: then its machine is to blame


class Workers:
    """Starts the workers, accepts what they have loaded, and handles their answers."""

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
        settings = {"num_slots": self._num_slots, "strict": strict, "device": device}

        def start(name: str) -> Any:
            return remote.options(
                name=name,
                num_cpus=self._num_cpus,
                num_gpus=self._num_gpus,
                max_restarts=-1,
            ).remote(absolute_paths(config), **settings, loop_path=loop_path)

        self._asked_at = time.monotonic()
        self._members = [
            Member(f"worker-{number}", partial(start, name), self._asked_at)
            for number, name in enumerate(self.names)
        ]
        self._figures: dict[str, dict[str, Any]] = {}
        self._trained_at = 0.0  # when a worker was last known to serve

    def publish(self, roster: Roster, beat: bool) -> None:
        """Send the roster to all workers; one that is restarting gets it with the next heartbeat."""
        for member in self._members:
            member.actor.sync.remote(roster, beat=beat)

    def serving(self) -> list[int]:
        """The numbers of the workers that take trials: the driver has accepted their base and data."""
        return [number for number, member in enumerate(self._members) if member.accepted]

    def begin_stage(self) -> None:
        """Begin a stage: all workers start again with one trial per slot."""
        for member in self._members:
            member.expect_restart()

    def rooms(self) -> list[int]:
        """How many trials each worker takes for now: none if it can no longer load its base.

        Trials that will wait for a slot come only once the pack trains. Starting their processes takes
        seconds of processor time, for which there is more urgent work until then.
        """
        rooms = (self._num_seats if each.trains else self._num_slots for each in self._members)
        return [
            0 if each.complaint else room for each, room in zip(self._members, rooms, strict=True)
        ]

    def hear(
        self,
        accept: Callable[[str, dict[str, Any]], None],
        warned: Callable[[str, list[str]], None],
        tell: Callable[[str], None],
        begun: Callable[[str], None],
    ) -> None:
        """Handle the answers that the workers have given so far, without waiting for any.

        Args:
            accept: gets a worker's name and what it has loaded, before it trains; raises to refuse it.
            warned: gets a worker's name and its new warnings.
            tell: gets, once, what keeps a worker from its work: no machine, no memory, a long load.
            begun: gets, once per stage, the name of each worker whose pack trains.

        Raises:
            HiggsTuneError: a worker cannot load its base or its data, or `accept` refuses them. A worker
                that has served before tries to load again instead.
        """
        if any(member.accepted for member in self._members):
            self._trained_at = time.monotonic()
        for member in self._members:
            if member.retry_at is not None:
                if time.monotonic() < member.retry_at:
                    continue
                member.retry_at = None
                member.since, member.told_slow = time.monotonic(), False
                member.ask_again()
            if not is_ready(member.answer):
                self._check_start(member, tell)
                continue
            try:
                answer = ray.get(member.answer)
            except RayActorError as error:
                if not error.actor_init_failed:
                    self._died(member, tell)
                    continue
                if not member.has_served:
                    raise SweepError(f"{member.name} {cannot_start(error)}.") from None
                member.given_up, member.accepted = True, False
                member.expect_restart()
                self._retry_later(member, SweepError(cannot_start(error)), tell)
                continue
            except RayTaskError as error:
                if not isinstance(error.cause, HiggsTuneError):
                    raise
                if not member.has_served:
                    raise type(error.cause)(f"{member.name} {error.cause}") from None
                self._retry_later(member, error.cause, tell)
                continue
            if member.accepted:
                warned(member.name, answer)
            else:
                accept(member.name, answer)
                member.accepted = member.has_served = True
                member.complaint, member.num_deaths = None, 0
            member.answer = member.actor.serve.remote()
        for member in self._members:
            if member.accepted and not member.trains and member.begins():
                member.trains = True
                begun(member.name)

    def _died(self, member: Member, tell: Callable[[str], None]) -> None:
        """Handle a worker whose process died, alone or with its machine. Ray starts another.

        Raises:
            SweepError: its processes keep dying while they load, and no worker has ever served.
        """
        was_loading = not member.accepted and member.lives()
        if member.accepted or was_loading:
            member.since, member.told_missing, member.told_slow = time.monotonic(), False, False
        member.num_deaths += was_loading
        member.accepted = False
        member.expect_restart()
        member.ask()
        if member.num_deaths < MAX_DEATHS:
            self._check_start(member, tell)
            return
        cause = SweepError(
            "ends each time it loads base and data, usually because its machine runs out of memory "
            "(Ray's own messages say more). Give it a machine with more, or lower tune.num_workers"
        )
        if not any(each.has_served for each in self._members):
            raise SweepError(f"{member.name} {cause}.")
        self._retry_later(member, cause, tell)

    def _retry_later(
        self, member: Member, cause: HiggsTuneError, tell: Callable[[str], None]
    ) -> None:
        """Let a worker that cannot start or load its base try again later: its machine is to blame.

        If it lacks memory, some may be free later. After any other error its process is replaced, because
        a GPU's error stays with the process that met it.

        Raises:
            HiggsTuneError: `cause`, unless it lacks memory, after GIVE_UP_S in which no worker served.
        """
        now, text = time.monotonic(), f"{member.name} {cause}"
        lacks_memory = isinstance(cause, NoMemoryError)
        if member.complaint is None:
            member.fails_since = now
        since = max(member.fails_since, self._trained_at)
        if not lacks_memory and now - since >= GIVE_UP_S:
            raise type(cause)(text)
        if member.complaint != text:
            tell(f"{text}; it tries again every {PAUSE_S:.0f} s")
        member.complaint, member.retry_at = text, now + PAUSE_S
        if not lacks_memory:
            # needed even if Ray has given the actor up: its name is taken until then
            ray.kill(member.actor, no_restart=member.given_up)

    def _check_start(self, member: Member, tell: Callable[[str], None]) -> None:
        """Tell the user once that a worker's process has not started, or loads for very long."""
        now = time.monotonic()
        waited_s = now - member.since
        if member.accepted or waited_s < PATIENCE_S:
            return
        who = f"{member.name} (of {len(self._members)})"
        if not member.lives():
            if not member.told_missing:
                member.told_missing = True
                tell(shortage(who, self._num_cpus, self._num_gpus))
        elif member.told_missing:  # it has started, and begins to load
            member.since, member.told_missing = now, False
        elif waited_s >= LOADING_S and not member.told_slow:
            member.told_slow = True
            tell(f"{who} has been loading base and data for {waited_s / 60:.0f} minutes")

    def poll_figures(self) -> dict[str, dict[str, Any]] | None:
        """Every FIGURES_S, the figures that the workers have sent; requests new ones. Else None."""
        if time.monotonic() - self._asked_at < FIGURES_S:
            return None
        figures = self._take_figures(timeout_s=0)
        self._ask_figures()
        return figures

    def last_figures(self) -> dict[str, dict[str, Any]]:
        """Where each worker's time went, up to now."""
        self._ask_figures()
        return self._take_figures(timeout_s=5)

    def _ask_figures(self) -> None:
        self._asked_at = time.monotonic()
        for member in self._members:
            if member.accepted:  # else `figures` must show whether its process is alive
                member.figures = member.actor.figures.remote()

    def _take_figures(self, timeout_s: float) -> dict[str, dict[str, Any]]:
        """The workers' figures; a worker that has not answered keeps its former ones."""
        # one that is not accepted may have no process
        asked = [member.figures for member in self._members if member.accepted]
        ray.wait(asked, num_returns=len(asked), timeout=timeout_s)
        for member in self._members:
            if is_ready(member.figures):
                with suppress(RayActorError):  # it restarts, and counts from 0
                    self._figures[member.name] = ray.get(member.figures)
        return self._figures

    def close(self) -> None:
        """Stop training; trials that wait for a result are answered as cancelled."""
        for member in self._members:
            member.actor.close.remote()

    def kill(self) -> None:
        """End the workers' processes."""
        for member in self._members:
            ray.kill(member.actor)
