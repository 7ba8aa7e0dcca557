"""LoRA dropout of a pack: the masks of one forward.

A mask is drawn for an adapter's own rows only, from that adapter's generator, so it depends neither on the
padding nor on the neighbours. No state outlives a forward: the generator is seeded with the trial's seed,
the step, the process and the micro-batch, so a checkpoint needs nothing more.

Shape letters: K adapters, k adapters of a run, N rows, D inputs, X inputs of several linears.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Section(NamedTuple):
    """Consecutive rows of an input that are all text or all audio."""

    width: int  # rows per adapter, padding included
    own_K: Sequence[int]  # each adapter's own rows, which come first


class Masks:
    """Draws the masks of one forward; an adapter's masks depend on the order of its draws."""

    def __init__(self, device: torch.device, seeds: Mapping[int, Sequence[int]]) -> None:
        """Start a generator for each adapter that has dropout.

        Args:
            seeds: position among the batch's adapters → numbers that identify the adapter's forward.
        """
        self._device = device
        self._generators = {k: _generator(device, numbers) for k, numbers in seeds.items()}

    def draw(
        self,
        rows: int | slice,
        keeps: Sequence[float],
        num_linears: int,
        num_inputs: int,
        sections: Sequence[Section],
    ) -> list[Tensor]:
        """One bool mask per linear, True where an input is kept: (k, N, D), or (N, D) for a single adapter.

        Args:
            rows: positions among the batch's adapters.
            keeps: each adapter's probability that an input is kept; 1 draws nothing.
            num_linears: linears that read the same inputs, each through its own mask.
        """
        alone = isinstance(rows, int)
        every = range(rows, rows + 1) if alone else range(rows.start, rows.stop)
        total = sum(section.width for section in sections)
        shape = len(every), total, num_linears * num_inputs
        mask_kNX = torch.ones(shape, dtype=torch.bool, device=self._device)
        for mask_NX, k, keep in zip(mask_kNX, every, keeps, strict=True):
            if keep == 1:
                continue
            for part, section in zip(
                mask_NX.split([section.width for section in sections]), sections, strict=True
            ):
                part[: section.own_K[k]].bernoulli_(keep, generator=self._generators[k])
        return list((mask_kNX[0] if alone else mask_kNX).chunk(num_linears, -1))


def _generator(device: torch.device, numbers: Sequence[int]) -> torch.Generator:
    seed = int(np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed >> 1)
