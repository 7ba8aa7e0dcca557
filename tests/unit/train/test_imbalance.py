"""The probes pass on our labels and catch the mission's leak."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from higgs_tune.data.collate import collate
from higgs_tune.data.tokens import IGNORE
from higgs_tune.errors import LeakError
from higgs_tune.model.packed_forward import packed_nll
from higgs_tune.train.imbalance import causality_probe, preflight
from tests.models import NUM_CODES, example, tiny_base

EXAMPLES = [example("transcribe", 1, 9, 5), example("speak", 2, 6, 11), example("clone", 3, 5, 3)]


def nll_of(base):
    def nll(one):
        text_K, audio_KC = packed_nll(base.model, collate({0: [one]}), None)
        return float(text_K[0]), float(audio_KC.sum())

    return nll


def at_own_input(one):
    """The same targets, each at its own input row, as transformers takes labels."""
    text = np.where(one.text_labels_L != IGNORE, one.text_labels_L, IGNORE)
    audio = np.full_like(one.audio_labels_AC, IGNORE)
    audio[1:] = one.audio_labels_AC[:-1]
    return replace(one, audio_labels_AC=audio, text_labels_L=np.roll(text, 1))


def test_no_label_of_ours_sees_its_own_input():
    probed, worst, past = causality_probe(nll_of(tiny_base()), EXAMPLES, NUM_CODES, num_labels=6)
    assert probed == 18
    assert worst < 1e-4
    assert past > 1e-2  # the probe does move inputs that a label may see


def test_probes_run_side_by_side_say_what_they_say_one_by_one():
    nll = nll_of(tiny_base())
    with ThreadPoolExecutor(2) as pool:
        together = preflight(nll, EXAMPLES, NUM_CODES + 2, each=pool.map)
    assert together == preflight(nll, EXAMPLES, NUM_CODES + 2)


def test_a_loss_that_forgets_to_shift_is_caught():
    """The mission's leak: the logit of a row is scored against that row's own codes."""
    nll = nll_of(tiny_base())  # scores labels where they stand
    with pytest.raises(LeakError, match="labels are not shifted"):
        causality_probe(nll, [at_own_input(EXAMPLES[1])], NUM_CODES, label_offset=0)


def test_a_loss_that_shifts_labels_itself_passes():
    inner = nll_of(tiny_base())

    def shifting(one):
        audio = np.full_like(one.audio_labels_AC, IGNORE)
        audio[:-1] = one.audio_labels_AC[1:]
        return inner(replace(one, audio_labels_AC=audio))

    _, worst, past = causality_probe(
        shifting, [at_own_input(EXAMPLES[1])], NUM_CODES, label_offset=0
    )
    assert worst < 1e-4
    assert past > 1e-2


def test_attention_that_sees_the_future_is_caught():
    base = tiny_base()
    inner = nll_of(base)

    def peeking(one):
        text, audio = inner(one)
        return text + float(one.ids_L[-2:].sum()), audio

    with pytest.raises(LeakError, match="attention is not causal"):
        causality_probe(peeking, EXAMPLES[:1], NUM_CODES)


@pytest.mark.parametrize("examples", [EXAMPLES, []])
def test_a_probe_that_cannot_fail_is_refused(examples):
    with pytest.raises(LeakError, match=f"sees nothing: of {4 * len(examples)} labels"):
        preflight(lambda one: (1.0, 1.0), examples, NUM_CODES + 2)


def test_a_base_above_chance_is_reported_as_misaligned():
    inner = nll_of(tiny_base())
    with pytest.raises(LeakError, match="misaligned labels"):
        preflight(lambda one: (inner(one)[0], 3 * inner(one)[1]), EXAMPLES, NUM_CODES + 2)


def test_a_base_without_a_finite_loss_is_refused():
    inner = nll_of(tiny_base())

    def broken(one):
        text, audio = inner(one)
        return text, audio and math.nan

    with pytest.raises(LeakError, match="has nan nats"):
        preflight(broken, EXAMPLES, NUM_CODES + 2)
