"""Computes the gradients of one optimizer step, with every trial's clips split into forwards that fit."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from higgs_tune.data.collate import TargetCounts, split_micro_batches
from higgs_tune.data.tokens import Encoded
from higgs_tune.train.engine import Engine
from higgs_tune.train.forwards import Rows
from higgs_tune.train.room import Ended, Group, Room, Work


class Clips(NamedTuple):
    """What one adapter trains on in a step."""

    examples: Sequence[Encoded]
    at_once: int  # most clips in a micro-batch
    token_budget: int  # most padded rows in a micro-batch


def rows_of(parts: Sequence[Sequence[Encoded]]) -> Rows:
    """(text rows, audio rows) of each of an adapter's forwards."""
    audio = [sum(len(e.codes_AC) for e in part) for part in parts]
    return [
        (sum(e.num_rows for e in part) - num_audio, num_audio)
        for part, num_audio in zip(parts, audio, strict=True)
    ]


class Gradients:
    """Fills an engine's bank with the gradients of a step."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.room = Room(engine.device, engine.lanes)

    def add(
        self, clips: Mapping[int, Clips], counts: Mapping[int, TargetCounts]
    ) -> dict[int, Tensor | Ended]:
        """Add up the gradients of all micro-batches of these slots.

        Returns:
            Slot → summed nats (1 + C,), text before codebooks; or `Ended`, then without a gradient.
        """
        work = Work[Tensor](
            name="training step",
            advice="token_budget, or a sweep's tune.slots_per_worker",
            attempt=partial(self._attempt, clips, counts),
            parts=lambda slot: self._parts(slot, clips[slot]),
            discard=self._engine.discard,
        )
        rows = {slot: rows_of(self._parts(slot, own)) for slot, own in clips.items()}
        return self.room.run(self._engine.lanes.groups(rows), work)

    def _parts(self, slot: int, clips: Clips) -> list[list[Encoded]]:
        budget = self.room.budget(slot, clips.token_budget)
        return [
            part
            for first in range(0, len(clips.examples), clips.at_once)
            for part in split_micro_batches(clips.examples[first : first + clips.at_once], budget)
        ]

    def _attempt(
        self, clips: Mapping[int, Clips], counts: Mapping[int, TargetCounts], slots: Group
    ) -> dict[int, Tensor]:
        micro = {slot: self._parts(slot, clips[slot]) for slot in slots}
        needed = {slot: counts[slot] for slot in slots}
        return self._engine.compute(partial(_forwards_backwards, micro, needed), slots)


def _forwards_backwards(
    micro: Mapping[int, Sequence[Sequence[Encoded]]],
    counts: Mapping[int, TargetCounts],
    engine: Engine,
) -> dict[int, Tensor]:
    """Run as many forwards and backwards as the adapter with the most micro-batches needs."""
    sums: dict[int, list[Tensor]] = {slot: [] for slot in micro}
    for index in range(max(len(batches) for batches in micro.values())):
        part = {slot: batches[index] for slot, batches in micro.items() if index < len(batches)}
        batch = engine.batch(part)
        if index:
            engine.bank.accumulate_gradients(part)
        text_K, audio_KC = engine.forward_backward(batch, counts)
        for slot, sum_C in zip(batch.slots, torch.cat([text_K[:, None], audio_KC], 1), strict=True):
            sums[slot].append(sum_C)
    return {slot: torch.stack(parts).sum(0) for slot, parts in sums.items()}
