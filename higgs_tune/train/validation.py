"""Validate a pack: the same held-out clips for every adapter, in shared forwards.

Text is scored after its own audio and after another clip's; the difference shows whether text uses audio.
Shape letters: K adapters, C codebooks.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from higgs_tune import metrics
from higgs_tune.data.collate import count_targets, split_micro_batches
from higgs_tune.data.tokens import Encoded
from higgs_tune.errors import ModelError
from higgs_tune.train.engine import Engine
from higgs_tune.train.parallel import ALONE, World
from higgs_tune.train.room import Ended, Room, Work, agree_across_processes

_TOKEN_BUDGET = 1024  # rows of one adapter in one forward; more would not fit in a CPU's caches
_BARE = -1  # in place of a slot: the base's row limit must not become an adapter's


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
        self.room = Room(engine.device, engine.lanes)
        sets = {"transcribe": transcribe, "swapped": swapped, "speak": speak}
        self._counts = {
            name: count_targets(examples, engine.num_codebooks) for name, examples in sets.items()
        }
        self._sets = {name: world.share(examples) for name, examples in sets.items()}

    def bare(self) -> dict[str, float]:
        """Metrics of the untouched base.

        Raises:
            MemoryError: not even one clip fits.
            ModelError: a loss is not finite.
            Exception: any other error that a forward raises twice.
        """
        found = self._figures((_BARE,), bare=True)[_BARE]
        if isinstance(found, Ended):
            raise found.error
        if (odd := metrics.not_finite(found)) is not None:
            raise ModelError(
                f"{odd} for the untouched base on the validation clips: nothing can be compared with it. "
                "Look for weights that are not finite, or use base.dtype float32."
            )
        return found

    def validate(self, trial_ids: Sequence[str]) -> dict[str, dict[str, float] | Ended]:
        """Metrics of each of these residents, or the `Ended` that says why there are none."""
        slots = {t: self._engine.residents[t].slot for t in trial_ids}
        figures = self._figures(tuple(sorted(slots.values())), bare=False)
        return {t: figures[slot] for t, slot in slots.items()}

    def _figures(
        self, slots: tuple[int, ...], *, bare: bool
    ) -> dict[int, dict[str, float] | Ended]:
        work = Work[dict[str, Tensor]](
            name="validation",
            advice="data.max_frames, or a sweep's tune.slots_per_worker",
            attempt=partial(self._attempt, bare=bare),
            parts=lambda slot: [part for _, part in self._parts(slot)],
            discard=lambda slots: None,
        )
        figures: dict[int, dict[str, float] | Ended] = {}
        for slot, found in agree_across_processes(
            self.room.run([slots], work), self._world
        ).items():
            if isinstance(found, Ended):
                figures[slot] = found
                continue
            totals = {n: self._world.sum(t.cpu()).tolist() for n, t in found.items()}
            figures[slot] = self._metrics(totals)
        return figures

    def _attempt(self, slots: tuple[int, ...], *, bare: bool) -> dict[int, dict[str, Tensor]]:
        """Slot → set → this process's nats: text, then each codebook."""
        # adapters in one forward are split alike, by the smallest budget among them
        parts = self._parts(min(slots, key=self._budget))
        jobs = [partial(nll_of, slots, part, bare) for _, part in parts]
        compute = self._engine.compute
        sums = self._engine.lanes.run([partial(compute, job, slots) for job in jobs])
        width, device = 1 + self._engine.num_codebooks, self._engine.device
        totals = {name: torch.zeros(len(slots), width, device=device) for name in self._sets}
        for (name, _), (text_K, audio_KC) in zip(parts, sums, strict=True):
            totals[name] = totals[name] + torch.cat([text_K[:, None], audio_KC], dim=1)
        return {
            slot: {name: total[k] for name, total in totals.items()} for k, slot in enumerate(slots)
        }

    def _metrics(self, totals: dict[str, list[float]]) -> dict[str, float]:
        right = totals["transcribe"][0] / self._counts["transcribe"].text
        swapped = totals["swapped"][0] / self._counts["swapped"].text
        codebooks = [
            total / int(count)
            for total, count in zip(totals["speak"][1:], self._counts["speak"].audio_C, strict=True)
        ]
        return {
            metrics.VAL_TEXT_NLL: right,
            metrics.VAL_TEXT_NLL_SWAPPED: swapped,
            metrics.VAL_AUDIO_GAIN: swapped - right,
            metrics.VAL_AUDIO_NLL: sum(codebooks) / len(codebooks),
            **{metrics.val_codebook_nll(c): nll for c, nll in enumerate(codebooks)},
        }

    def _budget(self, slot: int) -> int:
        return self.room.budget(slot, _TOKEN_BUDGET)

    def _parts(self, slot: int) -> list[tuple[str, list[Encoded]]]:
        """Every set, split into forwards within the adapter's budget."""
        return [
            (name, part)
            for name, examples in self._sets.items()
            for part in split_micro_batches(
                sorted(examples, key=lambda e: (e.num_rows, e.key)), self._budget(slot)
            )
        ]


def nll_of(
    slots: tuple[int, ...], part: Sequence[Encoded], bare: bool, engine: Engine
) -> tuple[Tensor, Tensor]:
    """Summed nats of the same examples by the adapter in each slot, or by the bare base."""
    return engine.evaluate(engine.batch(dict.fromkeys(slots, part), bare=bare), bare=bare)
