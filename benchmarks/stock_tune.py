"""Run given trials with stock transformers + PEFT under Ray Tune, in a plain or a strong way.

plain: a function trainable with HF Trainer, one process per trial, as in tutorials.
strong: a class trainable with reuse_actors; the base is loaded and the clips are tokenised once per process;
a loop without the Trainer.

Both train the same adapters on the same batches with the same AdamW, schedule and gradient clip as our sweep,
validate the same clips at the same steps, and end each trial at a given step. They do nothing that the
comparison does not need: no checkpoints, no logs, and no validation after other clips' audio, which our side
does.
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.tune import Callback, CheckpointConfig, RunConfig, Trainable, TuneConfig, Tuner
from stock_base import PROCESS, REPORTED, STARTED, StockBase, labelled_inputs, optimizer_of
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from higgs_tune.config import SweepConfig, TrialConfig
from higgs_tune.data.tokens import Encoded
from higgs_tune.metrics import STEP, VAL_AUDIO_NLL, VAL_TEXT_NLL


class Steps(Dataset):
    """The batches of a trial in order, one per item."""

    def __init__(self, base: StockBase, trial: TrialConfig) -> None:
        self._base, self._order, self._num_steps = base, base.order(trial), trial.num_steps

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: int) -> list[Encoded]:
        return self._base.batch(self._order, step)


class Reporter(TrainerCallback):
    """Validates and reports at the end of each report interval."""

    def __init__(self, validate: Callable[[], dict[str, float]], trial: TrialConfig) -> None:
        self._validate, self._every = validate, trial.report_every_steps
        self._started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when the first step starts."""
        self._started = time.time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report if an interval or the training ends."""
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            figures = {STEP: state.global_step, **self._validate()}
            stamps = {STARTED: self._started, REPORTED: time.time(), PROCESS: os.getpid()}
            tune.report(figures | stamps)


def plain_trial(config: dict[str, Any]) -> None:
    """Run a trial in its own process: load everything, train with HF Trainer, report."""
    torch.set_num_threads(config["threads"])
    sweep, trial = SweepConfig.model_validate(config["sweep"]), _trial_of(config)
    base = StockBase(sweep.base, sweep.data)
    model = base.adapted(trial)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=_own(config)["stop_at"],
                per_device_train_batch_size=1,  # each item is a whole batch
                max_grad_norm=trial.clip_norm,
                bf16=base.half,
                use_cpu=base.device.type == "cpu",
                train_sampling_strategy="sequential",
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
            ),
            train_dataset=Steps(base, trial),
            data_collator=lambda items: labelled_inputs(items[0], base.num_codebooks),
            optimizers=optimizer_of(model, trial),
            callbacks=[Reporter(lambda: base.validate(model), trial)],
        )
        # otherwise Trainer divides the audio loss by the number of text targets
        trainer.model_accepts_loss_kwargs = False
        trainer.train()


class StrongTrial(Trainable):
    """A trial in a process that keeps the base and the clips for the next trial."""

    def setup(self, config: dict[str, Any]) -> None:
        """Load what is kept between trials, then start the first trial."""
        torch.set_num_threads(config["threads"])
        sweep = SweepConfig.model_validate(config["sweep"])
        self._base = StockBase(sweep.base, sweep.data)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Switch to another trial; only the adapter is new."""
        self._model.unload()
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._trial, self._stop_at = _trial_of(config), _own(config)["stop_at"]
        self._model: Any = self._base.adapted(self._trial)
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer, self._schedule = optimizer_of(self._model, self._trial)
        self._order = self._base.order(self._trial)
        self._step, self._started = 0, time.time()

    def step(self) -> dict[str, Any]:
        """Train up to the next report and validate."""
        every = self._trial.report_every_steps
        end = min(self._step - self._step % every + every, self._stop_at)
        while self._step < end:
            inputs = self._base.inputs(self._base.batch(self._order, self._step))
            self._base.forward(self._model, inputs).backward()
            nn.utils.clip_grad_norm_(self._trained, self._trial.clip_norm)
            self._optimizer.step()
            self._schedule.step()
            self._optimizer.zero_grad()
            self._step += 1
        figures = {STEP: self._step, **self._base.validate(self._model)}
        stamps = {STARTED: self._started, REPORTED: time.time(), PROCESS: os.getpid()}
        return figures | stamps | {"done": self._step >= self._stop_at}


def _own(config: dict[str, Any]) -> dict[str, Any]:
    """The entry of `run_stock`'s `trials` that this Tune trial runs."""
    return config["trials"][config["number"]]


def _trial_of(config: dict[str, Any]) -> TrialConfig:
    return TrialConfig.model_validate(_own(config)["trial"])


class Collector(Callback):
    """Collects every result of every trial by the trial's id."""

    def __init__(self) -> None:
        self.results: dict[str, list[dict[str, Any]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Keep what the trainable reported."""
        names = (STEP, VAL_TEXT_NLL, VAL_AUDIO_NLL, STARTED, REPORTED, PROCESS)
        if STEP in result:  # a function trainable's last result only says that it is done
            lines = self.results.setdefault(_own(trial.config)["id"], [])
            lines.append({name: result[name] for name in names})


def run_stock(
    way: str, sweep: SweepConfig, trials: Sequence[dict[str, Any]], processes: int, storage: Path
) -> dict[str, list[dict[str, Any]]]:
    """Run trials on a running Ray; returns each trial's results by its id.

    Args:
        way: plain or strong.
        sweep: its base and data are used.
        trials: each with "id", "trial" (a TrialConfig as plain data) and "stop_at" (its last step).
        processes: how many train at the same time; each gets an equal share of the machine.
        storage: a folder for Tune.
    """
    total = ray.cluster_resources()
    cpus = max(1, int(total["CPU"]) // processes)
    # all processes together get the GPUs of one of our workers
    share = {"cpu": cpus, "gpu": sweep.tune.gpus_per_worker / processes}
    common = {"sweep": sweep.model_dump(mode="json"), "threads": cpus, "trials": list(trials)}
    trainable: Any = {"plain": plain_trial, "strong": StrongTrial}[way]
    collector = Collector()
    tuner = Tuner(
        tune.with_resources(trainable, share),
        param_space={**common, "number": tune.grid_search(list(range(len(trials))))},
        tune_config=TuneConfig(reuse_actors=way == "strong", max_concurrent_trials=processes),
        run_config=RunConfig(
            storage_path=str(storage),
            callbacks=[collector],
            checkpoint_config=CheckpointConfig(checkpoint_at_end=False)
            if way == "strong"
            else None,
            verbose=0,
        ),
    )
    errors = tuner.fit().errors
    if errors:
        raise SystemExit(f"{way}: {len(errors)} trials failed, first: {errors[0]}")
    return collector.results
