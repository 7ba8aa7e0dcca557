"""Which adapters of a pack share a forward on a GPU.

The rows of a forward are padded to its longest adapter, so adapters whose clips differ in length cost
arithmetic that nobody needs. A forward of their own costs the host time, which a GPU hides behind
arithmetic if there is enough of it. Both are counted in rows here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_tune.model.groups import decoder_layers, layer_groups

# Operations that a layer of a forward and its backward send to a GPU, by benchmarks/pack_ops.py, and those of
# each run of neighbouring slots, which share their matmuls.
_FORWARD_OPS, _RUN_OPS = 68, 52
# Assumed, not measured: what the host takes for each, and what an H100 reaches in large bf16 matmuls. Rather
# too long: should it be 6 µs, the cut gains a little less; a cut for 6 µs would lose by 15 (pack_padding.py).
OPERATION_S = 15e-6
_FLOPS = 783e12

Rows = Sequence[tuple[int, int]]
"""Text and audio rows of an adapter's step: of each of its forwards."""


@dataclass(frozen=True)
class Costs:
    """What the host spends, in rows that the device computes meanwhile."""

    forward: float
    run: float

    @classmethod
    def of(cls, base: HiggsAudioV2ForConditionalGeneration) -> "Costs":
        """For a base's layers; both are small for large layers."""
        groups = layer_groups(0, decoder_layers(base)[0])
        linears = [m for p in ("attention", "text_mlp") for g in groups[p] for m in g.values()]
        row_s = 4 * sum(linear.weight.numel() for linear in linears) / _FLOPS
        return cls(_FORWARD_OPS * OPERATION_S / row_s, _RUN_OPS * OPERATION_S / row_s)


def cost_of(group: tuple[int, ...], rows: Mapping[int, Rows], costs: Costs) -> float:
    """What a group's step takes, in rows: of each forward its arithmetic, or the host's time if longer."""
    total = 0.0
    for index in range(max(len(rows[slot]) for slot in group)):
        there = [slot for slot in group if index < len(rows[slot])]
        num_runs = sum(slot - 1 not in there for slot in there)
        text, audio = (max(rows[slot][index][kind] for slot in there) for kind in (0, 1))
        total += max(costs.forward + num_runs * costs.run, float(len(there) * (text + audio)))
    return total


def num_rows(rows: Rows) -> int:
    """Of all forwards of a step."""
    return sum(map(sum, rows))


def share_forwards(rows: Mapping[int, Rows], costs: Costs) -> list[tuple[int, ...]]:
    """Slots in groups that together take least, those with the most rows first.

    A group holds slots that follow each other in length, so the best cut is found exactly.

    Args:
        rows: by slot.
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
