"""The parameters of a pack: one flat row per adapter, seen module by module.

The LoRA factors of K slots live in one (K, P) buffer. Where adapters share matmuls, on a GPU, a slot is
laid out for the highest rank of its adapter's class: neighbours of a class lie at one stride whatever
their ranks and targets, and what an adapter does not have is zero, computes zero and gets a gradient of
zero. Where each multiplies alone, on a CPU, a slot is laid out densely for its own rank. The new
cross-attention modules of an adapter, large and wanted by few, live in a buffer of their own while it is
seated. Clearing, clipping and stepping are operations on a few long ranges whatever the model's depth.

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

_MAX_PACKS = 64  # combinations of adapters whose runs are kept


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
            groups: the linears that adapters may target, by what they read, each with its path.
            share_matmuls: whether neighbours multiply together.
            share_memory: with the processes that are forked from this one.
            max_new_columns: of the new modules of one adapter; needed for memory that is shared.
        """
        self.num_slots, self.share_matmuls, self.max_rank = num_slots, share_matmuls, max_rank
        self.device, self._dtype, self.groups = device, dtype, groups
        self.paths: frozenset[TargetPath] = frozenset(path for path, _ in groups)
        self._layouts: dict[int, Layout] = {}
        columns = self._layout(max_rank).num_columns
        self.lora = Storage((num_slots, columns), dtype, device, shared=share_memory)
        # nobody can share what is made after the fork; unused it takes no memory
        self._shared_new = [
            Storage((max_new_columns,), dtype, device, shared=True)
            for _ in range(num_slots if share_memory and max_new_columns else 0)
        ]
        # without and with dropout: what it leaves of the inputs counts the more
        self.scale_SK11 = torch.zeros(2, num_slots, 1, 1, device=device)
        self.seats: dict[int, Seat] = {}
        self._packs: dict[tuple[int, ...], PackWeights] = {}
        self._factors: dict[tuple[int, int, str], Factors] = {}
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
        )  # at last

    def layout_rank(self, rank: int) -> int:
        """For which rank a slot of an adapter is laid out."""
        return shared_rank(rank, self.max_rank) if self.share_matmuls else rank

    def clear(self, slot: int) -> None:
        """Free a slot and zero everything it held."""
        seat = self.vacate(slot)
        if seat is not None:
            for buffer in self.lora.buffers():
                buffer[slot].zero_()
            if seat.new is not None:
                seat.new.give_back()

    def vacate(self, slot: int) -> Seat | None:
        """Free a slot and leave its memory as it is; returns who sat there."""
        self._forget_views()
        return self.seats.pop(slot, None)

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
        """The LoRA buffers and those of the new modules."""
        yield self.lora
        yield from (seat.new for seat in self.seats.values() if seat.new is not None)

    def keep_gradients(self, slots: Iterable[int]) -> None:
        """Make room for another micro-batch of these adapters' steps."""
        for slot in slots:
            for part in self.seats[slot].parts:
                part.storage.keep_gradient(part.where)

    def clear_gradients(self, slots: Iterable[int]) -> None:
        """Zero what a step of these adapters has used."""
        for slot in slots:
            for part in self.seats[slot].parts:
                part.storage.clear_gradient(part.where)

    def refresh_compute(self) -> None:
        """Copy the master weights to the compute copy, where that is another tensor."""
        for storage in self.storages():
            if storage.compute is not storage.master:
                storage.compute.copy_(storage.master)

    def pack(self, slots: tuple[int, ...]) -> PackWeights:
        """The adapters at a batch's slots."""
        pack = self._packs.get(slots)
        if pack is None:
            if len(self._packs) >= _MAX_PACKS:
                self._packs.clear()  # also under another lane
            self._packs[slots] = pack = PackWeights(self, slots)
        return pack

    def factors(self, start: int, stop: int, group: Linears) -> Factors:
        """Those of the slots from `start` to before `stop`, which are laid out alike."""
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
