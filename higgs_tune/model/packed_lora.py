"""The parameters of a pack: one flat row per adapter, seen module by module.

The LoRA factors of K slots live in one (K, P) buffer, every slot laid out densely for its own rank, so
that no matmul multiplies padding; slots of equal rank have equal offsets. The new cross-attention
modules of an adapter, large and wanted by few, live in a buffer of their own while it is seated. Clearing,
clipping and stepping are operations on a few long ranges whatever the model's depth.

Shape letters: K slots (or adapters of a batch), k adapters of a run, P columns, N rows, D inputs,
O outputs, r rank.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from higgs_tune.config import TargetPath
from higgs_tune.model.adapter_layout import (
    Kind,
    Layout,
    Linears,
    Named,
    Storage,
    Where,
    lora_layout,
)
from higgs_tune.model.dropout import Masks


@dataclass(frozen=True)
class Part:
    """A contiguous range of one adapter's parameters."""

    kind: Literal["lora", "new"]
    path: TargetPath
    storage: Storage
    where: Where


@dataclass(eq=False)
class Seat:
    """What a slot holds."""

    rank: int
    scale: float
    dropout: float
    paths: frozenset[TargetPath]  # adapted by LoRA
    layout: Layout
    new_layout: Layout
    new: Storage | None

    def like(self, other: "Seat") -> bool:
        """Whether the two may share a matmul."""
        mine, theirs = ((s.rank, s.scale, s.dropout) for s in (self, other))
        return mine == theirs


class AdapterBank:
    """The parameters of up to K adapters."""

    def __init__(
        self,
        groups: Sequence[tuple[TargetPath, Linears]],
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_slots = num_slots
        self.device, self._dtype, self.groups = device, dtype, groups
        self._layouts: dict[int, Layout] = {}
        self.lora = Storage((num_slots, self._layout(max_rank).num_columns), dtype, device)
        self.seats: dict[int, Seat] = {}
        self._packs: dict[tuple[int, ...], PackWeights] = {}
        # makes a frozen input's product differentiable; never gets a gradient
        self.anchor = torch.zeros((), device=device, requires_grad=True)

    def seat(
        self,
        slot: int,
        rank: int,
        scale: float,
        paths: Iterable[TargetPath],
        new: Sequence[Named] = (),
        dropout: float = 0.0,
    ) -> None:
        """Lay a free slot out for an adapter; all its parameters are zero."""
        assert slot not in self.seats, slot
        new_layout = Layout([new])
        size = (new_layout.num_columns,)
        storage = Storage(size, self._dtype, self.device) if new else None
        adapted = frozenset(paths)
        layout = self._layout(rank)
        self.seats[slot] = Seat(rank, scale, dropout, adapted, layout, new_layout, storage)
        self._packs.clear()

    def clear(self, slot: int) -> None:
        """Free a slot and zero everything it held."""
        if self.seats.pop(slot, None) is not None:
            for buffer in self.lora.buffers():
                buffer[slot].zero_()
            self._packs.clear()

    def views(self, slot: int, kind: Kind) -> dict[str, Tensor]:
        """Full names → the adapter's tensors in one of the buffers, no copy."""
        return self._cut(slot, kind, lambda row: row)

    def copies(self, slot: int, kind: Kind) -> dict[str, Tensor]:
        """The same on the host, in memory of their own; a GPU sends a row in one piece."""
        views = self._cut(slot, kind, Tensor.cpu)
        return {name: view.clone() for name, view in views.items()}

    def _cut(self, slot: int, kind: Kind, moved: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        seat = self.seats[slot]
        row_P = moved(getattr(self.lora, kind)[slot, : seat.layout.num_columns])
        views = {
            entry.name: row_P[entry.columns].view(entry.shape)
            for entry in seat.layout.entries.values()
            if entry.path in seat.paths
        }
        if seat.new is not None:
            flat = moved(getattr(seat.new, kind))
            for entry in seat.new_layout.entries.values():
                views[entry.name] = flat[entry.columns].view(entry.shape)
        return views

    def parts(self, slot: int) -> list[Part]:
        """The adapter's own ranges: LoRA path by path, then the new modules."""
        seat = self.seats[slot]
        parts = [
            Part("lora", path, self.lora, (slot, columns))
            for path in sorted(seat.paths)
            for columns in seat.layout.ranges([path])
        ]
        if seat.new is not None:
            parts.append(Part("new", "audio_attention", seat.new, (slice(None),)))
        return parts

    def storages(self) -> Iterator[Storage]:
        """The LoRA buffers and those of the new modules."""
        yield self.lora
        yield from (seat.new for seat in self.seats.values() if seat.new is not None)

    def keep_gradients(self, slots: Iterable[int]) -> None:
        """Make room for another micro-batch of these adapters' steps."""
        for slot in slots:
            for part in self.parts(slot):
                part.storage.keep_gradient(part.where)

    def clear_gradients(self, slots: Iterable[int]) -> None:
        """Zero what a step of these adapters has used."""
        for slot in slots:
            for part in self.parts(slot):
                part.storage.clear_gradient(part.where)

    def refresh_compute(self) -> None:
        """Copy the master weights to the compute copy, where that is another tensor."""
        for storage in self.storages():
            if storage.compute is not storage.master:
                storage.compute.copy_(storage.master)

    def pack(self, slots: tuple[int, ...]) -> "PackWeights":
        """The adapters at a batch's slots."""
        if slots not in self._packs:
            self._packs[slots] = PackWeights(self, slots)
        return self._packs[slots]

    def _layout(self, rank: int) -> Layout:
        if rank not in self._layouts:
            self._layouts[rank] = lora_layout(self.groups, rank)
        return self._layouts[rank]


@dataclass(frozen=True, eq=False)
class Run:
    """Adapters whose rows share a matmul: neighbours in the bank with one rank, scale and dropout.

    A run of one has an integer for its rows and no leading dimension.
    """

    rows: int | slice  # positions among the batch's adapters
    scale: float
    dropout: float
    a_krD: Tensor  # factors of the group's linears, stacked
    a_grad_krD: Tensor
    b_kOr: list[Tensor]  # of each linear
    b_grad_kOr: list[Tensor]


@dataclass(eq=False)
class PackWeights:
    """The adapters of one batch as the forward wants them."""

    bank: AdapterBank
    slots: tuple[int, ...]
    masks: Masks | None = None  # of a training forward in which somebody has dropout
    _runs: dict[str, list[Run]] = field(default_factory=dict)
    _new: dict[tuple[str, ...], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def training(self, masks: Masks | None) -> "PackWeights":
        """The same adapters in a forward that drops inputs."""
        return self if masks is None else replace(self, masks=masks)

    def runs(self, group: Linears) -> list[Run]:
        """The runs of an input group; adapters that do not target it are in none."""
        first = next(iter(group))
        if first not in self._runs:
            self._runs[first] = [self._run(span, group) for span in self._spans(first)]
        return self._runs[first]

    def new_tensors(
        self, names: tuple[str, ...], adapters: Sequence[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """For each of these adapters the named new weights, stacked, and their gradient."""
        key = (*names, *map(str, adapters))
        if key not in self._new:
            self._new[key] = [self._new_tensor(self.slots[j], names) for j in adapters]
        return self._new[key]

    def _new_tensor(self, slot: int, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        seat = self.bank.seats[slot]
        assert seat.new is not None
        entries = [seat.new_layout.entries[name] for name in names]
        columns = slice(entries[0].columns.start, entries[-1].columns.stop)
        shape = (-1, *entries[0].shape[1:])
        return seat.new.compute[columns].view(shape), seat.new.grad[columns].view(shape)

    def _spans(self, name: str) -> list[tuple[int, int]]:
        """Positions [start, stop) of neighbours that may share a matmul.

        On a CPU every adapter multiplies alone: a matmul of its own is as fast there, and what it
        computes does not depend on who sits beside it, to the last bit.
        """
        seats = self.bank.seats
        spans: list[tuple[int, int]] = []
        for position, slot in enumerate(self.slots):
            seat = seats[slot]
            factor = seat.layout.entries.get(f"{name}.lora_A.weight")  # None: no trial adapts it
            if factor is None or factor.path not in seat.paths:
                continue
            if spans and spans[-1][1] == position and self.bank.device.type != "cpu":
                before = self.slots[position - 1]
                if seat.like(seats[before]) and slot == before + 1:
                    spans[-1] = (spans[-1][0], position + 1)
                    continue
            spans.append((position, position + 1))
        return spans

    def _run(self, span: tuple[int, int], group: Linears) -> Run:
        start, stop = span
        seat = self.bank.seats[self.slots[start]]
        first, last = self.slots[start], self.slots[stop - 1]
        where = first if first == last else slice(first, last + 1)
        entries = seat.layout.entries
        a = [entries[f"{name}.lora_A.weight"] for name in group]
        a_columns = slice(a[0].columns.start, a[-1].columns.stop)
        a_shape = (seat.rank * len(a), a[0].shape[1])
        b = [entries[f"{name}.lora_B.weight"] for name in group]
        compute, grad = self.bank.lora.compute[where], self.bank.lora.grad[where]
        return Run(
            rows=start if first == last else slice(start, stop),
            scale=seat.scale,
            dropout=seat.dropout,
            a_krD=compute[..., a_columns].unflatten(-1, a_shape),
            a_grad_krD=grad[..., a_columns].unflatten(-1, a_shape),
            b_kOr=[compute[..., entry.columns].unflatten(-1, entry.shape) for entry in b],
            b_grad_kOr=[grad[..., entry.columns].unflatten(-1, entry.shape) for entry in b],
        )
