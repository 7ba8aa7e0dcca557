"""Probes that tell a trustworthy loss from a leak, before any GPU time is spent.

"Audio loss 0.001, text loss 7.7" is what labels that are not shifted look like: audio learns to echo
its input. The probes ask the running code, not the source: does the loss of a label change when the
label's own input does?
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from higgs_tune.data.tokens import IGNORE, Encoded
from higgs_tune.errors import LeakError

# Rounding of another memory layout is below 1e-4 nats, a leak moves whole nats.
_TOLERANCE = 1e-3
NllFn = Callable[[Encoded], tuple[float, float]]
"""Summed nats of one example's (text, audio) targets."""
Each = Callable[[NllFn, Sequence[Encoded]], Iterable[tuple[float, float]]]
"""Applies it to every example, results in their order: `map`, or the `map` of a pool."""


@dataclass(frozen=True)
class Preflight:
    """What the probes saw, for the sweep's record."""

    num_probes: int
    largest_change: float  # nats; 0 where no label sees its own input
    largest_past_change: float  # nats; above 0 where labels do see what stands before them
    audio_nll_per_code: float
    audio_nll_uniform: float  # ln(classes)

    def record(self) -> dict[str, float | int]:
        """Plain data."""
        return asdict(self)


def _only(example: Encoded, row: int, codebook: int | None) -> Encoded:
    """The example with a single label left: text at a row, or a codebook at an audio row."""
    text = np.full_like(example.text_labels_L, IGNORE)
    audio = np.full_like(example.audio_labels_AC, IGNORE)
    if codebook is None:
        text[row] = example.text_labels_L[row]
    else:
        audio[row, codebook] = example.audio_labels_AC[row, codebook]
    return replace(example, text_labels_L=text, audio_labels_AC=audio)


def _disturb(example: Encoded, position: int, *, before: bool, num_codes: int) -> Encoded:
    """Change every input from `position` on (or every one before it), placeholders excepted."""
    ids, codes = example.ids_L.copy(), example.codes_AC.copy()
    rows = np.arange(example.num_rows)
    chosen = rows < position if before else rows >= position
    is_text = np.ones(example.num_rows, dtype=bool)
    is_text[example.audio_rows_A] = False
    known = np.unique(ids[is_text])
    text = chosen & is_text
    ids[text] = known[(np.searchsorted(known, ids[text]) + 1) % len(known)]
    codes[chosen[example.audio_rows_A]] = (codes[chosen[example.audio_rows_A]] + 7) % num_codes
    return replace(example, ids_L=ids, codes_AC=codes)


def causality_probe(
    nll: NllFn,
    examples: Sequence[Encoded],
    num_codes: int,
    *,
    label_offset: int = 1,
    num_labels: int = 4,
    seed: int = 0,
    each: Each = map,
) -> tuple[int, float, float]:
    """Disturb inputs at and behind a label's own position; its loss must not move.

    Works on any model behind `nll`, the user's own code included.

    Args:
        nll: the code under test.
        examples: what it is tested on.
        num_codes: codes of one codebook without BOS and EOS.
        label_offset: rows from a label to its own input. 1 for labels that stand where their logits
            do, as `encode_conversation` makes them; 0 for labels that stand at their own input, as
            transformers wants them, which `nll` has to shift itself.
        num_labels: probed per example.
        seed: of the choice of labels.
        each: runs `nll` on many examples; a pool's map uses every core.

    Returns:
        (labels probed, largest change in nats from inputs at or behind the label, largest change from
        inputs before it). The last guards against a probe that could not fail.

    Raises:
        LeakError: a label's loss depends on an input it must not see, or no loss depends on what
            stands before its label, so that the probe could not fail.
    """
    rng = np.random.default_rng(seed)
    probes: list[tuple[Encoded, int, int | None]] = []
    variants: list[Encoded] = []
    for example in examples:
        labels: list[tuple[int, int | None, int]] = [
            (int(row), None, int(row) + label_offset)
            for row in np.flatnonzero(example.text_labels_L != IGNORE)
        ]
        labels += [
            (int(row), int(codebook), int(example.audio_rows_A[row]) + label_offset)
            for row, codebook in np.argwhere(example.audio_labels_AC != IGNORE)
        ]
        for index in rng.choice(len(labels), min(num_labels, len(labels)), replace=False):
            row, codebook, position = labels[index]
            single = _only(example, row, codebook)
            probes.append((example, row, codebook))
            variants.append(single)
            variants += [
                _disturb(single, position, before=before, num_codes=num_codes)
                for before in (False, True)
            ]
    nats = [sum(both) for both in each(nll, variants)]
    worst, past = 0.0, 0.0
    triples = zip(nats[::3], nats[1::3], nats[2::3], strict=True)
    for (example, row, codebook), (reference, ahead, behind) in zip(probes, triples, strict=True):
        worst = max(worst, abs(ahead - reference))
        past = max(past, abs(behind - reference))
        if not math.isfinite(reference) or abs(ahead - reference) > _TOLERANCE:
            what = "text" if codebook is None else f"codebook {codebook}"
            raise LeakError(
                f"{example.key}: the {what} label at row {row} has {reference:.4f} nats, and "
                f"{ahead:.4f} once the inputs from that row on change. It must not change: labels "
                "are not shifted, or attention is not causal. No loss of this run means anything."
            )
    if past < _TOLERANCE:
        raise LeakError(
            f"the probe sees nothing: of {len(probes)} labels, none has another loss once the inputs "
            f"before it change (largest change {past:.1e} nats). The forward under test does not "
            "read its inputs, or there is no label."
        )
    return len(probes), worst, past


def preflight(
    nll: NllFn, examples: Sequence[Encoded], num_classes: int, each: Each = map
) -> Preflight:
    """Run the probes on a base and its validation data.

    Args:
        nll: the forward that will train.
        examples: a few of each task.
        num_classes: codes of one codebook, BOS and EOS included.
        each: runs `nll` on many examples.

    Raises:
        LeakError: a label sees its own input, or a pretrained base scores audio worse than chance,
            which labels off by one look like.
    """
    probed, worst, past = causality_probe(nll, examples, num_classes - 2, each=each)
    audio = [audio for _, audio in each(nll, examples)]
    codes = sum(int((e.audio_labels_AC != IGNORE).sum()) for e in examples)
    per_code = sum(audio) / codes if codes else math.nan
    if per_code > 1.5 * math.log(num_classes):
        raise LeakError(
            f"the base scores audio at {per_code:.2f} nats per code, chance is "
            f"{math.log(num_classes):.2f}. A pretrained base above chance means misaligned labels or "
            "codes of another codec. Prepare the data with this base's codec."
        )
    return Preflight(probed, worst, past, per_code, math.log(num_classes))
