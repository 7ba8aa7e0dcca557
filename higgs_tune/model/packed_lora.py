"""The parameters of a pack: one flat row per adapter, seen module by module.

All LoRA factors (and the new cross-attention modules) of K slots live in one (K, P) buffer; each module
sees a leaf tensor that aliases its columns, and autograd adds gradients straight into a second (K, P)
buffer. So clearing, clipping and stepping are a few whole-buffer operations whatever the model's depth.
Ranks below the pack's are padded with zeros: with A and B both zero there, both gradients are zero and
stay so. What an adapter does not target is zero for the same reason.

Shape letters: K slots (or adapters of a batch), P columns, N rows, D inputs, O outputs, r padded rank.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Views of a bank are strided by design; autograd adds into them in place all the same.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")

_ALIGN = 8  # columns; keeps bf16 views on 16-byte borders


@dataclass(frozen=True)
class Entry:
    """A tensor of every slot, at fixed columns of the bank."""

    name: str
    shape: tuple[int, ...]  # per slot
    path: str  # target path it belongs to
    kind: Literal["lora", "new"]
    offset: int = 0

    @property
    def numel(self) -> int:
        """Columns taken, without alignment."""
        return int(torch.Size(self.shape).numel())


def group_entries(group: Mapping[str, nn.Linear], path: str, rank: int) -> list[Entry]:
    """Entries of one input group: the A factors stacked, so that one matmul reads the input once."""
    first = next(iter(group.values()))
    entries = [Entry(f"{'+'.join(group)}.A", (rank * len(group), first.in_features), path, "lora")]
    return entries + [
        Entry(f"{name}.B", (linear.out_features, rank), path, "lora")
        for name, linear in group.items()
    ]


class AdapterBank:
    """Master weights, gradients and Adam moments of K slots."""

    def __init__(
        self, entries: Sequence[Entry], num_slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.entries: dict[str, Entry] = {}
        offset = 0
        for entry in entries:
            self.entries[entry.name] = Entry(
                entry.name, entry.shape, entry.path, entry.kind, offset
            )
            offset += -(-entry.numel // _ALIGN) * _ALIGN
        shape = (num_slots, offset)
        self.num_slots = num_slots
        self.master_KP = torch.zeros(shape, device=device)
        self.exp_avg_KP = torch.zeros(shape, device=device)
        self.exp_avg_sq_KP = torch.zeros(shape, device=device)
        # compute and gradient are in the base's dtype; in fp32 compute is the master itself
        self.compute_KP = (
            self.master_KP
            if dtype == torch.float32
            else torch.zeros(shape, dtype=dtype, device=device)
        )
        self.grad_KP = torch.zeros(shape, dtype=dtype, device=device)
        # fp32 sums over the micro-batches of a step, made when first needed
        self.grad_sum_KP: Tensor | None = None
        self.leaves: dict[str, Tensor] = {}
        for name in self.entries:
            leaf = self.view(self.compute_KP, name).detach().requires_grad_()
            leaf.grad = self.view(self.grad_KP, name)
            self.leaves[name] = leaf

    def view(self, buffer_KP: Tensor, name: str) -> Tensor:
        """One entry's columns of a bank-shaped buffer, (K, *entry.shape), no copy."""
        entry = self.entries[name]
        columns = buffer_KP[:, entry.offset : entry.offset + entry.numel]
        return columns.unflatten(1, entry.shape)

    def columns(self, *, path: str | None = None, kind: str | None = None) -> list[slice]:
        """Column ranges of a path or kind, adjacent ranges merged."""
        merged: list[slice] = []
        for entry in self.entries.values():
            if path not in (None, entry.path) or kind not in (None, entry.kind):
                continue
            start, stop = entry.offset, entry.offset + -(-entry.numel // _ALIGN) * _ALIGN
            if merged and merged[-1].stop == start:
                start = merged.pop().start
            merged.append(slice(start, stop))
        return merged

    def clear_slot(self, slot: int) -> None:
        """Zero everything a slot holds."""
        buffers = (
            self.master_KP,
            self.exp_avg_KP,
            self.exp_avg_sq_KP,
            self.compute_KP,
            self.grad_KP,
        )
        for buffer in buffers:
            buffer[slot].zero_()
        if self.grad_sum_KP is not None:
            self.grad_sum_KP[slot].zero_()

    def keep_gradients(self) -> None:
        """Make room for another micro-batch: bf16 gradients go to an fp32 sum, fp32 ones add up."""
        if self.grad_KP.dtype == torch.float32:
            return
        if self.grad_sum_KP is None:
            self.grad_sum_KP = torch.zeros_like(self.grad_KP, dtype=torch.float32)
        self.grad_sum_KP += self.grad_KP
        self.grad_KP.zero_()

    def take_gradients(self) -> Tensor:
        """The step's gradients in fp32, (K, P); those kept so far are cleared."""
        grad_KP = self.grad_KP.float()
        if self.grad_sum_KP is None:
            return grad_KP
        total_KP = self.grad_sum_KP + grad_KP
        self.grad_sum_KP.zero_()
        return total_KP

    def refresh_compute(self) -> None:
        """Copy the master weights to the compute copy, where that is another tensor."""
        if self.compute_KP is not self.master_KP:
            self.compute_KP.copy_(self.master_KP)


@dataclass(frozen=True, eq=False)
class PackWeights:
    """The adapters of one batch: the bank's leaves at the batch's slots, and their LoRA scales."""

    leaves: Mapping[str, Tensor]
    scale_K11: Tensor  # float32

    @classmethod
    def of(cls, bank: AdapterBank, slots: Sequence[int], scale_K: Tensor) -> "PackWeights":
        """Select `slots` (ascending); no copy when that is all of them."""
        if len(slots) == bank.num_slots:
            return cls(bank.leaves, scale_K[:, None, None])
        index = torch.tensor(slots, device=bank.compute_KP.device)
        leaves = {name: leaf.index_select(0, index) for name, leaf in bank.leaves.items()}
        return cls(leaves, scale_K.index_select(0, index)[:, None, None])


def adapted_linear(
    x_KND: Tensor, group: Mapping[str, nn.Linear], weights: PackWeights | None
) -> list[Tensor]:
    """Apply the linears of one input group, each adapter's rows with its own LoRA.

    Returns:
        (K, N, O) for each linear, in the group's order. Row-wise matmuls keep a NaN in its adapter.
    """
    outputs = [F.linear(x_KND, linear.weight, linear.bias) for linear in group.values()]
    if weights is None:
        return outputs
    a_KrD = weights.leaves.get(f"{'+'.join(group)}.A")
    if a_KrD is None:
        return outputs
    z_KNr = (torch.bmm(x_KND, a_KrD.transpose(1, 2)) * weights.scale_K11).to(x_KND.dtype)
    return [
        torch.baddbmm(y_KNO, z, weights.leaves[f"{name}.B"].transpose(1, 2))
        for y_KNO, z, name in zip(outputs, z_KNr.chunk(len(group), dim=2), group, strict=True)
    ]
