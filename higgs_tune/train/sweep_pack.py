"""The pack of a sweep's worker: slots that can hold every trial of the sweep."""

from higgs_tune.config import SweepConfig, TargetPath
from higgs_tune.train.loop import PackLoop
from higgs_tune.train.residents import PackLimits


def sweep_limits(config: SweepConfig, num_slots: int) -> PackLimits:
    """Limits that hold every trial of a sweep, the baselines included."""
    names = {*config.space.target_set, config.baseline.target_set}
    paths: set[TargetPath] = {path for name in names for path in config.target_sets[name]}
    if config.cross_attention_modes != {"off"}:
        paths.add("audio_attention")
    return PackLimits(
        num_slots=num_slots,
        max_rank=max(*config.space.rank, config.baseline.rank),
        paths=frozenset(paths),
    )


def sweep_loop(config: SweepConfig, *, num_slots: int, device: str) -> PackLoop:
    """A loop whose slots can hold every trial of a sweep, the baselines included.

    Raises:
        ConfigError, DataError, ModelError, LeakError: see `PackLoop.load`, `TrainOrder`.
    """
    limits = sweep_limits(config, num_slots)
    base = config.base.model_copy(update={"device": device})
    loop = PackLoop.load(base, config.data, limits)
    loop.train_order(1, 0)  # fail here, not in a trial, if there is no row to train on
    return loop
