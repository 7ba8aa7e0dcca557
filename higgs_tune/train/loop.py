"""Train a pack: data in, one interval at a time, validated metrics out.

This is the only training loop. A sweep's worker drives it with many residents, `higgs-tune train` with
one. Shape letters: K adapters, C codebooks.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from higgs_tune import metrics
from higgs_tune.config import BaseSettings, DataSettings, TrialConfig
from higgs_tune.data.collate import TargetCounts, count_targets
from higgs_tune.data.dataset import Dataset
from higgs_tune.data.order import TrainOrder
from higgs_tune.data.tokens import Encoded
from higgs_tune.device import peak_memory_mib
from higgs_tune.model.load import Base, load_base
from higgs_tune.train.checkpoint import load_interval, load_state, save_adapter, save_interval
from higgs_tune.train.engine import Engine
from higgs_tune.train.examples import Examples, check_fits
from higgs_tune.train.gradients import Clips, Gradients
from higgs_tune.train.imbalance import preflight
from higgs_tune.train.interval import Interval
from higgs_tune.train.optim import learning_rate
from higgs_tune.train.parallel import ALONE, World
from higgs_tune.train.progress import Run
from higgs_tune.train.residents import AdapterState, PackLimits
from higgs_tune.train.room import Ended, agree_across_processes, raise_if_all_failed
from higgs_tune.train.validation import Validator, nll_of

logger = logging.getLogger(__name__)


class PackLoop:
    """A base, a dataset and up to `limits.num_slots` trials that train together."""

    def __init__(
        self,
        base: Base,
        dataset: Dataset,
        data: DataSettings,
        limits: PackLimits,
        world: World = ALONE,
    ) -> None:
        check_fits(dataset, base)
        self.engine = Engine(base, limits, world.rank)
        self._gradients = Gradients(self.engine)
        self.content_hash: str = dataset.info.content_hash
        self.base, self._world, self._system_text = base, world, data.system_text
        self._examples = Examples(base, dataset, data, warns=world.is_main)
        self._runs: dict[str, Run] = {}
        self._steps_s = self.prepare_s = self.validate_s = 0.0  # over all calls of `advance` so far
        sets = self._examples.validation(data.num_val_clips)
        self._validator = Validator(
            self.engine,
            transcribe=[self._examples.encode(c) for c in sets.transcribe],
            swapped=[self._examples.encode(c) for c in sets.transcribe_swapped],
            speak=[self._examples.encode(c) for c in sets.speak],
            world=world,
        )
        self.transcribe = sets.transcribe
        probes = [*sets.transcribe[:2], *sets.speak[:2]]
        seen = preflight(
            self._single_nll,
            [self._examples.encode(c) for c in probes],
            base.model.config.codebook_size,
            each=lambda nll, many: self.engine.lanes.run([partial(nll, e) for e in many]),
        )
        self.preflight: dict[str, Any] = asdict(seen)
        self.base_metrics: dict[str, float] = self._validator.bare()

    @classmethod
    def load(cls, base: BaseSettings, data: DataSettings, limits: PackLimits) -> "PackLoop":
        """Load the base and the dataset that the settings name.

        Raises:
            ConfigError, DataError, ModelError, LeakError: see `load_base`, `Dataset.open`, `preflight`.
        """
        return cls(load_base(base), Dataset.open(data.path), data, limits)

    def join(
        self,
        trial_id: str,
        config: TrialConfig,
        state_dir: Path | None = None,
        *,
        start: AdapterState | None = None,
        batches_per_step: int = 1,
    ) -> dict[str, Any]:
        """Add a trial, fresh or from a folder that a snapshot wrote.

        Args:
            start: initial state of a fresh trial, instead of one drawn from its seed.
            batches_per_step: batches of `batch_clips` clips that each process takes per optimizer step.

        Returns:
            Its account: trainable "parameters", "modules" per target path, the "step" it starts at, and
            "num_skipped", the training rows that are left out.
        """
        num_batches = batches_per_step * self._world.size
        order = self.train_order(config.batch_clips * num_batches, config.seed)
        state = load_state(state_dir) if state_dir else start
        interval = Interval(**(load_interval(state_dir) if state_dir else {}))
        resident = self.engine.add(trial_id, config, state)
        self._runs[trial_id] = Run(resident, order, interval)
        return resident.account | {"step": resident.step, "num_skipped": order.num_skipped}

    def leave(self, trial_id: str) -> None:
        """Free the trial's slot."""
        slot = self._runs.pop(trial_id).resident.slot
        self.engine.remove(trial_id)
        self._gradients.room.forget([slot])
        self._validator.room.forget([slot])

    def check(self) -> None:
        """Compute the base alone; raises if that fails, unless only for memory beside residents."""
        try:
            self._validator.bare()
        except MemoryError as error:
            if not self.num_residents:
                raise  # otherwise the residents may hold the memory
            logger.warning("no memory to compute the base beside the pack: %s", error)

    @property
    def num_residents(self) -> int:
        """Trials that have joined and not left."""
        return len(self._runs)

    @property
    def num_forwards(self) -> int:
        """Forwards so far, in training and validation; grows as long as the pack makes progress."""
        return self.engine.num_forwards

    def snapshot(self, trial_id: str) -> Callable[[Path], None]:
        """Copy a trial's state; returns a function that writes it into an empty folder.

        With several processes, all must have called `gather` before. The function writes the adapter in
        PEFT's format and its training state; it may run at any time, on any thread. Once a trial has
        reported its end, the optimizer's moments, two thirds of the bytes, are left out.
        """
        run = self._runs[trial_id]
        run.interval.gather()
        state = self.engine.state(trial_id, moments=not run.reported_done)
        interval = run.interval.state()
        config, base, system_text = run.resident.config, self.base, self._system_text

        def write(directory: Path) -> None:
            save_adapter(directory, state, config, base.source, base.revision, system_text)
            save_interval(directory, interval)

        return write

    def gather(self, trial_id: str) -> bool:
        """Sum the interval over the processes, for a checkpoint; False if gradients were not finite."""
        run = self._runs[trial_id]
        run.interval.gather(self._world)
        return bool(self.engine.alive_K[run.resident.slot])

    def position(self, trial_id: str) -> tuple[int, int]:
        """The trial's optimizer steps so far, and how many of them are not reported yet."""
        run = self._runs[trial_id]
        return run.resident.step, run.interval.num_steps

    def due(self, trial_id: str) -> bool:
        """Whether the trial must report at its current step."""
        return self._runs[trial_id].due

    def advance(self, stop: Callable[[], bool] | None = None) -> dict[str, dict[str, Any]]:
        """Train every unfinished resident until one or more are due, then validate those.

        The others stop within their intervals and continue in the next call. A resident that joined
        with its budget used up is validated at once, without training.

        Args:
            stop: called after each step; if true, returns within the interval, which continues in a
                later call or from a checkpoint.

        Returns:
            Trial id → metrics of those that were due, with "status" running, completed, diverged,
            out_of_memory or failed, and a "reason". Empty when stopped.

        Raises:
            Exception: the cause is not one adapter: a step or a validation failed for every unfinished
                resident, or for every one that was due and for the base alone.
        """
        pending = {trial_id: run for trial_id, run in self._runs.items() if not run.reported_done}

        def spend(since: float) -> None:
            spent_s = time.monotonic() - since
            self._steps_s += spent_s
            for run in pending.values():
                if run.interval.num_steps:
                    run.interval.seconds += spent_s

        while pending and not any(run.due for run in pending.values()):
            started = time.monotonic()
            self._train_step(pending)
            spend(started)
            if stop is not None and stop():
                return {}
        started = time.monotonic()
        healthy = self.engine.alive_K.tolist()  # waits for the device
        spend(started)
        due = {trial_id: run for trial_id, run in pending.items() if run.due}
        results: dict[str, dict[str, Any]] = {}
        alive = [t for t, run in due.items() if healthy[run.resident.slot] and run.ended is None]
        started = time.monotonic()
        validated = self._validator.validate(alive) if alive else {}
        raise_if_all_failed(validated, len(pending), probe=self.check)
        self.validate_s += time.monotonic() - started
        for trial_id, run in due.items():
            figures = validated.get(trial_id, {})
            if isinstance(figures, Ended):
                run.ended, figures = figures, {}
            result = self._train_metrics(run) | figures
            result |= run.outcome(result, healthy[run.resident.slot])
            if run.ended is not None:
                logger.error("%s: %s", trial_id, result["reason"], exc_info=run.ended.error)
                run.ended.error.__traceback__ = None  # its frames would keep the pack in memory
            run.reported_done = run.done or run.ended is not None
            results[trial_id] = result
        return results

    @property
    def train_s(self) -> float:
        """Seconds of all training steps so far, without preparing their examples."""
        return self._steps_s - self.prepare_s

    def validate(self, trial_ids: Sequence[str]) -> dict[str, dict[str, float]]:
        """Validate adapters in the engine, without training them.

        Raises:
            MemoryError: not even one clip at a time fits.
            Exception: any other error that a forward raises twice.
        """
        found: dict[str, dict[str, float]] = {}
        for trial_id, figures in self._validator.validate(trial_ids).items():
            if isinstance(figures, Ended):
                raise figures.error
            found[trial_id] = figures
        return found

    def train_order(self, batch_clips: int, seed: int) -> TrainOrder:
        """The order of a trial's training rows; raises DataError if tasks and limits leave no row."""
        return self._examples.order(batch_clips, seed)

    def _train_step(self, active: dict[str, Run]) -> None:
        """Do one optimizer step of each active trial; one that fails or does not fit in memory ends."""
        started = time.monotonic()
        clips: dict[int, Clips] = {}
        counts: dict[int, TargetCounts] = {}
        by_slot = {run.resident.slot: run for run in active.values()}
        for slot, run in by_slot.items():
            config = run.resident.config
            drawn = self._world.share(run.order.batch(run.resident.step))
            examples = [self._examples.encode(c) for c in drawn]
            counts[slot] = self._world.sum_counts(
                count_targets(examples, self.engine.num_codebooks)
            )
            clips[slot] = Clips(examples, config.batch_clips, config.token_budget)
        self.prepare_s += time.monotonic() - started
        sums = agree_across_processes(self._gradients.add(clips, counts), self._world)
        self._world.sum_gradients(self.engine.bank)
        raise_if_all_failed(sums, len(by_slot))
        fits = [t for t, run in active.items() if not isinstance(sums[run.resident.slot], Ended)]
        norm_K = self.engine.optim_step(fits)
        for slot, run in by_slot.items():
            sum_C = sums[slot]
            if isinstance(sum_C, Ended):
                run.ended = sum_C
                continue
            num_rows = sum(e.num_rows for e in clips[slot].examples)
            run.interval.add(sum_C, norm_K[slot], counts[slot], num_rows)

    def _train_metrics(self, run: Run) -> dict[str, Any]:
        """Return the interval's metrics, and start the next interval.

        An interval without a step has only its position and time.
        """
        run.interval.gather(self._world)
        step = run.resident.step
        position = {metrics.STEP: step, metrics.EPOCH: run.order.epochs(step)}
        result: dict[str, Any] = position | run.interval.metrics()
        if run.interval.num_steps:
            result[metrics.PEAK_MEMORY_MIB] = self._world.highest(
                peak_memory_mib(self.engine.device)
            )
            resident = run.resident
            result[metrics.LEARNING_RATE] = learning_rate(resident.config, resident.step - 1)
            for path, share in self.engine.gradient_shares(resident.trial_id).items():
                result[metrics.grad_share(path)] = share
        run.interval = run.interval.next()
        return result

    def _single_nll(self, example: Encoded) -> tuple[float, float]:
        text_K, audio_KC = self.engine.compute(partial(nll_of, (0,), [example], True), ())
        return float(text_K[0]), float(audio_KC[0].sum())
