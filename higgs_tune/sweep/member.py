"""One worker actor of a sweep, as the driver sees it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError


@dataclass
class Member:
    """One worker and the calls to it that are pending."""

    name: str  # in messages
    start: Callable[[], Any]  # creates its actor
    since: float  # when its process was requested, found dead, asked again, or started late
    actor: Any = field(init=False)
    given_up: bool = False  # by Ray, which restarts no actor whose constructor failed on a machine
    answer: "ray.ObjectRef[Any]" = field(init=False)  # of `describe`; of `serve` once accepted
    figures: "ray.ObjectRef[dict[str, Any]]" = field(init=False)
    accepted: bool = False
    trains: bool = False  # its pack has begun in this stage
    told_missing: bool = False  # the user was told that its process has not started
    told_slow: bool = False  # the user was told that it has been loading for very long
    num_deaths: int = 0  # while loading, since it last served
    has_served: bool = False
    complaint: str | None = None  # why it cannot load its base now, as the user was told
    fails_since: float = 0.0
    retry_at: float | None = None  # when it tries again to load its base
    _begins: "ray.ObjectRef[Any] | None" = None  # of `trains`, which returns once its pack trains

    def __post_init__(self) -> None:
        self.actor = self.start()
        self.ask()

    def ask(self) -> None:
        """Ask its process what it has loaded, and for figures, whose answer shows that it lives."""
        self.answer = self.actor.describe.remote()
        self.figures = self.actor.figures.remote()

    def ask_again(self) -> None:
        """Ask again after a pause; first replaces an actor that Ray has given up."""
        if self.given_up:
            self.actor, self.given_up = self.start(), False
        self.ask()

    def expect_restart(self) -> None:
        """Expect its pack to begin again, in another stage or another process."""
        self._begins, self.trains = None, False

    def begins(self) -> bool:
        """Whether its pack trains; the first call asks the worker."""
        begins = self._begins = self._begins or self.actor.trains.remote()
        if not is_ready(begins):
            return False
        try:
            ray.get(begins)
        except RayActorError:  # it restarts, as `answer` will say
            self._begins = None
            return False
        return True

    def lives(self) -> bool:
        """Whether its process has answered since it was last found dead."""
        if not is_ready(self.figures):
            return False
        try:
            ray.get(self.figures)
        except RayActorError:
            return False
        return True


def is_ready(answer: "ray.ObjectRef[Any]") -> bool:
    """Whether the call has returned or failed."""
    return bool(ray.wait([answer], timeout=0)[0])
