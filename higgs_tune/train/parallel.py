"""The processes of one training run: how work is divided, and what is summed over all of them.

A process that was started alone sums nothing and waits for no other.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import get_cpu_distributed_information
from torch import Tensor

from higgs_tune.data.collate import TargetCounts
from higgs_tune.errors import ConfigError, HiggsTuneError
from higgs_tune.model.packed_lora import AdapterBank

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place among those that train one run together."""

    rank: int = 0
    size: int = 1
    # sums on the host, so that a GPU need not wait
    host_group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part: every n-th item, so that clips sorted by length spread evenly."""
        return items[self.rank :: self.size]

    def sum(self, values: Tensor) -> Tensor:
        """Sum a host tensor over all processes, in place; the result is the same to the bit everywhere."""
        if self.size > 1:
            dist.all_reduce(values, group=self.host_group)
        return values

    def sum_counts(self, counts: TargetCounts) -> TargetCounts:
        """Targets of the whole step, over all processes; its losses are divided by them."""
        if self.size == 1:
            return counts
        total = self.sum(torch.from_numpy(np.append(counts.audio_C, counts.text)))
        return TargetCounts(int(total[-1]), total[:-1].numpy())

    def sum_gradients(self, bank: AdapterBank) -> None:
        """Sum the step's gradients over all processes, in fp32 whatever they were computed in."""
        if self.size == 1:
            return
        bank.accumulate_gradients(bank.seats)
        for storage in bank.storages():
            dist.all_reduce(storage.grad if storage.grad_sum is None else storage.grad_sum)

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process."""
        return bool(self.sum(torch.tensor([int(flag)]))[0]) if self.size > 1 else flag

    def agree(self, value: object) -> bool:
        """Whether the value, which must pickle, is equal in all processes."""
        return not self.any(self.on_main(lambda: value) != value)

    def highest(self, value: float) -> float:
        """The largest value of all processes."""
        largest = torch.tensor([value], dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.host_group)
        return float(largest[0])

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` in the main process only; all processes get its result or its `HiggsTuneError`.

        The result must pickle.
        """
        if self.size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except HiggsTuneError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.host_group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


ALONE = World()


def join_world(device: str, dtype: str) -> tuple[World, str]:
    """Join the other processes that `accelerate launch` or `torchrun` started.

    Args:
        device: base.device.
        dtype: base.dtype, which accelerate's mixed precision must not contradict.

    Returns:
        The world, and the name of this process's device, as `load_base` takes it.

    Raises:
        ConfigError: accelerate was asked for something that a frozen base with adapters does not use, or
            that contradicts `device` or `dtype`; `device` names one GPU for several processes; or this
            process finds no GPU.
    """
    _check_accelerate(dtype)
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        if device not in ("auto", "cpu"):
            raise ConfigError(
                f"base.device is {device!r}, and accelerate was asked for the CPU. "
                "Leave out --cpu, or set base.device to cpu."
            )
        device = "cpu"
    size = get_cpu_distributed_information().world_size  # torchrun's variables, or MPI's
    if size == 1:
        _check_alone()
        return ALONE, device
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"base.device is {device!r}, one device for {size} processes. "
            "Set it to auto: each process takes a GPU of its own."
        )
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if not on_cpu:
        _check_gpus(int(os.environ.get("LOCAL_RANK", "0")))
    state = PartialState(cpu=on_cpu)
    assert state.num_processes == size, state
    group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    return World(state.process_index, state.num_processes, group), str(state.device)


def leave_world(world: World) -> None:
    """Leave the process group at the end of a run."""
    if world.size > 1:
        PartialState().destroy_process_group()


def _check_alone() -> None:
    """Refuse to train alone if `accelerate launch --cpu` was asked for several processes but has no MPI."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ:
        raise ConfigError(
            "accelerate launch --cpu starts several processes through MPI only, and has started one. "
            "Use accelerate launch --multi_gpu with --set base.device=cpu, or torchrun."
        )


def _check_gpus(local_rank: int) -> None:
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank} of this machine finds no GPU for itself: torch sees "
            f"{torch.cuda.device_count()}. Start as many processes as there are GPUs, or set "
            "base.device to cpu."
        )


def _check_accelerate(dtype: str) -> None:
    """Refuse settings of accelerate that would be ignored."""
    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted != "no" and not (wanted == "bf16" and dtype == "bfloat16"):
        raise ConfigError(
            f"accelerate's mixed precision is {wanted}, base.dtype {dtype}. The base's dtype decides "
            "here: use --mixed_precision no, and --set base.dtype=bfloat16 for bf16."
        )
    for name, what in (
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ):
        if os.environ.get(name, "false").lower() == "true":
            raise ConfigError(
                f"accelerate was asked for {what}, which splits a model; here each process holds the "
                "frozen base whole. Use plain multi-GPU: accelerate launch --multi_gpu."
            )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ConfigError(
            "accelerate's dynamo_backend has no effect here. "
            "Use --dynamo_backend no, and --set base.compile=true to compile."
        )
    if int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) != 1:
        raise ConfigError(
            "accelerate's gradient_accumulation_steps has no effect here. "
            "Use --set run.gradient_accumulation_steps=N."
        )
