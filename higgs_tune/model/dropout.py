"""LoRA dropout of a pack: which inputs of each factor are dropped in one forward.

A mask is drawn for an adapter's own rows only, from a generator of its own, so it depends neither on the
padding nor on the neighbours. Nothing outlives a forward: the generator starts from the trial's seed,
the step and the micro-batch, which a checkpoint knows already.

Shape letters: K adapters, k adapters of a run, N rows, D inputs.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Section(NamedTuple):
    """Rows of one kind that stand side by side in an input."""

    width: int  # of every adapter, padding included
    own_K: Sequence[int]  # the adapter's own, in front


class Masks:
    """Draws the masks of one forward; call after call, so each adapter's calls must come in its order."""

    def __init__(self, device: torch.device, seeds: Mapping[int, Sequence[int]]) -> None:
        """Start a generator for each adapter that has dropout.

        Args:
            seeds: position among the batch's adapters → numbers that name the adapter's forward.
        """
        self._device = device
        self._generators = {k: _generator(device, numbers) for k, numbers in seeds.items()}

    def draw(
        self,
        rows: int | slice,
        keeps: Sequence[float],
        num_inputs: int,
        sections: Sequence[Section],
    ) -> Tensor:
        """True where an input is kept: bool, (k, N, D), or (N, D) for a single adapter.

        Args:
            rows: positions among the batch's adapters.
            keeps: each one's probability of being kept; 1 draws nothing.
        """
        if isinstance(rows, int):
            return self._draw(rows, keeps[0], num_inputs, sections)
        every = zip(range(rows.start, rows.stop), keeps, strict=True)
        return torch.stack([self._draw(k, keep, num_inputs, sections) for k, keep in every])

    def _draw(self, k: int, keep: float, num_inputs: int, sections: Sequence[Section]) -> Tensor:
        if keep == 1:
            total = sum(section.width for section in sections)
            return torch.ones(total, num_inputs, dtype=torch.bool, device=self._device)
        own = [section.own_K[k] for section in sections]
        drawn = torch.empty(sum(own), num_inputs, dtype=torch.bool, device=self._device)
        drawn.bernoulli_(keep, generator=self._generators[k])
        if all(count == section.width for count, section in zip(own, sections, strict=True)):
            return drawn
        total = sum(section.width for section in sections)
        mask = torch.zeros(total, num_inputs, dtype=torch.bool, device=self._device)
        at = 0
        for part, section in zip(drawn.split(own), sections, strict=True):
            mask[at : at + len(part)] = part
            at += section.width
        return mask


def _generator(device: torch.device, numbers: Sequence[int]) -> torch.Generator:
    seed = int(np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed >> 1)
