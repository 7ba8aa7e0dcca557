"""HyperBand without Ray, while everything that can happen to trials happens in any order."""

import random
from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from ray.tune.experiment import Trial
from ray.tune.schedulers import HyperBandScheduler, TrialScheduler

from higgs_tune.config import SweepConfig
from higgs_tune.config_scheduler import Rungs, hyperband
from higgs_tune.metrics import VAL_TEXT_NLL
from higgs_tune.sweep import hyperband as tested
from higgs_tune.sweep.guard import Guard


class HyperBand(Guard, tested.HyperBand):
    """As in `sweep.pausing`, without Tune's cache of processes."""


class Run:
    """A trial as a scheduler sees it; what will happen to it is drawn in advance."""

    config = {"record": {"origin": "search"}}

    def __init__(self, number, rng, num_steps):
        self.trial_id, self.status = str(number), Trial.PENDING
        self.step = self.saved = 0
        self.decision = None  # set while its checkpoint is being written
        self.losses = {step: rng.random() for step in range(1, num_steps + 1)}
        self.diverges_at = rng.choice([None, None, None, rng.randint(1, num_steps)])
        self.deaths = rng.choice([0, 0, 1, 2])
        self.comes_back = rng.random() < 0.7  # even after its last death
        self.judged = 0  # the last step at which it was not paused, or whose pause is over


class Tune:
    """Does with trials what Tune's controller does; the next event is drawn at random."""

    def __init__(self, scheduler, num_trials, num_slots, num_steps, rng):
        self.scheduler, self.rng, self.num_steps = scheduler, rng, num_steps
        self.runs = [Run(number, rng, num_steps) for number in range(num_trials)]
        self.num_added, self.num_slots = 0, num_slots
        self.resumed, self.alone = set(), True
        source = SimpleNamespace(
            over=lambda: self.num_added == num_trials,
            on_unpause=lambda trial_id: self.resumed.add(trial_id),
        )
        self.search_alg = SimpleNamespace(searcher=SimpleNamespace(searcher=source))

    def stop_trial(self, run):
        assert run.decision is None, "it is being saved"
        if run.status == Trial.RUNNING:
            self.scheduler.on_trial_complete(self, run, {})
        else:
            self.scheduler.on_trial_remove(self, run)
        run.status = Trial.TERMINATED

    def events(self):
        there = self.runs[: self.num_added]
        busy = [run for run in there if run.status == Trial.RUNNING]
        for run in busy:
            yield (self.report if run.decision is None else self.saves), run
            if run.deaths and (run.decision == TrialScheduler.PAUSE or self.rng.random() < 0.1):
                yield self.die, run
        if len(busy) < self.num_slots and self.num_added < len(self.runs):
            yield self.add, self.runs[self.num_added]

    def add(self, run):
        self.num_added += 1
        self.scheduler.on_trial_add(self, run)
        run.status = Trial.RUNNING

    def report(self, run):
        run.step += 1
        if run.step == run.diverges_at or run.step == self.num_steps:
            run.decision = TrialScheduler.STOP
            return
        result = {"step": run.step, VAL_TEXT_NLL: run.losses[run.step]}
        run.decision = self.scheduler.on_trial_result(self, run, result)
        if run.decision != TrialScheduler.PAUSE:
            run.judged = max(run.judged, run.step)

    def saves(self, run):
        """Its checkpoint is stored: carry out the decision."""
        decision, run.decision, run.saved = run.decision, None, run.step
        if decision == TrialScheduler.STOP:
            self.stop_trial(run)
        elif decision == TrialScheduler.PAUSE:
            run.status = Trial.PAUSED

    def die(self, run):
        """Its process dies; a checkpoint and a decision that are on their way are lost."""
        run.deaths -= 1
        if not run.deaths and not run.comes_back:
            self.scheduler.on_trial_error(self, run)
            run.diverges_at, run.status = run.judged + 1, Trial.ERROR
            return
        run.decision, run.step, run.status = None, run.saved, Trial.ERROR
        self.scheduler.on_trial_error(self, run)
        run.status = Trial.PENDING
        self.scheduler.on_trial_add(self, run)
        run.status = Trial.RUNNING

    def run(self):
        while True:
            chosen = self.scheduler.choose_trial_to_run(self)
            if chosen is not None and chosen.status == Trial.PAUSED:
                assert chosen.trial_id in self.resumed, "the searcher keeps no slot for it"
                num_busy = sum(r.status == Trial.RUNNING for r in self.runs)
                if num_busy < self.num_slots:
                    self.resumed.discard(chosen.trial_id)
                    chosen.status = Trial.RUNNING
                    chosen.step = chosen.judged = chosen.saved
                    continue
            events = list(self.events())
            if not events:
                return
            event, run = self.rng.choice(events)
            event(run)


def survivors(runs, rungs):
    """Each rung's step, survivors and cut trials, by the losses there alone."""
    left = runs
    for step, num_survivors in zip(rungs.steps, rungs.survivors, strict=True):
        there = [run for run in left if run.diverges_at is None or run.diverges_at > step]
        ranked = sorted(there, key=lambda run: run.losses[step])
        yield step, ranked[:num_survivors], ranked[num_survivors:]
        left = ranked[:num_survivors]


@pytest.mark.parametrize("num_slots", [1, 2, 4, 9])
@pytest.mark.parametrize("seed", range(25))
def test_brackets_are_cut_by_losses_at_equal_steps_in_any_order_of_events(seed, num_slots):
    rng = random.Random(f"{seed}:{num_slots}")
    num_steps = rng.choice([4, 6, 9])
    band = hyperband(num_steps, 1, rng.choice([2.0, 3.0]))
    tune = Tune(HyperBand(band, VAL_TEXT_NLL), 34, num_slots, num_steps, rng)
    tune.run()
    lost = {run.trial_id: run.step for run in tune.runs if run.status == Trial.ERROR}
    assert {run.status for run in tune.runs if run.trial_id not in lost} == {Trial.TERMINATED}
    first, number = 0, 0
    while first < len(tune.runs):
        rungs = band[number % len(band)]
        members = tune.runs[first : first + rungs.size]
        first, number = first + rungs.size, number + 1
        expected = {run.trial_id: run.diverges_at or num_steps for run in members}
        for step, _, cut in survivors(members, rungs):
            expected |= {run.trial_id: step for run in cut}
        expected |= {run.trial_id: run.step for run in members if run.trial_id in lost}
        assert {run.trial_id: run.step for run in members} == expected


@pytest.mark.parametrize("last", ["waits", "ends", "waits beside another"])
def test_a_bracket_is_cut_as_soon_as_its_last_trial_pauses_or_ends(last):
    """Even while others train, and before the searcher hears: the pack would go on without survivors."""
    rungs = Rungs(size=3, steps=(2,), survivors=(1,))
    tune = Tune(HyperBand((rungs,), VAL_TEXT_NLL), 9, 9, 6, random.Random(0))
    for run in tune.runs[:4]:  # the fourth belongs to another bracket, and trains on
        run.diverges_at = None
        tune.add(run)
    first, second, third, _ = tune.runs[:4]
    for run in (first, second, third):
        tune.report(run)
        tune.saves(run)
    for run in (first, second):
        tune.report(run)
    tune.saves(first)
    if last == "waits beside another":  # both are being saved
        tune.report(third)
        tune.saves(second)
        tune.saves(third)
        tune.scheduler.choose_trial_to_run(tune)
    else:
        tune.saves(second)
        if last == "ends":
            third.diverges_at = 2
        tune.report(third)
        tune.saves(third)
    statuses = [run.status for run in (first, second, third)]
    assert statuses.count(Trial.TERMINATED) == 2
    assert len(tune.resumed) == statuses.count(Trial.PAUSED)


def test_a_resumed_trial_is_compared_by_its_earlier_loss_at_the_rung():
    scheduler = HyperBand((Rungs(2, (2,), (1,)),), VAL_TEXT_NLL)
    tune = Tune(scheduler, 2, 2, 6, random.Random(0))
    late, other = tune.runs
    late.step, late.diverges_at, late.losses[4] = 3, None, 0.1
    other.diverges_at, other.losses[2] = None, 0.5
    scheduler.earlier[late.trial_id] = {2: 0.9}
    for run in (late, other):
        tune.add(run)
    for run in (late, other, other):
        tune.report(run)
        tune.saves(run)
    assert (late.status, other.status) == (Trial.TERMINATED, Trial.RUNNING)


@pytest.mark.parametrize("num_steps", [75, 150, 175, 400, 1000])
@pytest.mark.parametrize("factor", [2.0, 2.5, 3.0, 4.0])
def test_every_rung_of_every_bracket_is_a_reported_step_beyond_warmup(num_steps, factor):
    train = {"num_steps": num_steps, "report_every_steps": 10}
    settings = {"name": "hyperband", "reduction_factor": factor}
    raw = {"train": train, "tune": {"scheduler": settings}, "space": {"warmup_fraction": 0.1}}
    config = SweepConfig.model_validate(raw)
    band = hyperband(num_steps, config.past_warmup, factor)
    assert len(band[0].steps) > 0 and len(band[-1].steps) == 0
    for rungs in band:
        assert list(rungs.steps) == sorted(set(rungs.steps)), "two rungs at one step"
        assert all(0.1 * num_steps < step <= num_steps and step % 10 == 0 for step in rungs.steps)
        assert list(rungs.survivors) == sorted(rungs.survivors, reverse=True)
        assert all(number < rungs.size for number in rungs.survivors)


def test_the_brackets_are_those_of_the_paper():
    """Li et al. 2018, table 1: R = 81 and η = 3."""
    band = hyperband(81, 1, 3.0)
    assert [(rungs.size, rungs.steps) for rungs in band] == [
        (81, (1, 3, 9, 27)),
        (34, (3, 9, 27)),
        (15, (9, 27)),
        (8, (27,)),
        (5, ()),
    ]
    assert band[0].survivors == (27, 9, 3, 1)


@pytest.mark.parametrize("factor", [2.0, 2.5, 3.0, 4.0])
def test_the_brackets_are_those_of_tunes_hyperband(factor):
    for budget in range(1, 100):
        tune = HyperBandScheduler(max_t=budget, reduction_factor=factor)
        expected = []
        for num_cuts in reversed(range(tune._s_max_1)):
            if tune._get_r0(num_cuts) > 0:
                bracket, steps, survivors = tune._create_bracket(num_cuts), [], []
                for _ in range(num_cuts):
                    steps.append(7 * bracket._r)
                    bracket.successive_halving("", 1.0)
                    survivors.append(bracket._n)
                expected.append(Rungs(bracket._n0, tuple(steps), tuple(survivors)))
        assert hyperband(7 * budget + 6, 7, factor) == tuple(expected)


@pytest.mark.parametrize(
    "num_steps, report_every_steps, warmup", [(150, 75, 0.1), (150, 25, 0.34), (10, 10, 0.1)]
)
def test_a_budget_in_which_no_trial_would_be_stopped_is_refused(
    num_steps, report_every_steps, warmup
):
    raw = {
        "train": {"num_steps": num_steps, "report_every_steps": report_every_steps},
        "space": {"warmup_fraction": warmup},
        "tune": {"scheduler": {"name": "hyperband"}},
    }
    with pytest.raises(
        ValidationError, match=r"hyperband, which would stop no trial: .* at step \d+"
    ):
        SweepConfig.model_validate(raw)
