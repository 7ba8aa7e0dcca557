"""The adapters of one batch as the forward needs them: which share a matmul, and their factors.

Shape letters: K slots (or adapters of a batch), k adapters of a run, P columns, N rows, D inputs,
O outputs, r rank, S without and with dropout.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from higgs_tune.config import TargetPath
from higgs_tune.model.adapter_layout import Linears
from higgs_tune.model.dropout import Masks

if TYPE_CHECKING:
    from higgs_tune.model.packed_lora import AdapterBank


@dataclass(frozen=True, eq=False)
class Factors:
    """The factors of neighbouring slots of one layout for a group of linears; for one slot, no k axis."""

    path: TargetPath
    a_krD: Tensor  # A of the group's linears, stacked along r
    a_grad_krD: Tensor
    b_kOr: list[Tensor]  # B of each linear
    b_grad_kOr: list[Tensor]


@dataclass(frozen=True, eq=False)
class Run:
    """Adapters whose rows share a matmul: those of neighbouring slots, or a single one.

    In a run of one, `rows` is an integer and the tensors have no k axis.
    """

    rows: int | slice  # positions among the batch's adapters
    # LoRA's scale, divided by the share that dropout keeps; 1 if the adapters that target the linears differ
    scale: float
    scales_k11: Tensor | None  # each adapter's, if they differ; float32
    keeps: tuple[float, ...]  # each adapter's share of inputs that dropout keeps in this forward
    factors: Factors


@dataclass(eq=False)
class PackWeights:
    """The adapters of one batch as the forward needs them."""

    bank: "AdapterBank"
    slots: tuple[int, ...]  # ascending
    masks: Masks | None = None  # for a training forward in which an adapter has dropout
    _runs: dict[tuple[str, bool], list[Run]] = field(default_factory=dict)
    _new: dict[tuple[str, ...], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def training(self, masks: Masks | None) -> "PackWeights":
        """The same adapters in a forward with these dropout masks, if any."""
        return self if masks is None else replace(self, masks=masks)

    def runs(self, group: Linears) -> list[Run]:
        """The runs of an input group; empty if no adapter targets it."""
        key = next(iter(group)), self.masks is None
        if key not in self._runs:
            self._runs[key] = [self._run(span, group) for span in self._spans(key[0])]
        return self._runs[key]

    def new_tensors(
        self, names: tuple[str, ...], adapters: Sequence[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """Each of these adapters' named new weights, stacked, and their gradients."""
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
        """Spans [start, stop) of positions that share a matmul; the first and last of each target the linear.

        Without sharing every adapter multiplies alone. On a CPU that is as fast, and an adapter's results
        do not depend on its neighbours, bit for bit.
        """
        spans: list[tuple[int, int]] = []
        for position, slot in enumerate(self.slots):
            seat = self.bank.seats[slot]
            factor = seat.layout.entries.get(f"{name}.lora_A.weight")  # None: no trial can adapt it
            if factor is None or factor.path not in seat.paths:
                continue
            start = spans[-1][0] if spans and self.bank.share_matmuls else position
            between = [self.bank.seats[s] for s in self.slots[start:position]]
            adjoins = slot - self.slots[start] == position - start
            if between and adjoins and all(s.layout is seat.layout for s in between):
                spans[-1] = (start, position + 1)
            else:
                spans.append((position, position + 1))
        return spans

    def _run(self, span: tuple[int, int], group: Linears) -> Run:
        slots = self.slots[slice(*span)]
        seats = [self.bank.seats[slot] for slot in slots]
        factors = self.bank.factors(slots[0], slots[-1] + 1, group)
        drops, alone = int(self.masks is not None), len(slots) == 1
        keeps = tuple(seat.keep(factors.path) if drops else 1.0 for seat in seats)
        scales = {
            seat.scale / keep
            for seat, keep in zip(seats, keeps, strict=True)
            if factors.path in seat.paths
        }
        alike = len(scales) == 1
        scales_k11 = self.bank.scale_SK11[drops, slots[0] : slots[-1] + 1]
        return Run(
            rows=span[0] if alone else slice(*span),
            scale=scales.pop() if alike else 1.0,
            scales_k11=None if alike else scales_k11,
            keeps=keeps,
            factors=factors,
        )
