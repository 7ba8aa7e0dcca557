"""How many trials train together in a worker: `tune.slots_per_worker`, or what its device holds."""

import time
from collections.abc import Callable
from typing import Any

import ray
from ray._private.utils import estimate_available_memory  # knows cgroups' limits
from ray.exceptions import RayActorError, RayTaskError

from higgs_tune.config import SweepConfig
from higgs_tune.errors import ConfigError, SweepError
from higgs_tune.sweep.control import Control
from higgs_tune.sweep.nodes import (
    PATIENCE_S,
    cannot_start,
    cpus_of_worker,
    most_on_one_node,
    shortage,
)
from higgs_tune.sweep.places import absolute_paths


def slots_of(config: SweepConfig) -> int:
    """The number of slots of a worker; `config` must come from `resolve_slots` if it was `auto`."""
    assert config.tune.slots_per_worker != "auto"
    return config.tune.slots_per_worker


def resolve_slots(
    config: SweepConfig, control: Control, warn: Callable[[str], None]
) -> SweepConfig:
    """The configuration with `tune.slots_per_worker: auto` replaced by a number.

    An actor with a worker's resources, hence on a machine like a worker's, counts what fits there. There
    are never more slots than trials to fill them.

    Args:
        control: if it stops the sweep meanwhile, the configuration is returned unchanged.
        warn: called once if no machine is there to count on.

    Raises:
        ConfigError: not even one trial fits.
        SweepError: the actor cannot start, or dies again and again.
        ModelError: the base's configuration cannot be read.
    """
    tune = config.tune
    fitting = _ask_a_machine(config, control, warn)
    if fitting is None:
        return config
    if fitting == 0:
        raise ConfigError(
            "tune.slots_per_worker: auto finds no memory for a single trial. Lower "
            "train.token_budget, data.max_frames, the ranks, or what target_sets and "
            "cross_attention add."
        )
    slots = min(fitting, -(-tune.num_trials // tune.num_workers))
    return config.model_copy(update={"tune": tune.model_copy(update={"slots_per_worker": slots})})


def _ask_a_machine(
    config: SweepConfig, control: Control, warn: Callable[[str], None]
) -> int | None:
    """How many trials fit on a machine like a worker's; None if the sweep stops before it answers."""
    num_cpus, num_gpus = cpus_of_worker(config.tune), config.tune.gpus_per_worker
    remote: Any = ray.remote(Counter)
    # as often as Ray retries a task
    lives = {"max_restarts": 3, "max_task_retries": 3}
    counter = remote.options(num_cpus=num_cpus, num_gpus=num_gpus, **lives).remote()
    is_there = counter.__ray_ready__.remote()
    answer = counter.count.remote(absolute_paths(config), num_cpus)
    asked_at, warned = time.monotonic(), False
    try:
        while not ray.wait([answer], timeout=1)[0]:
            if control.stopping:
                return None
            late = time.monotonic() - asked_at >= PATIENCE_S
            if late and not warned and not ray.wait([is_there], timeout=0)[0]:
                warned = True
                who = "a machine on which to determine tune.slots_per_worker"
                warn(shortage(who, num_cpus, num_gpus))
        return ray.get(answer)
    except RayTaskError as error:
        raise error.cause from None
    except RayActorError as error:
        who = "the process that determines tune.slots_per_worker"
        raise SweepError(f"{who} {cannot_start(error)}.") from None
    finally:
        ray.kill(counter)  # the workers need its resources


class Counter:
    """An actor that counts slots on a machine where a worker could run."""

    def count(self, config: SweepConfig, num_cpus: int) -> int:
        """How many trials fit into the GPU's free memory or, without GPU, a worker's share of the host's."""
        import torch  # which the driver does not need

        from higgs_tune.train.capacity import slots_on_cpu, slots_on_gpu
        from higgs_tune.train.fit_cli import base_shape

        shape = base_shape(config.base, None)
        if config.tune.gpus_per_worker:
            free_bytes, _ = torch.cuda.mem_get_info()
            return slots_on_gpu(config, shape, free_bytes)
        free_bytes = _free_host_bytes() // most_on_one_node(config.tune.num_workers, num_cpus)
        return slots_on_cpu(config, shape, free_bytes, num_cpus)


def _free_host_bytes() -> int:
    """Bytes that can be allocated without swapping, within the limit of a container."""
    with open("/proc/meminfo", encoding="ascii") as file:
        lines = dict(line.split(":") for line in file)
    on_host = int(lines["MemAvailable"].split()[0]) * 1024
    return min(on_host, estimate_available_memory())
