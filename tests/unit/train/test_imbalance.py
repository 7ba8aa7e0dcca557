"""The probes pass on correct labels, and catch labels that leak or are misaligned."""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from higgs_tune.config import BaseSettings
from higgs_tune.data import tasks
from higgs_tune.data.collate import collate
from higgs_tune.data.conversation import AudioPart, Conversation, TextPart, Turn
from higgs_tune.data.dataset import Dataset
from higgs_tune.data.tokens import IGNORE, encode_conversation
from higgs_tune.errors import LeakError
from higgs_tune.model import packed_forward
from higgs_tune.model.load import load_base
from higgs_tune.model.packed_forward import packed_nll
from higgs_tune.train.engine import Engine
from higgs_tune.train.imbalance import causality_probe, preflight
from higgs_tune.train.residents import PackLimits
from tests.models import NUM_CODES, example, random_codes, tiny_base, trial, vocabulary

EXAMPLES = [example("transcribe", 1, 9, 5), example("speak", 2, 6, 11), example("clone", 3, 5, 3)]


def nll_of(base):
    def nll(one):
        text_K, audio_KC = packed_nll(base.model, collate({0: [one]}), None)
        return float(text_K[0]), float(audio_KC.sum())

    return nll


def at_own_input(one):
    """The same targets, each at the row of its own input, as transformers expects labels."""
    text = np.where(one.text_labels_L != IGNORE, one.text_labels_L, IGNORE)
    audio = np.full_like(one.audio_labels_AC, IGNORE)
    audio[1:] = one.audio_labels_AC[:-1]
    return replace(one, audio_labels_AC=audio, text_labels_L=np.roll(text, 1))


def test_no_label_sees_its_own_input():
    probed, worst, past = causality_probe(nll_of(tiny_base()), EXAMPLES, NUM_CODES, num_labels=6)
    assert probed == 18
    assert worst < 1e-4
    assert past > 1e-2  # the probe does change inputs that a label may see


def test_probes_in_parallel_find_the_same_as_one_by_one():
    nll = nll_of(tiny_base())
    with ThreadPoolExecutor(2) as pool:
        together = preflight(nll, EXAMPLES, NUM_CODES + 2, each=pool.map)
    assert together == preflight(nll, EXAMPLES, NUM_CODES + 2)


def test_a_loss_that_forgets_to_shift_is_caught():
    """The logits of a row are scored against that row's own codes."""
    nll = nll_of(tiny_base())  # scores labels without a shift
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


def later(one, *, text=0, audio=0):
    """The same labels, each moved this many rows up, to the logits of an earlier row."""

    def moved(labels, rows):
        return np.pad(
            labels[rows:], [(0, rows)] + [(0, 0)] * (labels.ndim - 1), constant_values=-100
        )

    return replace(
        one,
        text_labels_L=moved(one.text_labels_L, text),
        audio_labels_AC=moved(one.audio_labels_AC, audio),
    )


@pytest.mark.parametrize("modality", ["text", "audio"])
def test_a_loss_that_shifts_shifted_labels_again_is_caught(modality):
    inner = nll_of(tiny_base())
    with pytest.raises(LeakError, match=f"no {modality} label .* Labels are shifted twice"):
        causality_probe(lambda one: inner(later(one, **{modality: 1})), EXAMPLES, NUM_CODES)


def undelayed(one):
    """Audio labels without the delay pattern that the inputs have."""
    columns = [np.roll(column, -c) for c, column in enumerate(one.audio_labels_AC.T)]
    return replace(one, audio_labels_AC=np.stack(columns, axis=1))


@pytest.mark.parametrize(
    ("broken", "one", "message"),
    [
        (lambda one: later(one, text=1), EXAMPLES[0], "the text label at row .* shifted twice"),
        (lambda one: later(one, audio=1), EXAMPLES[1], "codebook . label at row .* shifted twice"),
        (at_own_input, EXAMPLES[0], "the text label .* not shifted as label_offset 1 says"),
        (at_own_input, EXAMPLES[1], "codebook . label .* not shifted as label_offset 1 says"),
        (undelayed, EXAMPLES[1], "codebook [1-9] label .* another delay pattern"),
    ],
)
def test_a_label_that_is_not_the_next_input_is_caught(broken, one, message):
    with pytest.raises(LeakError, match=message):
        causality_probe(nll_of(tiny_base()), [broken(one)], NUM_CODES)


def test_a_leak_in_one_codebook_of_one_clip_is_caught():
    inner = nll_of(tiny_base())

    def echoing(one):
        text, audio = inner(one)
        learnt = one.audio_labels_AC[:-1, 2] != IGNORE
        return text, audio + 0.01 * float(one.codes_AC[1:, 2][learnt].sum())

    with pytest.raises(LeakError, match="the codebook 2 label"):
        causality_probe(echoing, EXAMPLES[1:2], NUM_CODES, num_labels=4)


def test_text_beside_much_audio_is_probed_too():
    inner = nll_of(tiny_base())
    audio = AudioPart(random_codes(np.random.default_rng(0), 60))
    parts = (TextPart("ab"), audio)
    turns = (Turn("user", (TextPart("say"),)), Turn("assistant", parts, target=True))
    one = encode_conversation(Conversation("talk", "chat", turns), vocabulary())

    def echoing(one):
        text, audio = inner(one)
        learnt = one.text_labels_L[:-1] != IGNORE
        return text + 0.01 * float(one.ids_L[1:][learnt].sum()), audio

    with pytest.raises(LeakError, match="the text label"):
        causality_probe(echoing, [one], NUM_CODES)


def test_a_function_that_scores_its_own_labels_is_refused():
    inner = nll_of(tiny_base())

    def own_labels(one):
        audio = np.full_like(one.audio_labels_AC, IGNORE)
        audio[:-1] = one.codes_AC[1:]
        return inner(replace(one, audio_labels_AC=audio))

    with pytest.raises(LeakError, match="must score the labels of the example that it is given"):
        causality_probe(own_labels, EXAMPLES[1:2], NUM_CODES)


def leaky(monkeypatch, batch, mode):
    """The batch with cross-attention that sees all audio rows, later ones included."""
    if mode == "text_to_audio":
        cross = batch.cross[mode]
        sees = torch.ones_like(cross.sees_audio_ST1A)
        return replace(batch, cross={mode: replace(cross, sees_audio_ST1A=sees)})
    attend = packed_forward._attend
    length = batch.cross[mode].audio_position_SA.shape[1]

    def attend_all(q, k, v, **mask):
        return attend(q, k, v, **(mask if q.shape[1] != length else {"is_causal": False}))

    monkeypatch.setattr(packed_forward, "_attend", attend_all)
    return batch


@pytest.mark.parametrize("mode", ["audio_self", "text_to_audio"])
@pytest.mark.parametrize(("trained", "leaks"), [(True, False), (True, True), (False, True)])
def test_cross_attention_that_sees_later_audio_is_caught_once_it_is_trained(
    monkeypatch, mode, trained, leaks
):
    """New modules start with o_proj = 0, which hides their leaks until a step has changed it."""
    config = trial(targets=("attention", "audio_attention"), cross_attention=mode)
    engine = Engine(tiny_base(), PackLimits.of([config], 1))
    engine.add("t", config)
    if trained:
        generator = torch.Generator().manual_seed(0)
        for view in engine.bank.views(0, "master").values():
            view.copy_(torch.randn(view.shape, generator=generator))
        engine.bank.refresh_compute()
    turns = (
        Turn("user", (TextPart("say"),)),
        Turn(
            "assistant",
            (TextPart("abcdef"), AudioPart(random_codes(np.random.default_rng(0), 9))),
            target=True,
        ),
    )
    one = encode_conversation(Conversation("talk", "chat", turns), vocabulary())

    def nll(one):
        batch = engine.batch({0: [one]})
        with monkeypatch.context() as patch:
            text_K, audio_KC = engine.evaluate(leaky(patch, batch, mode) if leaks else batch)
        return float(text_K[0]), float(audio_KC.sum())

    if trained and leaks:
        with pytest.raises(LeakError, match="attention is not causal"):
            causality_probe(nll, [one], NUM_CODES)
    else:
        assert causality_probe(nll, [one], NUM_CODES)[1] < 1e-4


def test_attention_that_sees_the_future_is_caught():
    base = tiny_base()
    inner = nll_of(base)

    def peeking(one):
        text, audio = inner(one)
        return text and text + float(one.ids_L[-2:].sum()), audio

    with pytest.raises(LeakError, match="attention is not causal"):
        causality_probe(peeking, EXAMPLES[:1], NUM_CODES)


@pytest.mark.parametrize("examples", [EXAMPLES, []])
def test_a_probe_that_cannot_fail_is_refused(examples):
    with pytest.raises(LeakError, match=f"sees nothing: of {4 * len(examples)} labels"):
        preflight(lambda one: (1.0, 1.0), examples, NUM_CODES + 2)


def test_a_base_far_worse_than_chance_is_refused_as_misaligned():
    inner = nll_of(tiny_base())
    with pytest.raises(LeakError, match="misaligned labels"):
        preflight(lambda one: (inner(one)[0], 3 * inner(one)[1]), EXAMPLES, NUM_CODES + 2)


def test_a_base_slightly_worse_than_chance_causes_a_warning(caplog):
    """Another codec's codes of the same shape cost the embedded base only 1.25 times chance."""
    base = load_base(BaseSettings(device="cpu"))
    nll, rng = nll_of(base), np.random.default_rng(0)

    def probe(codes_of):
        rows = [Dataset.open("embedded:arabic").row(n) for n in range(2)]
        talks = [tasks.speak(replace(row, codes=(codes_of(row.codes[0]),))) for row in rows]
        examples = [encode_conversation(talk, base.vocabulary) for talk in talks]
        preflight(nll, examples, base.model.config.codebook_size)

    probe(lambda codes_TC: codes_TC)
    assert not caplog.messages
    probe(lambda codes_TC: rng.integers(0, 256, codes_TC.shape).astype(np.uint16))
    (message,) = caplog.messages
    assert re.match(r"the base scores audio at 6\.\d\d nats per code, chance is 5\.55", message)


def test_a_base_without_a_finite_loss_is_refused():
    inner = nll_of(tiny_base())

    def broken(one):
        text, audio = inner(one)
        return text, audio and math.nan

    with pytest.raises(LeakError, match="has nan nats"):
        preflight(broken, EXAMPLES, NUM_CODES + 2)
