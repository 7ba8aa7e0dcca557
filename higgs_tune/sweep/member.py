"""One worker actor of a sweep, as the driver sees it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError


@dataclass
class Member:
    """One worker and what it was asked last."""

    name: str  # for people
    start: Callable[[], Any]  # makes its actor
    since: float  # when its process was asked for, was found dead, or has come at last
    actor: Any = field(init=False)
    given_up: bool = False  # by Ray, which restarts no actor that cannot be made on a machine
    answer: "ray.ObjectRef[Any]" = field(init=False)  # of `describe`, or once accepted of `serve`
    figures: "ray.ObjectRef[dict[str, Any]]" = field(init=False)
    accepted: bool = False
    trains: bool = False  # its pack has begun in this stage
    is_waited_for: bool = False  # a person was told; so was, below, who loads for long
    loads_long: bool = False
    num_deaths: int = 0  # while it loaded, since it last served
    has_served: bool = False
    complaint: str | None = None  # why it cannot load its base now; a person was told
    fails_since: float = 0.0
    retry_at: float | None = None  # when it tries again to load its base
    _begins: "ray.ObjectRef[Any] | None" = None  # answers once its pack trains

    def __post_init__(self) -> None:
        self.actor = self.start()
        self.ask()

    def ask(self) -> None:
        """Ask its process whether it is there, and what it has loaded."""
        self.answer = self.actor.describe.remote()
        self.figures = self.actor.figures.remote()

    def ask_again(self) -> None:
        """The same after a pause, of a new actor where there is none any more."""
        if self.given_up:
            self.actor, self.given_up = self.start(), False
        self.ask()

    def begin_anew(self) -> None:
        """Its pack is to begin: another stage, or another process."""
        self._begins, self.trains = None, False

    def begins(self) -> bool:
        """Whether its pack trains; asks it the first time."""
        begins = self._begins = self._begins or self.actor.trains.remote()
        if not is_there(begins):
            return False
        try:
            ray.get(begins)
        except RayActorError:  # it restarts, which its next answer will tell
            self._begins = None
            return False
        return True

    def lives(self) -> bool:
        """Whether its process has answered since it was last found dead."""
        if not is_there(self.figures):
            return False
        try:
            ray.get(self.figures)
        except RayActorError:
            return False
        return True


def is_there(answer: "ray.ObjectRef[Any]") -> bool:
    """Whether it has been answered."""
    return bool(ray.wait([answer], timeout=0)[0])
