"""Decides which adapters of a pack share a forward on a GPU.

A forward pads every adapter's rows to those of its longest one, so adapters whose clips differ in length
waste arithmetic. A separate forward costs host time, which a GPU hides behind arithmetic if there is
enough of it. Both costs are measured in rows here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_tune.model.groups import decoder_layers, layer_groups

# GPU operations per layer, forward and backward (benchmarks/pack_ops.py): of each forward, and in addition of
# each run of neighbouring slots, which share their matmuls.
_FORWARD_OPS, _RUN_OPS = 68, 52
# Assumed, not measured: host time per operation, and an H100's throughput in large bf16 matmuls. The time is
# rather too long: if it is really 6 µs, grouping gains a little less, but groups chosen for 6 µs would lose
# if it is 15 µs (pack_padding.py).
OPERATION_S = 15e-6
_FLOPS = 783e12

Rows = Sequence[tuple[int, int]]
"""(text rows, audio rows) of each forward in an adapter's step."""


@dataclass(frozen=True)
class Costs:
    """Host time per forward and per run, in rows that the device computes in that time."""

    forward: float
    run: float

    @classmethod
    def of(cls, base: HiggsAudioV2ForConditionalGeneration) -> "Costs":
        """Costs for a base's layers; the larger the layers, the smaller the costs."""
        groups = layer_groups(0, decoder_layers(base)[0])
        linears = [m for p in ("attention", "text_mlp") for g in groups[p] for m in g.values()]
        row_s = 4 * sum(linear.weight.numel() for linear in linears) / _FLOPS
        return cls(_FORWARD_OPS * OPERATION_S / row_s, _RUN_OPS * OPERATION_S / row_s)


def cost_of(group: tuple[int, ...], rows: Mapping[int, Rows], costs: Costs) -> float:
    """Cost of a group's step in rows: per forward its arithmetic, or the host time if that is longer."""
    total = 0.0
    for index in range(max(len(rows[slot]) for slot in group)):
        there = [slot for slot in group if index < len(rows[slot])]
        num_runs = sum(slot - 1 not in there for slot in there)
        text, audio = (max(rows[slot][index][kind] for slot in there) for kind in (0, 1))
        total += max(costs.forward + num_runs * costs.run, float(len(there) * (text + audio)))
    return total


def num_rows(rows: Rows) -> int:
    """Total rows of all forwards of a step."""
    return sum(map(sum, rows))


def share_forwards(rows: Mapping[int, Rows], costs: Costs) -> list[tuple[int, ...]]:
    """Group the slots at the lowest total cost, those with the most rows first.

    Only slots adjacent in order of rows are grouped, so dynamic programming finds the optimum.

    Args:
        rows: slot → rows of its forwards.
    """
    slots = sorted(rows, key=lambda slot: (-num_rows(rows[slot]), slot))
    best: list[tuple[float, list[tuple[int, ...]]]] = [(0.0, [])]
    for stop in range(1, len(slots) + 1):
        ways = []
        for start in range(stop):
            group = tuple(sorted(slots[start:stop]))
            before, groups = best[start]
            ways.append((before + cost_of(group, rows, costs), [*groups, group]))
        best.append(min(ways, key=lambda way: (way[0], len(way[1]))))
    return best[-1][1]
