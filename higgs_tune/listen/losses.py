"""Losses of the base and of adapters on the held-out clips, computed as in training's validation."""

import math
from collections.abc import Sequence
from pathlib import Path

from higgs_tune.config import DataSettings
from higgs_tune.data.dataset import Dataset
from higgs_tune.errors import ModelError
from higgs_tune.model.load import Base
from higgs_tune.train.checkpoint import load_weights, read_trial
from higgs_tune.train.loop import PackLoop
from higgs_tune.train.residents import PackLimits


def validation_losses(
    base: Base, dataset: Dataset, data: DataSettings, adapters: Sequence[Path]
) -> tuple[list[dict[str, float]], int]:
    """Validation metrics of the untouched base, then of each adapter; and the number of clips.

    Raises:
        DataError, LeakError: see `PackLoop`.
        ModelError: an adapter cannot be read, does not fit the base, or has non-finite losses.
    """
    trials = [read_trial(adapter) for adapter in adapters]
    loop = PackLoop(base, dataset, data, PackLimits.of(trials, num_slots=1))
    losses = [loop.base_metrics]
    for adapter, trial in zip(adapters, trials, strict=True):
        try:
            loop.engine.add("adapter", trial, load_weights(adapter, trial))
        except ValueError as error:
            raise ModelError(f"{adapter}: does not fit the base {base.source}: {error}") from error
        found = loop.validate(["adapter"])["adapter"]
        broken = next((name for name, value in found.items() if not math.isfinite(value)), None)
        if broken is not None:
            raise ModelError(
                f"{adapter}: its {broken} is {found[broken]}: the training has diverged, or the file is "
                "damaged. Leave it out, or give an earlier checkpoint."
            )
        losses.append(found)
        loop.engine.remove("adapter")
    return losses, len(loop.transcribe)
