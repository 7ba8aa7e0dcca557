"""A discrete-event model of a sweep: rounds of packs on several GPUs, one driver, early stopping, failures.

A GPU is a worker with slots. When all its slots are filled, or no trial is left to fill them, it trains all
its trials for one report interval and validates them: a round. Between rounds the driver, which does one
thing at a time, handles the results and asks for new trials. A GPU that fails loses its round; its trials
continue from the end of their last round on another GPU, or on this one once it is back.
"""

import heapq
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any, cast

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import TrialScheduler

from higgs_tune.config import SchedulerSettings, SweepConfig, TrainSettings, TuneSettings
from higgs_tune.config_space import SpaceSettings
from higgs_tune.metrics import STEP, VAL_TEXT_NLL
from higgs_tune.sweep.scheduler import Earlier, make_scheduler


@dataclass(frozen=True)
class Costs:
    """Durations in the simulated sweep."""

    step_s: tuple[float, ...]  # an optimizer step of a pack of 1, 2, … adapters
    start_s: float  # a worker's start: process, imports, base
    between_s: float  # per slot: from a trial's last result to the next one's first step
    ask_tell_s: float  # the driver's time per trial, one after the other
    validation_steps: float  # a validation takes as long as this many steps

    @property
    def num_slots(self) -> int:
        """Adapters in a full pack."""
        return len(self.step_s)


@dataclass(frozen=True)
class Search:
    """The simulated search."""

    num_trials: int
    num_steps: int
    report_every_steps: int
    scheduler: SchedulerSettings

    def __post_init__(self) -> None:
        if self.num_steps % self.report_every_steps:
            raise ValueError("num_steps must be a multiple of report_every_steps")


@dataclass(frozen=True)
class Failures:
    """How often a GPU's node fails, and for how long."""

    per_gpu_hour: float = 0.0
    repair_s: float = 0.0


@dataclass
class Outcome:
    """Result of a simulated sweep; steps are counted per adapter."""

    makespan_s: float
    steps_kept: int  # sum of the trials' steps at their ends
    steps_lost: float  # trained, then lost in failures
    steps_done: float  # all that the GPUs trained: kept and lost
    num_stopped: int
    num_failures: int
    occupancy: float  # share of all GPUs' time that is spent in rounds


@dataclass(eq=False)
class _Trial:
    number: int
    quality: float
    step: int = 0


@dataclass(eq=False)  # compared by identity: two GPUs can have equal fields
class _Gpu:
    residents: list[_Trial] = field(default_factory=list)
    up: bool = False
    training: bool = False
    ready_at: float = 0.0
    round_at: float = 0.0
    life: int = 0  # incremented by a failure; events of an earlier life are ignored
    busy_s: float = 0.0


class _Sweep:
    """The state of the simulation and its event handlers."""

    def __init__(
        self, costs: Costs, search: Search, num_gpus: int, failures: Failures, seed: int
    ) -> None:
        self.costs, self.search, self.failures = costs, search, failures
        self.chance = random.Random(seed)
        qualities = random.Random(seed + 1)
        self.trials = [_Trial(n, qualities.gauss(0, 1)) for n in range(search.num_trials)]
        self.queue = deque(self.trials)
        self.gpus = [_Gpu() for _ in range(num_gpus)]
        self.events: list[tuple[float, int, str, int, int]] = []
        self.num_events = 0
        self.driver_at = 0.0
        self.left = search.num_trials
        self.outcome = Outcome(0.0, 0, 0.0, 0.0, 0, 0, 0.0)
        self.asked: set[int] = set()
        train = TrainSettings(
            num_steps=search.num_steps,
            report_every_steps=search.report_every_steps,
        )
        tune, space = TuneSettings(scheduler=search.scheduler), SpaceSettings(warmup_fraction=(0,))
        self.scheduler = make_scheduler(SweepConfig(train=train, tune=tune, space=space))

    def at(self, time: float, kind: str, number: int) -> None:
        """Schedule an event of a GPU; it is dropped if the GPU fails before."""
        self.num_events += 1
        life = self.gpus[number].life
        heapq.heappush(self.events, (time, self.num_events, kind, number, life))

    def rise(self, now: float, number: int) -> None:
        """A GPU is ready, and can fail from now on."""
        self.gpus[number].up = True
        self.gpus[number].ready_at = now
        if self.failures.per_gpu_hour:
            lasts_s = self.chance.expovariate(self.failures.per_gpu_hour / 3600)
            self.at(now + lasts_s, "failure", number)

    def fill(self, now: float) -> None:
        """Give waiting trials slots, each on the GPU with most free ones; start rounds on idle GPUs."""
        resting = [gpu for gpu in self.gpus if gpu.up and not gpu.training]
        while self.queue and resting:
            gpu = min(resting, key=lambda gpu: len(gpu.residents))
            if len(gpu.residents) == self.costs.num_slots:
                break
            trial = self.queue.popleft()
            ready_at = now
            if trial.number not in self.asked:
                self.asked.add(trial.number)
                self.scheduler.on_trial_add(cast(Any, None), _stand_in(trial))
                self.driver_at = max(self.driver_at, now) + self.costs.ask_tell_s
                ready_at = self.driver_at
            gpu.residents.append(trial)
            gpu.ready_at = max(gpu.ready_at, ready_at + self.costs.between_s)
        for number, gpu in enumerate(self.gpus):
            if gpu in resting and gpu.residents:
                gpu.training, gpu.round_at = True, max(now, gpu.ready_at)
                self.at(gpu.round_at + self.round_s(gpu), "round", number)

    def round_s(self, gpu: _Gpu) -> float:
        """Duration of a GPU's round."""
        steps = self.search.report_every_steps + self.costs.validation_steps
        return steps * self.costs.step_s[len(gpu.residents) - 1]

    def end_round(self, now: float, gpu: _Gpu) -> None:
        """All residents report; those that are stopped or finished leave."""
        gpu.training = False
        gpu.busy_s += self.round_s(gpu)
        staying = []
        for trial in gpu.residents:
            trial.step += self.search.report_every_steps
            self.outcome.steps_done += self.search.report_every_steps
            value = {STEP: trial.step, VAL_TEXT_NLL: trial.quality + self.chance.gauss(0, 0.1)}
            verdict = self.scheduler.on_trial_result(cast(Any, None), _stand_in(trial), value)
            if trial.step < self.search.num_steps and verdict == TrialScheduler.CONTINUE:
                staying.append(trial)
                continue
            self.left -= 1
            self.outcome.num_stopped += trial.step < self.search.num_steps
            self.outcome.makespan_s = now
        gpu.residents = staying

    def fail(self, now: float, number: int) -> None:
        """A node fails and loses its round; its trials wait for a slot."""
        gpu = self.gpus[number]
        spent_s = max(0.0, now - gpu.round_at) if gpu.training else 0.0
        if spent_s:
            steps = len(gpu.residents) * self.search.report_every_steps
            lost = steps * spent_s / self.round_s(gpu)
            self.outcome.steps_lost += lost
            self.outcome.steps_done += lost
            gpu.busy_s += spent_s
        self.outcome.num_failures += 1
        self.queue.extendleft(reversed(gpu.residents))
        gpu.residents, gpu.up, gpu.training = [], False, False
        gpu.life += 1
        self.at(now + self.failures.repair_s + self.costs.start_s, "up", number)


def _stand_in(trial: _Trial) -> TuneTrial:
    return cast(TuneTrial, Earlier(str(trial.number)))


def simulate(
    costs: Costs,
    search: Search,
    num_gpus: int,
    *,
    failures: Failures | None = None,
    seed: int = 0,
) -> Outcome:
    """Run a sweep from its command to the end of its last trial."""
    sweep = _Sweep(costs, search, num_gpus, failures or Failures(), seed)
    for number in range(num_gpus):
        sweep.at(costs.start_s, "up", number)
    while sweep.left:
        now = sweep.events[0][0]
        # handle all events of this moment before filling
        while sweep.events and sweep.events[0][0] == now:
            _, _, kind, number, life = heapq.heappop(sweep.events)
            if life != sweep.gpus[number].life:
                continue
            if kind == "up":
                sweep.rise(now, number)
            elif kind == "round":
                sweep.end_round(now, sweep.gpus[number])
            else:
                sweep.fail(now, number)
        sweep.fill(now)
    outcome = sweep.outcome
    outcome.steps_kept = sum(trial.step for trial in sweep.trials)
    # no GPU is in a round any more: every trial has ended
    outcome.occupancy = sum(g.busy_s for g in sweep.gpus) / (num_gpus * outcome.makespan_s)
    return outcome
