"""A pack loop with closed-form learning curves, for sweeps without a model.

Every worker process of a test's sweep imports this module, so it must not import the search.
"""

import json
import logging
import math
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from higgs_tune.config import SweepConfig, TrialConfig
from higgs_tune.errors import ModelError

BASE = {
    "val/text/nll": 9.0,
    "val/text/nll_swapped": 9.02,
    "val/text/audio_gain": 0.02,
    "val/audio/nll_per_code": 3.0,
}


class FakeLoop:
    """Text nll falls towards a floor that depends on the configuration, not on neighbours.

    An interval takes FAKE_ROUND_S seconds, with jitter. Some settings trigger an event:

    - learning_rate above 5e-2: diverges at the second report
    - batch_clips 13: cannot join; 17: fails
    - audio_loss_weight near 0: breaks the audio constraint
    - base.path "broken": cannot be loaded; "killed": kills the process that loads it; "warns": warns
    - base.path "pid:FILE": FILE lists the processes that load it; "ill:FILE": so, and the second one fails;
      "scarce:FILE": so, with memory for two processes, and 0.3 s per interval
    - base.path a folder: 0.3 s per interval while it holds a file "slow"
    - base.path "odd:WHAT:FILE": in all processes but the first, WHAT ("load", "data" or "base") goes wrong

    A checkpoint lists its steps as [seed, step, learning rate].
    """

    def __init__(self, config: SweepConfig, *, num_slots: int, device: str) -> None:
        if config.base.path == "broken":
            raise ModelError("base.path: no such checkpoint. Give another one.")
        assert device
        if config.base.path == "killed":  # after the driver has noticed the process
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        kind, _, path = config.base.path.partition(":")
        if kind in ("pid", "ill", "scarce"):
            with open(path, "a+") as file:
                file.write(f"{os.getpid()}\n")
                file.seek(0)
                number = len(file.readlines())
            if kind == "ill" and number == 2:
                raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
            if kind == "scarce" and number > 2:
                raise RuntimeError("CUDA error: out of memory")
        # slow enough that both workers have trials when one dies
        self._is_slow = kind == "scarce" or Path(config.base.path, "slow").exists()
        self.num_slots = num_slots
        self.base_metrics = dict(BASE)
        self.preflight: dict[str, Any] = {"ok": True}
        self.content_hash = "0" * 64
        self.transcribe = ("a clip", "another")
        if config.base.path.startswith("odd:"):
            self._be_odd(*config.base.path.split(":")[1:])
        if config.base.path == "warns":
            logging.getLogger("higgs_tune.tests").warning("memory ran out in a training step")
        self._config = config
        self._steps: dict[str, int] = {}
        self._trained: dict[str, list[Any]] = {}
        self._configs: dict[str, TrialConfig] = {}
        self._unreported: set[str] = set()  # trained since their last report
        self.train_s = self.prepare_s = self.validate_s = 0.0
        self.num_steps = 0  # of the pack
        self.log: list[tuple[str, str, int]] = []  # join or leave, trial, the pack's steps so far

    def _be_odd(self, what: str, file: str) -> None:
        try:
            open(file, "x").close()
        except FileExistsError:
            if what == "load":
                raise RuntimeError("CUDA error: out of memory") from None
            if what == "data":
                self.content_hash = "1" * 64
            if what == "base":
                self.base_metrics["val/text/nll"] += 1.0

    def join(
        self, trial_id: str, config: TrialConfig, state_dir: Path | None = None
    ) -> dict[str, Any]:
        assert trial_id not in self._steps, f"{trial_id} joined twice"
        assert len(self._steps) < self.num_slots, "no free slot"
        if config.batch_clips == 13:
            raise MemoryError("13 clips do not fit")
        state: dict[str, Any] = {"step": 0, "trained": []}
        if state_dir is not None:
            state = json.loads((state_dir / "training_state.json").read_text())
        self._steps[trial_id] = state["step"]
        self._trained[trial_id] = state["trained"]
        self._configs[trial_id] = config
        self.log.append(("join", trial_id, self.num_steps))
        return {"parameters": 1000 * config.rank, "modules": {"q_proj": 4}, "step": state["step"]}

    def advance(self, stop: Callable[[], bool] | None = None) -> dict[str, dict[str, Any]]:
        if not self._steps:
            return {}
        every = next(iter(self._configs.values())).report_every_steps
        round_s = 0.3 if self._is_slow else float(os.environ.get("FAKE_ROUND_S", "0.02"))
        step_s = round_s / every
        while not (due := [trial_id for trial_id in sorted(self._steps) if self._is_due(trial_id)]):
            duration_s = step_s * random.uniform(0.5, 1.5)
            time.sleep(duration_s)
            self.train_s += duration_s
            self.num_steps += 1
            for trial_id, config in self._configs.items():
                rate = config.rates_at(self._steps[trial_id])["learning_rate"]
                self._steps[trial_id] += 1
                self._trained[trial_id].append([config.seed, self._steps[trial_id], rate])
                self._unreported.add(trial_id)
            if stop is not None and stop():
                return {}
        return {trial_id: self._report(trial_id) for trial_id in due}

    def _is_due(self, trial_id: str) -> bool:
        step, config = self._steps[trial_id], self._configs[trial_id]
        at_report = step % config.report_every_steps == 0 and trial_id in self._unreported
        return at_report or step >= config.num_steps

    def _report(self, trial_id: str) -> dict[str, Any]:
        config, step = self._configs[trial_id], self._steps[trial_id]
        self._unreported.discard(trial_id)
        metrics = {"step": step, **curve(config, step), "tokens_per_s": random.random()}
        if config.batch_clips == 17:
            del metrics["val/text/nll"]
            return {**metrics, "status": "failed", "reason": "ValueError: odd size"}
        if config.learning_rate > 5e-2 and step >= 2 * config.report_every_steps:
            nan = {"val/text/nll": math.nan, "val/audio/nll_per_code": math.nan}
            return {**metrics, **nan, "status": "diverged", "reason": f"NaN at step {step}"}
        done = step >= config.num_steps
        return {**metrics, "status": "completed" if done else "running", "reason": None}

    def leave(self, trial_id: str) -> None:
        for of_trial in (self._steps, self._configs, self._trained):
            del of_trial[trial_id]
        self._unreported.discard(trial_id)
        self.log.append(("leave", trial_id, self.num_steps))

    @property
    def num_residents(self) -> int:
        return len(self._steps)

    @property
    def num_forwards(self) -> int:
        return self.num_steps

    def check(self) -> None:
        pass

    def snapshot(self, trial_id: str) -> Callable[[Path], None]:
        state = json.dumps({"step": self._steps[trial_id], "trained": self._trained[trial_id]})

        def write(directory: Path) -> None:
            (directory / "adapter_config.json").write_text("{}")
            (directory / "training_state.json").write_text(state)

        return write


def curve(config: TrialConfig, step: int) -> dict[str, float]:
    """Validation metrics after `step` steps: a function of the configuration alone."""
    miss = abs(math.log10(config.learning_rate) + 2.8)
    flag = {"off": 0.0, "audio_self": -0.1, "text_to_audio": -0.4}[config.cross_attention]
    floor = 2.0 + miss + 4 / config.rank + flag + (config.seed % 1000) * 1e-5
    text = floor + (9.0 - floor) * math.exp(-3 * step / config.num_steps)
    gain = 0.5 * step / config.num_steps
    audio = 3.0 - 0.2 * step / config.num_steps
    if config.audio_loss_weight < 0.01:
        audio = 3.0 + 0.5 * step / config.num_steps
    return {
        "val/text/nll": text,
        "val/text/nll_swapped": text + gain,
        "val/text/audio_gain": gain,
        "val/audio/nll_per_code": audio,
    }
