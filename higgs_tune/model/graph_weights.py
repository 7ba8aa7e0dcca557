"""The adapters of a batch as inputs of a traced graph, differentiated by autograd.

The eager operations write gradients into the bank as a side effect, which a graph cannot do. Here each
adapter's flat row is one leaf. The graph splits it into factors, so its derivative is one concatenation,
which autograd adds to the leaf's `grad`: the bank's gradient row.

Shape letters: as in model.packed_lora; J adapters of a cross_attention mode.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from higgs_tune.config import TargetPath
from higgs_tune.data.collate import PackBatch, to_device
from higgs_tune.model.adapter_layout import Layout, Linears
from higgs_tune.model.dropout import Section
from higgs_tune.model.pack_weights import PackWeights

Pieces = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of the consecutive pieces of a row; a piece without a name is unused."""


class AdapterPlan(NamedTuple):
    """How a graph splits the rows of one adapter."""

    lora: Pieces
    new: Pieces


class GraphPlan(NamedTuple):
    """What a graph is built for; it serves every pack with an equal plan."""

    adapters: tuple[AdapterPlan, ...]
    joined: tuple[tuple[int, int], ...]  # [start, stop) of adapters that share a matmul


class GraphInputs(NamedTuple):
    """The inputs of a graph besides the batch."""

    lora: list[Tensor]  # each adapter's LoRA row
    new: list[Tensor]  # each adapter's row of new modules, empty if it has none
    scale_K: Tensor
    masks: dict[str, list[Tensor]]  # "<group's first linear> <adapter>" → a dropout mask per linear


@dataclass(frozen=True, eq=False)
class GraphWeights:
    """Replaces `PackWeights` in a traced forward."""

    plan: GraphPlan
    scale_K: Tensor
    masks: dict[str, list[Tensor]]
    factors: list[dict[str, Tensor]]  # each adapter's tensors by full name

    @classmethod
    def of(cls, plan: GraphPlan, inputs: GraphInputs) -> "GraphWeights":
        """Split the rows into factors; runs inside the graph."""
        factors = [
            _split(row, adapter.lora) | _split(new, adapter.new)
            for adapter, row, new in zip(plan.adapters, inputs.lora, inputs.new, strict=True)
        ]
        return cls(plan, inputs.scale_K, inputs.masks, factors)

    def adapted_linear(self, x_KND: Tensor, group: Linears) -> Tensor:
        """The same as `packed_ops.adapted_linear`."""
        outputs = [F.linear(x_KND, linear.weight, linear.bias) for linear in group.values()]
        y_KNO = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        sizes = [stop - start for start, stop in self.plan.joined]
        parts = [
            self._add_lora(x_kND, y_kNO, range(*span), list(group))
            for span, x_kND, y_kNO in zip(
                self.plan.joined, x_KND.split(sizes), y_KNO.split(sizes), strict=True
            )
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _add_lora(self, x_kND: Tensor, y_kNO: Tensor, every: range, names: list[str]) -> Tensor:
        if f"{names[0]}.lora_A.weight" not in self.factors[every[0]]:
            return y_kNO
        masks = [self.masks.get(f"{names[0]} {k}") for k in every]
        scale_k11 = self.scale_K[every.start : every.stop, None, None]
        updates = []
        for n, name in enumerate(names):
            a_krD, b_kOr = (
                torch.stack([self.factors[k][f"{name}.lora_{f}.weight"] for k in every])
                for f in "AB"
            )
            read_kND = _kept(x_kND, [None if own is None else own[n] for own in masks])
            z_kNr = (read_kND @ a_krD.mT * scale_k11).to(x_kND.dtype)
            updates.append(z_kNr @ b_kOr.mT)
        return y_kNO + (updates[0] if len(updates) == 1 else torch.cat(updates, 2))

    def new_linear(self, x_JND: Tensor, names: Sequence[str], adapters: Sequence[int]) -> Tensor:
        """The same as `new_module_ops.new_linear`."""
        outputs = [
            torch.cat([x_ND @ self.factors[k][name].mT for name in names], -1)
            for x_ND, k in zip(x_JND.unbind(), adapters, strict=True)
        ]
        return torch.stack(outputs)

    def new_scale(self, x_JND: Tensor, name: str, adapters: Sequence[int]) -> Tensor:
        """The same as `new_module_ops.new_scale`."""
        return x_JND * torch.stack([self.factors[k][name] for k in adapters])[:, None]


Adapters = PackWeights | GraphWeights


def _kept(x_kND: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
    """Zero the inputs that each adapter's mask drops; None drops none."""
    if all(mask is None for mask in masks):
        return x_kND
    every = x_kND.new_ones(x_kND.shape[1:], dtype=torch.bool)
    return x_kND * torch.stack([every if mask is None else mask for mask in masks])


def graph_kind(weights: PackWeights) -> Hashable:
    """A key for a pack's plan: packs with equal keys have equal plans."""
    bank, seats = weights.bank, [weights.bank.seats[slot] for slot in weights.slots]
    new = tuple(next(iter(seat.new_layout.entries), "") for seat in seats)
    ranks = tuple(bank.layout_rank(seat.rank) for seat in seats)
    return new, ranks, None if bank.share_matmuls else tuple(seat.paths for seat in seats)


def graph_plan(weights: PackWeights) -> GraphPlan:
    """The plan of a graph for these adapters."""
    bank, seats = weights.bank, [weights.bank.seats[slot] for slot in weights.slots]
    adapters = [
        AdapterPlan(
            _lora_pieces(seat.layout, bank.paths if bank.share_matmuls else seat.paths),
            _pieces(seat.new_layout, list(seat.new_layout.entries)),
        )
        for seat in seats
    ]
    starts = [
        k
        for k, seat in enumerate(seats)
        if k == 0 or not bank.share_matmuls or seat.layout is not seats[k - 1].layout
    ]
    joined = tuple(zip(starts, [*starts[1:], len(seats)], strict=True))
    return GraphPlan(tuple(adapters), joined)


def graph_inputs(weights: PackWeights, masks: dict[str, list[Tensor]]) -> GraphInputs:
    """The inputs of a graph for these adapters; each row's `grad` is the bank's gradient row."""
    bank = weights.bank
    seats = [bank.seats[slot] for slot in weights.slots]
    lora = [
        bank.lora.leaf((slot, slice(seat.layout.num_columns)))
        for slot, seat in zip(weights.slots, seats, strict=True)
    ]
    none = torch.empty(0, dtype=lora[0].dtype, device=bank.device)
    new = [none if seat.new is None else seat.new.leaf((slice(None),)) for seat in seats]
    drops = weights.masks is not None
    scales = [seat.scale / (1 - seat.dropout if drops else 1) for seat in seats]
    scale_K = to_device(torch.tensor(scales), bank.device)
    return GraphInputs(lora, new, scale_K, masks)


def draw_masks(weights: PackWeights, batch: PackBatch, num_layers: int) -> dict[str, list[Tensor]]:
    """Draw the masks that the eager forward would draw, each adapter's in the same order."""
    found: dict[str, list[Tensor]] = {}
    if weights.masks is None:
        return found
    for path, group in weights.bank.groups:
        first, linear = next(iter(group.items()))
        labelled = first.endswith("head") or (
            f"layers.{num_layers - 1}." in first and not first.endswith("q_proj")
        )
        sections = _sections(batch, path, labelled=labelled)
        for k, slot in enumerate(weights.slots):
            seat = weights.bank.seats[slot]
            if (keep := seat.keep(path)) < 1:
                found[f"{first} {k}"] = weights.masks.draw(
                    k, (keep,), len(group), linear.in_features, sections
                )
    return found


def _sections(batch: PackBatch, path: TargetPath, *, labelled: bool) -> list[Section]:
    """The sections of the input rows of a path's linears."""
    if labelled:
        text = Section(batch.text_rows_KM.shape[1], batch.num_text_labelled_K)
        audio = Section(batch.audio_rows_KM.shape[1], batch.num_audio_labelled_K)
    else:
        text = Section(batch.text_ids_KT.shape[1], batch.num_text_K)
        audio = Section(batch.audio_codes_KAC.shape[1], batch.num_audio_K)
    return [
        *([] if path.startswith("audio") else [text]),
        *([] if path.startswith("text") else [audio]),
    ]


def _lora_pieces(layout: Layout, paths: frozenset[TargetPath]) -> Pieces:
    """The pieces of a LoRA row, with the factors of some paths named."""
    return _pieces(layout, [e.name for e in layout.entries.values() if e.path in paths])


def _pieces(layout: Layout, wanted: Sequence[str]) -> Pieces:
    """Cut a row into the wanted tensors and the gaps between them."""
    pieces: list[tuple[str, tuple[int, ...]]] = []
    at = 0
    for name in wanted:
        entry = layout.entries[name]
        if entry.offset > at:
            pieces.append(("", (entry.offset - at,)))
        pieces.append((name, entry.shape))
        at = entry.columns.stop
    if at < layout.num_columns:
        pieces.append(("", (layout.num_columns - at,)))
    return tuple(pieces)


def _split(row_P: Tensor, pieces: Pieces) -> dict[str, Tensor]:
    parts = row_P.split([math.prod(shape) for _, shape in pieces]) if pieces else ()
    named = zip(parts, pieces, strict=True)
    return {name: part.view(shape) for part, (name, shape) in named if name}
