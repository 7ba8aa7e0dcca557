"""The parameters of a pack: one flat row per adapter, with views of each module's tensors.

The LoRA factors of K slots are in one (K, P) buffer. Where adapters share matmuls (on a GPU), a slot is laid
out for the highest rank of its adapter's class. So neighbours of a class have one layout, whatever their
ranks and targets; the parameters that an adapter does not have are zero, compute zero and get zero gradients.
Where each adapter multiplies alone (on a CPU), a slot is laid out densely for its own rank. New
cross-attention modules are large and rare, so an adapter that has them gets a separate buffer for them
while it has a slot. Clearing, clipping and stepping work on a few long ranges whatever the model's depth.

Shape letters: K slots (or adapters of a batch), k adapters of a run, P columns, N rows, D inputs,
O outputs, r rank, S without and with dropout.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from higgs_tune.config import TargetPath
from higgs_tune.model.adapter_layout import (
    Kind,
    Layout,
    Linears,
    Named,
    Part,
    Seat,
    Storage,
    lora_layout,
    shared_rank,
)
from higgs_tune.model.pack_weights import Factors, PackWeights

_MAX_PACKS = 64  # combinations of slots whose `PackWeights` are cached


class AdapterBank:
    """The parameters of up to K adapters."""

    def __init__(
        self,
        groups: Sequence[tuple[TargetPath, Linears]],
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        share_matmuls: bool = False,
        share_memory: bool = False,
        max_new_columns: int = 0,
    ) -> None:
        """Make room for the adapters.

        Args:
            groups: the linears that adapters may target, grouped by shared input, each group with its path.
            share_matmuls: whether neighbours share matmuls.
            share_memory: whether processes forked from this one share the buffers.
            max_new_columns: most columns of one adapter's new modules; needed with `share_memory`.
        """
        self.num_slots, self.share_matmuls, self.max_rank = num_slots, share_matmuls, max_rank
        self.device, self._dtype, self.groups = device, dtype, groups
        self.paths: frozenset[TargetPath] = frozenset(path for path, _ in groups)
        self._layouts: dict[int, Layout] = {}
        columns = self._layout(max_rank).num_columns
        self.lora = Storage((num_slots, columns), dtype, device, shared=share_memory)
        # reserved now: memory made after the fork cannot be shared; unused pages take none
        self._shared_new = [
            Storage((max_new_columns,), dtype, device, shared=True)
            for _ in range(num_slots if share_memory and max_new_columns else 0)
        ]
        # without and with dropout, which scales the kept inputs up
        self.scale_SK11 = torch.zeros(2, num_slots, 1, 1, device=device)
        self.seats: dict[int, Seat] = {}
        self._packs: dict[tuple[int, ...], PackWeights] = {}
        self._factors: dict[tuple[int, int, str], Factors] = {}
        # requires a gradient, so that layers whose input needs none are differentiated; never gets one
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
        """Lay out a free slot for an adapter; its parameters are zero if the slot was cleared."""
        assert slot not in self.seats, slot
        new_layout = Layout([new])
        size = new_layout.num_columns
        storage = None
        if new:
            reserved = self._shared_new
            storage = reserved[slot] if reserved else Storage((size,), self._dtype, self.device)
        adapted = frozenset(paths)
        layout = self._layout(self.layout_rank(rank))
        self.scale_SK11[0, slot] = scale
        self.scale_SK11[1, slot] = scale / (1 - dropout)
        self._forget_views()
        parts = [
            Part("lora", path, self.lora, (slot, columns))
            for path in sorted(adapted)
            for columns in layout.ranges([path])
        ]
        if storage is not None:
            parts.append(Part("new", "audio_attention", storage, (slice(size),)))
        self.seats[slot] = Seat(
            rank, scale, dropout, adapted, layout, new_layout, storage, parts
        )  # last, so that a failure above leaves the slot free

    def layout_rank(self, rank: int) -> int:
        """The rank that the slot of an adapter of this rank is laid out for."""
        return shared_rank(rank, self.max_rank) if self.share_matmuls else rank

    def clear(self, slot: int) -> None:
        """Free a slot and zero everything it held."""
        seat = self.vacate(slot)
        if seat is not None:
            for buffer in self.lora.buffers():
                buffer[slot].zero_()
            if seat.new is not None:
                seat.new.release_memory()

    def vacate(self, slot: int) -> Seat | None:
        """Free a slot but keep its memory as it is; returns the seat that was there."""
        self._forget_views()
        return self.seats.pop(slot, None)

    def views(self, slot: int, kind: Kind) -> dict[str, Tensor]:
        """Full names → the adapter's tensors in one of the buffers, no copy."""
        return self._cut(slot, kind, lambda row: row)

    def copies(self, slot: int, kind: Kind) -> dict[str, Tensor]:
        """Copies of `views` on the host; a GPU sends a row in one piece."""
        views = self._cut(slot, kind, Tensor.cpu)
        return {name: view.clone() for name, view in views.items()}

    def _cut(self, slot: int, kind: Kind, moved: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        seat = self.seats[slot]
        row_P = moved(getattr(self.lora, kind)[slot, : seat.layout.num_columns])
        views = {}
        for entry in seat.layout.entries.values():
            if entry.path in seat.paths:
                whole = row_P[entry.columns].view(entry.shape)
                is_a = entry.name.endswith("lora_A.weight")
                views[entry.name] = whole[: seat.rank] if is_a else whole[:, : seat.rank]
        if seat.new is not None:
            flat = moved(getattr(seat.new, kind))
            for entry in seat.new_layout.entries.values():
                views[entry.name] = flat[entry.columns].view(entry.shape)
        return views

    def storages(self) -> Iterator[Storage]:
        """The buffers of LoRA and of the new modules."""
        yield self.lora
        yield from (seat.new for seat in self.seats.values() if seat.new is not None)

    def accumulate_gradients(self, slots: Iterable[int]) -> None:
        """Prepare these adapters' gradients for another micro-batch of their steps."""
        for slot in slots:
            for part in self.seats[slot].parts:
                part.storage.accumulate_gradient(part.where)

    def clear_gradients(self, slots: Iterable[int]) -> None:
        """Zero these adapters' gradients."""
        for slot in slots:
            for part in self.seats[slot].parts:
                part.storage.clear_gradient(part.where)

    def refresh_compute(self) -> None:
        """Update the compute copies from the master weights, where they are separate tensors."""
        for storage in self.storages():
            if storage.compute is not storage.master:
                storage.compute.copy_(storage.master)

    def pack(self, slots: tuple[int, ...]) -> PackWeights:
        """The adapters at a batch's slots."""
        pack = self._packs.get(slots)
        if pack is None:
            if len(self._packs) >= _MAX_PACKS:
                self._packs.clear()  # another lane may still use one: it stays valid
            self._packs[slots] = pack = PackWeights(self, slots)
        return pack

    def factors(self, start: int, stop: int, group: Linears) -> Factors:
        """The factors of the slots [start, stop), which have one layout."""
        key = start, stop, next(iter(group))
        factors = self._factors.get(key)
        if factors is None:
            where = start if stop == start + 1 else slice(start, stop)
            entries = self.seats[start].layout.entries
            a = [entries[f"{name}.lora_A.weight"] for name in group]
            b = [entries[f"{name}.lora_B.weight"] for name in group]
            compute, grad = self.lora.compute[where], self.lora.grad[where]
            a_columns = slice(a[0].columns.start, a[-1].columns.stop)
            a_shape = (a[0].shape[0] * len(a), a[0].shape[1])
            self._factors[key] = factors = Factors(
                path=a[0].path,
                a_krD=compute[..., a_columns].unflatten(-1, a_shape),
                a_grad_krD=grad[..., a_columns].unflatten(-1, a_shape),
                b_kOr=[compute[..., entry.columns].unflatten(-1, entry.shape) for entry in b],
                b_grad_kOr=[grad[..., entry.columns].unflatten(-1, entry.shape) for entry in b],
            )
        return factors

    def _forget_views(self) -> None:
        self._packs.clear()
        self._factors.clear()

    def _layout(self, rank: int) -> Layout:
        if rank not in self._layouts:
            self._layouts[rank] = lora_layout(self.groups, rank)
        return self._layouts[rank]
