"""The layout of an adapter's parameters in a flat row, the buffers that hold such rows, and slots' contents.

Shape letters: K slots, P columns.
"""

import math
import mmap
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from higgs_tune.config import TargetPath

Linears = Mapping[str, nn.Linear]
"""Full names → linears that read the same input."""

Kind = Literal["master", "exp_avg", "exp_avg_sq", "compute", "grad"]
Named = tuple[str, tuple[int, ...], TargetPath]
Where = tuple[int | slice, ...]  # an index into a storage's buffers

# columns: fp32 views start at 64-byte boundaries in every slot, so that no kernel treats slots differently
_ALIGN = 16

# Ranks above a quarter of the highest are laid out for the highest, and so on for the ranks below: one class
# for all would waste optimizer work on zeros. A lower class ends at a multiple of _RANK_MULTIPLE, the number
# of bf16 values that a GPU's matrix units read at once.
_CLASS_FACTOR, _RANK_MULTIPLE = 4, 8


@dataclass(frozen=True)
class Entry:
    """A tensor of an adapter at fixed columns of its row."""

    name: str
    shape: tuple[int, ...]
    path: TargetPath
    offset: int

    @property
    def columns(self) -> slice:
        """Its columns in the row."""
        return slice(self.offset, self.offset + torch.Size(self.shape).numel())


class Layout:
    """Names → columns of one adapter's row."""

    def __init__(self, blocks: Iterable[Sequence[Named]]) -> None:
        """Lay out the tensors in order, those of one block without gaps between them."""
        self.entries: dict[str, Entry] = {}
        offset = 0
        for block in blocks:
            for name, shape, path in block:
                entry = Entry(name, shape, path, offset)
                self.entries[name] = entry
                offset = entry.columns.stop
            offset = -(-offset // _ALIGN) * _ALIGN
        self.num_columns = offset

    def ranges(self, paths: Iterable[str]) -> list[slice]:
        """Columns of some paths; adjacent entries are merged, together with the gap between them."""
        wanted, merged = set(paths), []
        after = -1  # end of the last range
        for entry in self.entries.values():
            if entry.path not in wanted:
                continue
            start, stop = entry.columns.start, entry.columns.stop
            if start - after < _ALIGN and merged:
                start = merged.pop().start
            merged.append(slice(start, stop))
            after = stop
        return merged


def lora_layout(groups: Sequence[tuple[TargetPath, Linears]], rank: int) -> Layout:
    """Layout of all groups' factors at one rank, path by path, with PEFT's names and shapes."""
    blocks: list[list[Named]] = []
    for path, group in sorted(groups, key=lambda item: item[0]):
        a: list[Named] = [
            (f"{name}.lora_A.weight", (rank, linear.in_features), path)
            for name, linear in group.items()
        ]
        b: list[Named] = [
            (f"{name}.lora_B.weight", (linear.out_features, rank), path)
            for name, linear in group.items()
        ]
        blocks += [a, *([one] for one in b)]
    return Layout(blocks)


def shared_rank(rank: int, highest: int) -> int:
    """The rank that a slot is laid out for where neighbours share matmuls: the highest of its class."""
    while (share := highest // _CLASS_FACTOR) >= _RANK_MULTIPLE:
        lower = -(-share // _RANK_MULTIPLE) * _RANK_MULTIPLE
        if lower < rank:
            break
        highest = lower
    return highest


class Storage:
    """Master weights, Adam moments, gradients and the compute copy: buffers of one shape."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        *,
        shared: bool = False,
    ) -> None:
        """Make the buffers, all zero.

        Args:
            shared: put them in host memory that processes forked from this one share; a page is allocated
                when it is first read or written.
        """
        self._maps: list[mmap.mmap] = []

        def zeros(kind: torch.dtype = torch.float32) -> Tensor:
            count = math.prod(shape)
            if not (shared and count):
                return torch.zeros(shape, dtype=kind, device=device)
            num_bytes = count * kind.itemsize
            try:  # anonymous memory, which a container's /dev/shm limit does not affect
                self._maps.append(mmap.mmap(-1, num_bytes))
            except OSError as error:
                raise MemoryError(f"cannot share {num_bytes / 2**20:.0f} MiB: {error}") from error
            return torch.frombuffer(self._maps[-1], dtype=kind, count=count).view(shape)

        self.master, self.exp_avg, self.exp_avg_sq = zeros(), zeros(), zeros()
        # compute and grad have the base's dtype; if that is fp32, compute is the master itself
        half = dtype != torch.float32
        self.compute = zeros(dtype) if half else self.master
        self.grad = zeros(dtype)
        # fp32 sum over a step's micro-batches; allocated on first use, or before the fork if shared
        self.grad_sum: Tensor | None = zeros() if shared and half else None
        self._making_sum = threading.Lock()  # several lanes may allocate the sum at once

    def buffers(self) -> list[Tensor]:
        """Every buffer, each once."""
        every = [self.master, self.exp_avg, self.exp_avg_sq, self.grad]
        every += [self.compute] if self.compute is not self.master else []
        return every + ([self.grad_sum] if self.grad_sum is not None else [])

    def accumulate_gradient(self, where: Where) -> None:
        """Prepare for another micro-batch: add bf16 gradients to the fp32 sum; fp32 ones just accumulate."""
        if self.grad.dtype == torch.float32:
            return
        with self._making_sum:
            if self.grad_sum is None:
                self.grad_sum = torch.zeros_like(self.grad, dtype=torch.float32)
        self.grad_sum[where] += self.grad[where]
        self.grad[where].zero_()

    def leaf(self, where: Where) -> Tensor:
        """An autograd leaf: the compute copy at an index of the buffers; its `grad` is the gradient there."""
        leaf = self.compute[where].detach().requires_grad_()
        leaf.grad = self.grad[where]
        return leaf

    def gradient(self, where: Where) -> Tensor:
        """The step's fp32 gradient at an index of the buffers."""
        grad = self.grad[where].float()
        return grad if self.grad_sum is None else self.grad_sum[where] + grad

    def release_memory(self) -> None:
        """Zero all buffers if they are shared, and free their memory until they are used again."""
        try:
            for memory in self._maps:
                memory.madvise(mmap.MADV_REMOVE)
        except OSError:  # kernels without MADV_REMOVE, such as gVisor's, keep the memory
            for buffer in self.buffers():
                buffer.zero_()

    def clear_gradient(self, where: Where) -> None:
        """Zero the gradient at an index of the buffers."""
        self.grad[where].zero_()
        if self.grad_sum is not None:
            self.grad_sum[where].zero_()


@dataclass(frozen=True)
class Part:
    """A contiguous range of one adapter's parameters."""

    kind: Literal["lora", "new"]
    path: TargetPath
    storage: Storage
    where: Where


@dataclass(eq=False)
class Seat:
    """The adapter in a slot: its hyperparameters and its layout."""

    rank: int
    scale: float
    dropout: float
    paths: frozenset[TargetPath]  # adapted by LoRA
    layout: Layout
    new_layout: Layout
    new: Storage | None
    parts: list[Part]  # its ranges: LoRA path by path, then the new modules

    def keep(self, path: TargetPath) -> float:
        """The share of inputs of a path's linears that dropout keeps in training."""
        return 1 - self.dropout if path in self.paths else 1.0
