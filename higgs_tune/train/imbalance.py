"""Probes that detect leaking or misaligned labels before training starts.

"Audio loss 0.001, text loss 7.7" is the symptom of labels that are not shifted: audio learns to echo
its input. The probes test the running code, not the source: does a label's loss change when the label's
own input changes, and when the input before it changes?
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from higgs_tune.data.tokens import IGNORE, Encoded
from higgs_tune.errors import LeakError

logger = logging.getLogger(__name__)
# Rounding in another memory layout stays below 1e-4 nats; a leak changes the loss by whole nats.
_TOLERANCE = 1e-3
NllFn = Callable[[Encoded], tuple[float, float]]
"""Example → summed nats of its (text, audio) targets."""
Each = Callable[[NllFn, Sequence[Encoded]], Iterable[tuple[float, float]]]
"""Applies an `NllFn` to every example, in order: `map`, or a pool's `map`."""


@dataclass(frozen=True)
class Preflight:
    """The probes' findings, for the sweep's record."""

    num_probes: int
    largest_change: float  # nats; 0, up to rounding, if no label sees its own or a later input
    largest_past_change: float  # nats; above 0 if labels see the inputs before them
    audio_nll_per_code: float
    audio_nll_uniform: float  # ln(classes)


@dataclass(frozen=True)
class _Label:
    """One label of an example, and the position of the label's own input."""

    example: Encoded
    row: int  # index into the sequence for text, into the audio rows for audio
    codebook: int | None  # None for text
    position: int  # of the label's own input in the sequence

    @property
    def what(self) -> str:
        """What is labelled, for messages."""
        return "text" if self.codebook is None else f"codebook {self.codebook}"


def _labels(example: Encoded, offset: int) -> tuple[list[_Label], list[_Label]]:
    """Text and audio labels of an example; raises unless each equals the input `offset` rows later."""
    text = [
        _Label(example, int(row), None, int(row) + offset)
        for row in np.flatnonzero(example.text_labels_L != IGNORE)
    ]
    audio = [
        _Label(example, int(row), int(codebook), int(example.audio_rows_A[row]) + offset)
        for row, codebook in np.argwhere(example.audio_labels_AC != IGNORE)
    ]
    for label in [*text, *audio]:
        if label.codebook is None:
            wanted, inputs = example.text_labels_L[label.row], example.ids_L
        else:
            wanted = example.audio_labels_AC[label.row, label.codebook]
            inputs = example.codes_AC[:, label.codebook]
        found = inputs[label.row + offset] if label.row + offset < len(inputs) else "missing"
        if found != wanted:
            raise LeakError(
                f"{example.key}: the {label.what} label at row {label.row} is {wanted}, but should equal the "
                f"input of row {label.row + offset}, which is {found}. Labels are not shifted as "
                f"label_offset {offset} says, are shifted twice, or have another delay pattern than "
                "the inputs. No loss of this run means anything."
            )
    return text, audio


def _only(example: Encoded, label: _Label | None) -> Encoded:
    """The example with only this label, or with none."""
    text = np.full_like(example.text_labels_L, IGNORE)
    audio = np.full_like(example.audio_labels_AC, IGNORE)
    if label is not None and label.codebook is None:
        text[label.row] = example.text_labels_L[label.row]
    elif label is not None:
        audio[label.row, label.codebook] = example.audio_labels_AC[label.row, label.codebook]
    return replace(example, text_labels_L=text, audio_labels_AC=audio)


def _disturb(example: Encoded, chosen_L: np.ndarray, num_codes: int) -> Encoded:
    """Change every input at the chosen rows, except placeholders."""
    ids, codes = example.ids_L.copy(), example.codes_AC.copy()
    is_text = np.ones(example.num_rows, dtype=bool)
    is_text[example.audio_rows_A] = False
    known = np.unique(ids[is_text])
    text, audio = chosen_L & is_text, chosen_L[example.audio_rows_A]
    ids[text] = known[(np.searchsorted(known, ids[text]) + 1) % len(known)]
    codes[audio] = (codes[audio] + 7) % num_codes
    return replace(example, ids_L=ids, codes_AC=codes)


def _choose(
    examples: Sequence[Encoded], offset: int, num_labels: int, seed: int
) -> Iterator[_Label]:
    """Draw labels of each example and modality at random, cycling through the codebooks."""
    rng = np.random.default_rng(seed)
    turn = 0  # the next codebook
    for example in examples:
        text, audio = _labels(example, offset)
        yield from (text[n] for n in rng.permutation(len(text))[:num_labels])
        num_codebooks = example.codes_AC.shape[1]
        seen = [0] * num_codebooks
        ranked: list[tuple[int, int, _Label]] = []
        for label in (audio[n] for n in rng.permutation(len(audio))):
            assert label.codebook is not None
            ranked.append((seen[label.codebook], (label.codebook - turn) % num_codebooks, label))
            seen[label.codebook] += 1
        chosen = sorted(ranked, key=lambda ranks: ranks[:2])[:num_labels]
        turn += len(chosen)
        yield from (label for *_, label in chosen)


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
    """Change inputs around a label's own, and check that its loss reacts only to earlier inputs.

    The loss must not depend on the label's own input or any later one, but must depend on the one right
    before it. Works on any model behind `nll`, including the user's own code.

    Args:
        nll: the code under test; must score exactly the labels of the example that it is given.
        examples: examples to test it on.
        num_codes: codes of one codebook without BOS and EOS.
        label_offset: rows from a label to its own input. 1 for labels aligned with their logits, as
            `encode_conversation` makes them; 0 for labels aligned with their own input, as transformers
            expects them, which `nll` must then shift itself.
        num_labels: labels to probe per example, for text and for audio each.
        seed: seed for choosing the labels.
        each: runs `nll` on many examples; a pool's map uses every core.

    Returns:
        (labels probed, largest change in nats from the label's own and later inputs, largest change
        from earlier inputs). The last one shows that the probe could have failed.

    Raises:
        LeakError: a label does not equal its own input; its loss is not finite or depends on an input
            that it must not see; `nll` scores more than the given labels; no text loss or no audio loss
            depends on the input right before its label, as when labels are shifted twice; or no loss
            depends on any earlier input, so that the probe could not fail.
    """
    labels = list(_choose(examples, label_offset, num_labels, seed))
    variants: list[Encoded] = []
    for label in labels:
        single = _only(label.example, label)
        rows_L = np.arange(single.num_rows)
        disturbed = (
            rows_L >= label.position,
            rows_L < label.position,
            rows_L == label.position - 1,
        )
        variants += [single, *(_disturb(single, chosen_L, num_codes) for chosen_L in disturbed)]
    nats = [sum(both) for both in each(nll, variants)]
    worst, past = 0.0, 0.0
    last: dict[str, float] = {}  # modality → largest change from the input right before a label
    quads = zip(nats[::4], nats[1::4], nats[2::4], nats[3::4], strict=True)
    for label, (reference, ahead, behind, before) in zip(labels, quads, strict=True):
        place = f"{label.example.key}: the {label.what} label at row {label.row}"
        if not math.isfinite(reference):
            raise LeakError(
                f"{place} has {reference:.4f} nats on its own, needed a finite sum, which is 0 for a "
                "modality without a label."
            )
        if not abs(ahead - reference) <= _TOLERANCE:
            rest = sum(nll(_only(label.example, None)))
            if not abs(rest) <= _TOLERANCE:
                raise LeakError(
                    f"{place} cannot be probed: with no label at all the loss is {rest:.4f} nats, "
                    "needed 0. The function under test must score the labels of the example that "
                    "it is given, and no others."
                )
            raise LeakError(
                f"{place} has {reference:.4f} nats, and "
                f"{ahead:.4f} once its own and later inputs change. It must not change: labels "
                "are not shifted, or attention is not causal. No loss of this run means anything."
            )
        worst, past = max(worst, abs(ahead - reference)), max(past, abs(behind - reference))
        modality = "text" if label.codebook is None else "audio"
        last[modality] = max(last.get(modality, 0.0), abs(before - reference))
    if past < _TOLERANCE:
        raise LeakError(
            f"the probe sees nothing: of {len(labels)} labels, none changes its loss when the inputs "
            f"before it change (largest change {past:.1e} nats). The forward under test does not "
            "read its inputs, or there is no label."
        )
    for modality, change in last.items():
        if change < _TOLERANCE:
            raise LeakError(
                f"no {modality} label that was probed changes its loss when the input right before it "
                f"changes (largest change {change:.1e} nats): it is not scored by the logits of that row. "
                "Labels are shifted twice, once in the data and once in the model. No loss of this run "
                "means anything."
            )
    return len(labels), worst, past


def preflight(
    nll: NllFn, examples: Sequence[Encoded], num_classes: int, each: Each = map
) -> Preflight:
    """Run the probes on a base and its validation data; warn if the base does not know such audio.

    Args:
        nll: the forward that will train.
        examples: a few examples of each task.
        num_classes: codes of one codebook, BOS and EOS included.
        each: runs `nll` on many examples.

    Raises:
        LeakError: see `causality_probe`; or the base scores audio far worse than chance, as it does with
            another codec's codes.
    """
    probed, worst, past = causality_probe(nll, examples, num_classes - 2, each=each)
    audio = [audio for _, audio in each(nll, examples)]
    codes = sum(int((e.audio_labels_AC != IGNORE).sum()) for e in examples)
    per_code = sum(audio) / codes if codes else math.nan
    chance = math.log(num_classes)
    if per_code > 1.5 * chance:
        raise LeakError(
            f"the base scores audio at {per_code:.2f} nats per code, chance is "
            f"{chance:.2f}. A pretrained base worse than chance means misaligned labels or "
            "codes of another codec. Prepare the data with this base's codec."
        )
    if per_code > 1.15 * chance:  # random weights reach up to 1.1 times chance
        logger.warning(
            "the base scores audio at %.2f nats per code, chance is %.2f: with a pretrained base, that means "
            "codes of another codec of the same shape, or sounds unlike any that it was trained on",
            per_code,
            chance,
        )
    return Preflight(probed, worst, past, per_code, chance)
