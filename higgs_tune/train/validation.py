"""Validate a pack: the same held-out clips for every adapter, in shared forwards.

Text is scored after its own audio and after another clip's; the difference says whether it listens.
Shape letters: K adapters, C codebooks.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from higgs_tune import metrics
from higgs_tune.data.collate import PackBatch, collate, count_targets, split_micro_batches
from higgs_tune.data.tokens import Encoded
from higgs_tune.train.engine import Engine
from higgs_tune.train.parallel import ALONE, World

_TOKEN_BUDGET = 1024  # rows of one adapter in one forward; more leaves a CPU's caches
_CACHED_LAYOUTS = 8  # combinations of residents whose batches are kept


class Validator:
    """The fixed validation clips of a loop, laid out for its engine."""

    def __init__(
        self,
        engine: Engine,
        *,
        transcribe: Sequence[Encoded],
        swapped: Sequence[Encoded],
        speak: Sequence[Encoded],
        world: World = ALONE,
    ) -> None:
        self._engine, self._world = engine, world
        sets = {"transcribe": transcribe, "swapped": swapped, "speak": speak}
        self._counts = {
            name: count_targets(examples, engine.num_codebooks) for name, examples in sets.items()
        }
        self._sets = {name: world.share(examples) for name, examples in sets.items()}
        self._layouts: dict[Any, list[tuple[str, PackBatch]]] = {}

    def bare(self) -> dict[str, float]:
        """Metrics of the untouched base."""
        return self._metrics(self._totals([(0,)], bare=True)[0], 0)

    def validate(self, trial_ids: Sequence[str]) -> dict[str, dict[str, float]]:
        """Metrics of each of these residents."""
        slots = {t: self._engine.residents[t].slot for t in trial_ids}
        groups = self._engine.lanes.split(dict.fromkeys(slots.values(), 1))
        totals = {}
        for group, total in zip(groups, self._totals(groups, bare=False), strict=True):
            totals |= {slot: (total, k) for k, slot in enumerate(group)}
        return {t: self._metrics(*totals[slot]) for t, slot in slots.items()}

    def _totals(
        self, groups: Sequence[tuple[int, ...]], *, bare: bool
    ) -> list[dict[str, list[list[float]]]]:
        """For each group of slots: set → nats of each slot summed over all processes.

        Text, then each codebook.
        """
        layouts = [self._batches(slots, bare=bare) for slots in groups]
        tasks = [
            partial(self._engine.evaluate, batch, bare=bare)
            for layout in layouts
            for _, batch in layout
        ]
        sums = iter(self._engine.lanes.run(tasks))
        results = []
        for slots, layout in zip(groups, layouts, strict=True):
            shape, device = (len(slots), 1 + self._engine.num_codebooks), self._engine.device
            totals = {name: torch.zeros(shape, device=device) for name in self._sets}
            for name, _ in layout:
                text_K, audio_KC = next(sums)
                totals[name] = totals[name] + torch.cat([text_K[:, None], audio_KC], dim=1)
            results.append(
                {name: self._world.sum(total.cpu()).tolist() for name, total in totals.items()}
            )
        return results

    def _metrics(self, totals: dict[str, list[list[float]]], k: int) -> dict[str, float]:
        right = totals["transcribe"][k][0] / self._counts["transcribe"].text
        swapped = totals["swapped"][k][0] / self._counts["swapped"].text
        codebooks = [
            total / int(count)
            for total, count in zip(
                totals["speak"][k][1:], self._counts["speak"].audio_C, strict=True
            )
        ]
        return {
            metrics.VAL_TEXT_NLL: right,
            metrics.VAL_TEXT_NLL_SWAPPED: swapped,
            metrics.VAL_AUDIO_GAIN: swapped - right,
            metrics.VAL_AUDIO_NLL: sum(codebooks) / len(codebooks),
            **{metrics.val_codebook_nll(c): nll for c, nll in enumerate(codebooks)},
        }

    def _batches(self, slots: tuple[int, ...], *, bare: bool) -> list[tuple[str, PackBatch]]:
        """Every set once for each slot, laid out once per combination of residents."""
        modes = {} if bare else self._engine.modes()
        key = (bare, tuple((slot, modes.get(slot, "off")) for slot in slots))
        if key not in self._layouts:
            if len(self._layouts) >= _CACHED_LAYOUTS:
                self._layouts.clear()
            layout = []
            for name, examples in self._sets.items():
                by_length = sorted(examples, key=lambda e: (e.num_rows, e.key))
                for part in split_micro_batches(by_length, _TOKEN_BUDGET):
                    batch = collate(dict.fromkeys(slots, part), modes)
                    layout.append((name, batch.to(self._engine.device)))
            self._layouts[key] = layout
        return self._layouts[key]
