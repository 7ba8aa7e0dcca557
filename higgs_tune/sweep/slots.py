"""How many trials train together in a worker: `tune.slots_per_worker`, or what its device holds."""

from typing import Any

import ray
from ray.exceptions import RayTaskError

from higgs_tune.config import SweepConfig
from higgs_tune.errors import ConfigError
from higgs_tune.sweep.nodes import cpus_of_worker


def slots_of(config: SweepConfig) -> int:
    """The slots of a worker, of a configuration that `resolve_slots` has been through."""
    assert config.tune.slots_per_worker != "auto"
    return config.tune.slots_per_worker


def resolve_slots(config: SweepConfig) -> SweepConfig:
    """The configuration with a number for `tune.slots_per_worker`.

    With `auto` a task with a worker's resources, so on a machine like its, counts what fits there.
    More than the sweep has trials would stand idle.

    Raises:
        ConfigError: not even one trial fits.
        ModelError: the base's configuration cannot be read.
    """
    tune = config.tune
    if tune.slots_per_worker != "auto":
        return config
    num_cpus = cpus_of_worker(tune)
    task: Any = ray.remote(_count).options(num_cpus=num_cpus, num_gpus=tune.gpus_per_worker)
    try:
        fitting = ray.get(task.remote(config, num_cpus))
    except RayTaskError as error:
        raise error.cause from None
    if fitting == 0:
        raise ConfigError(
            "tune.slots_per_worker: auto finds no memory for a single trial. Lower "
            "train.token_budget, data.max_frames, the ranks, or what target_sets and "
            "cross_attention add."
        )
    slots = min(fitting, -(-tune.num_trials // tune.num_workers))
    return config.model_copy(update={"tune": tune.model_copy(update={"slots_per_worker": slots})})


def _count(config: SweepConfig, num_cpus: int) -> int:
    """Runs where a worker will: what fits into the memory that is free there."""
    import torch  # the driver does without

    from higgs_tune.train.capacity import slots_on_cpu, slots_on_gpu
    from higgs_tune.train.fit_cli import base_shape

    shape = base_shape(config.base, None)
    if config.tune.gpus_per_worker:
        free_bytes, _ = torch.cuda.mem_get_info()
        return slots_on_gpu(config, shape, free_bytes)
    return slots_on_cpu(config, shape, _free_host_bytes() // config.tune.num_workers, num_cpus)


def _free_host_bytes() -> int:
    """What Linux can give out without swapping."""
    with open("/proc/meminfo", encoding="ascii") as file:
        lines = dict(line.split(":") for line in file)
    return int(lines["MemAvailable"].split()[0]) * 1024
