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
from higgs_tune.sweep.member import Member, is_there
from higgs_tune.sweep.nodes import PATIENCE_S, cannot_start, cpus_of_worker, shortage
from higgs_tune.sweep.places import whole_paths
from higgs_tune.sweep.seats import Roster, num_seats
from higgs_tune.sweep.slots import slots_of
from higgs_tune.sweep.worker.actor import Worker

FIGURES_S = 10.0  # how often the workers are asked where their time went
PAUSE_S = 30.0  # until a worker that cannot load its base any more tries again
LOADING_S = 900.0  # after which a person is told that a worker still loads
GIVE_UP_S = 600.0  # how long it may try while nobody else trains
MAX_DEATHS = 3  # in a row, while a worker loads: then its machine is to blame


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
        settings = {"num_slots": self._num_slots, "strict": strict, "device": device}

        def start(name: str) -> Any:
            return remote.options(
                name=name,
                num_cpus=self._num_cpus,
                num_gpus=self._num_gpus,
                max_restarts=-1,
            ).remote(whole_paths(config), **settings, loop_path=loop_path)

        self._asked_at = time.monotonic()
        self._members = [
            Member(f"worker-{number}", partial(start, name), self._asked_at)
            for number, name in enumerate(self.names)
        ]
        self._figures: dict[str, dict[str, Any]] = {}
        self._trained_at = 0.0  # when one was last known to

    def publish(self, roster: Roster, beat: bool) -> None:
        """Tell everyone the roster; one that restarts just now hears it with the next heartbeat."""
        for member in self._members:
            member.actor.sync.remote(roster, beat=beat)

    def serving(self) -> list[int]:
        """The numbers of those that take trials: their process is there, its base and data accepted."""
        return [number for number, member in enumerate(self._members) if member.accepted]

    def begin_stage(self) -> None:
        """All start anew: with one trial a slot."""
        for member in self._members:
            member.begin_anew()

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
        tell: Callable[[str], None],
        begun: Callable[[str], None],
    ) -> None:
        """Take what the workers have answered by now, and never wait for it.

        Args:
            accept: gets a worker's name and what it has loaded, before it trains; raises to refuse it.
            warned: gets a worker's name and its new warnings.
            tell: gets, once, what keeps a worker from its work: no machine, no memory, a long load.
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
                member.retry_at = None
                member.since, member.loads_long = time.monotonic(), False
                member.ask_again()
            if not is_there(member.answer):
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
                member.begin_anew()
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
        """Its process is gone, by itself or with its machine. Ray starts another.

        Raises:
            SweepError: none comes so far that it serves, and no worker has.
        """
        was_loading = not member.accepted and member.lives()
        if member.accepted or was_loading:
            member.since, member.is_waited_for, member.loads_long = time.monotonic(), False, False
        member.num_deaths += was_loading
        member.accepted = False
        member.begin_anew()
        member.ask()
        if member.num_deaths < MAX_DEATHS:
            self._check_start(member, tell)
            return
        cause = SweepError(
            "ends each time it loads base and data, as a rule because its machine's memory runs out "
            "(Ray's own messages say more). Give it a machine with more, or lower tune.num_workers"
        )
        if not any(each.has_served for each in self._members):
            raise SweepError(f"{member.name} {cause}.")
        self._retry_later(member, cause, tell)

    def _retry_later(
        self, member: Member, cause: HiggsTuneError, tell: Callable[[str], None]
    ) -> None:
        """A worker that had served cannot start or load its base: its new machine, GPU or disk is to blame.

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
            tell(f"{text}; it tries again every {PAUSE_S:.0f} s")
        member.complaint, member.retry_at = text, now + PAUSE_S
        if not lacks_memory:
            # the name of one that Ray has given up is taken until this
            ray.kill(member.actor, no_restart=member.given_up)

    def _check_start(self, member: Member, tell: Callable[[str], None]) -> None:
        """Say once that a worker's process is not there, or that one which is loads for very long."""
        now = time.monotonic()
        waited_s = now - member.since
        if member.accepted or waited_s < PATIENCE_S:
            return
        who = f"{member.name} (of {len(self._members)})"
        if not member.lives():
            if not member.is_waited_for:
                member.is_waited_for = True
                tell(shortage(who, self._num_cpus, self._num_gpus))
        elif member.is_waited_for:  # it has come, and begins to load
            member.since, member.is_waited_for = now, False
        elif waited_s >= LOADING_S and not member.loads_long:
            member.loads_long = True
            tell(f"{who} has been loading base and data for {waited_s / 60:.0f} minutes")

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
        # whoever has not said what it loaded may have no process
        asked = [member.figures for member in self._members if member.accepted]
        ray.wait(asked, num_returns=len(asked), timeout=timeout_s)
        for member in self._members:
            if is_there(member.figures):
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
