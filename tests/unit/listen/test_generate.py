"""Speech and text from prompts: the training format, the stop, batches, seeds."""

import dataclasses
from unicodedata import normalize

import numpy as np
import pytest
import soundfile
import torch

from higgs_tune.data.codec import load_codec
from higgs_tune.data.conversation import AudioPart, Turn
from higgs_tune.data.mel_codec import MelRvqCodec, MelRvqCodecConfig
from higgs_tune.data.tokens import encode_conversation
from higgs_tune.errors import DataError
from higgs_tune.listen.generate import (
    _spoken,
    prompt_before_audio,
    speak,
)
from higgs_tune.listen.options import SpeechOptions
from higgs_tune.listen.takes import Reference, take_prompt
from higgs_tune.model.writing import Prompt, prompt_before_text, write_text
from tests.models import NUM_CODEBOOKS, NUM_CODES, conversation, tiny_base, vocabulary
from tests.unit.data.recordings import RATE_HZ, speech

GREEDY = SpeechOptions(temperature=0)
BOS, EOS = NUM_CODES, NUM_CODES + 1


def prompt_of(talk):
    encoded = encode_conversation(talk, vocabulary())
    return (prompt_before_text if talk.task == "transcribe" else prompt_before_audio)(encoded)


def spoken_codes(talk):
    return talk.turns[-1].parts[0].codes_TC


@pytest.mark.parametrize("task", ["speak", "clone"])
def test_a_prompt_is_the_training_sequence_up_to_the_targets_first_row(task):
    talk = conversation(task, 5, num_frames=6)
    encoded = encode_conversation(talk, vocabulary())
    prompt = prompt_of(talk)
    assert prompt.ids_L[-1] == vocabulary().audio_bos
    assert len(encoded.audio_rows_A) - len(prompt.codes_AC) == 6 + NUM_CODEBOOKS + 1
    np.testing.assert_array_equal(prompt.ids_L, encoded.ids_L[: len(prompt.ids_L)])
    assert encoded.audio_rows_A[len(prompt.codes_AC)] == len(prompt.ids_L)


@pytest.mark.parametrize("file", ["آمين\nثم", "\ufeffآمين\r\nثم\r\n"])
def test_a_prompt_does_not_depend_on_the_form_of_its_text(file: str):
    letters = dataclasses.replace(
        vocabulary(), encode_text=lambda text: [10**6 + ord(c) for c in text]
    )
    prompts = [
        take_prompt(text, None, MelRvqCodec(MelRvqCodecConfig()), letters)
        for text in ("آمين\nثم", normalize("NFD", file))
    ]
    assert list(prompts[0].ids_L) == list(prompts[1].ids_L)


@pytest.mark.parametrize("more", ["\r\n", " ", "\n"])
def test_whitespace_after_a_reference_text_is_ignored(tmp_path, more):
    letters = dataclasses.replace(
        vocabulary(), encode_text=lambda text: [10**6 + ord(c) for c in text]
    )
    letters = dataclasses.replace(letters, num_codebooks=8, stream_bos=1024, stream_eos=1025)
    soundfile.write(tmp_path / "r.wav", speech(0), RATE_HZ)
    prompts = [
        take_prompt("hi", Reference(tmp_path / "r.wav", text), load_codec("embedded"), letters)
        for text in ("hello", f"hello{more}")
    ]
    assert list(prompts[0].ids_L) == list(prompts[1].ids_L)


def test_a_prompt_does_not_depend_on_the_speech_that_follows():
    talk = conversation("clone", 5)
    other = Turn("assistant", (AudioPart(np.zeros((1, 4), np.uint16)),), target=True)
    cut = prompt_of(dataclasses.replace(talk, turns=(*talk.turns[:-1], other)))
    np.testing.assert_array_equal(cut.ids_L, prompt_of(talk).ids_L)
    np.testing.assert_array_equal(cut.codes_AC, prompt_of(talk).codes_AC)


def test_a_text_prompt_ends_before_the_first_letter():
    talk = conversation("transcribe", 5, num_letters=6)
    encoded = encode_conversation(talk, vocabulary())
    prompt = prompt_of(talk)
    assert encoded.num_rows - len(prompt.ids_L) == 6 + 1  # the letters and <|eot_id|>
    assert len(prompt.codes_AC) == len(encoded.codes_AC)


def test_an_overfitted_model_speaks_its_clips_and_stops(by_heart):
    base, talks = by_heart
    for talk in talks[:4]:
        spoken = speak(base.model, vocabulary(), [prompt_of(talk)], GREEDY, seed=0, max_frames=40)[
            0
        ]
        np.testing.assert_array_equal(spoken.codes_TC, spoken_codes(talk))
        assert (spoken.reached_eos, spoken.num_clipped) == (True, 0)


def test_speech_exactly_as_long_as_the_limit_ends_and_longer_is_cut_off(by_heart):
    base, talks = by_heart
    talk = talks[1]
    num_frames = len(spoken_codes(talk))
    for limit, ended in ((num_frames, True), (num_frames - 1, False), (1, False)):
        spoken = speak(
            base.model, vocabulary(), [prompt_of(talk)], GREEDY, seed=0, max_frames=limit
        )[0]
        assert spoken.reached_eos is ended
        np.testing.assert_array_equal(spoken.codes_TC, spoken_codes(talk)[:limit])


def test_clips_spoken_together_equal_clips_spoken_alone(by_heart):
    base, talks = by_heart
    model = tiny_base(seed=8).model  # never ends: each code depends on every earlier row
    odd = [conversation("clone", 20 + n, num_frames=3, num_letters=2 + 5 * n) for n in range(3)]
    for this, some in ((base.model, talks[:4]), (model, [*odd, *talks[:2]])):
        prompts = [prompt_of(talk) for talk in some]
        together = speak(this, vocabulary(), prompts, GREEDY, seed=0, max_frames=25)
        for prompt, spoken in zip(prompts, together, strict=True):
            alone = speak(this, vocabulary(), [prompt], GREEDY, seed=0, max_frames=25)[0]
            np.testing.assert_array_equal(spoken.codes_TC, alone.codes_TC)
            assert spoken.reached_eos == alone.reached_eos


def test_speech_depends_on_its_seed_and_not_on_the_global_random_state():
    model, prompts = tiny_base().model, [prompt_of(conversation("speak", 1))]

    def said(seed):
        return speak(model, vocabulary(), prompts, SpeechOptions(), seed=seed, max_frames=12)[0]

    torch.manual_seed(1)
    first, state = said(7).codes_TC, torch.get_rng_state()
    torch.manual_seed(2)
    np.testing.assert_array_equal(said(7).codes_TC, first)
    assert not np.array_equal(said(8).codes_TC, first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_start_code_inside_speech_becomes_the_last_code():
    rows_AC = np.full((6, 2), 3)
    rows_AC[0] = BOS
    rows_AC[3, 0] = BOS  # codebook 0 of frame 2
    voc = dataclasses.replace(vocabulary(), num_codebooks=2)
    spoken = _spoken(rows_AC, voc, max_frames=9)
    assert spoken.codes_TC.tolist() == [[3, 3], [3, 3], [NUM_CODES - 1, 3], [3, 3]]
    assert (spoken.reached_eos, spoken.num_clipped) == (False, 1)


def test_a_prompt_that_leaves_no_room_is_refused():
    base = tiny_base()
    base.model.config.max_position_embeddings = 30
    prompts = [prompt_of(conversation("clone", 1, num_letters=25))]
    with pytest.raises(DataError, match=r"the base can hold 30.*Shorten the text"):
        speak(base.model, vocabulary(), prompts, GREEDY, seed=0, max_frames=5)


def test_an_overfitted_model_writes_the_texts_of_its_clips(by_heart):
    base, talks = by_heart
    for talk in talks[4:]:
        text = list(vocabulary().encode_text(talk.turns[-1].parts[0].text))
        written = write_text(base.model, vocabulary(), prompt_of(talk), max_tokens=40)
        assert (list(written.ids), written.reached_end) == (text, True)
        short = write_text(base.model, vocabulary(), prompt_of(talk), max_tokens=2)
        assert (list(short.ids), short.reached_end) == (text[:2], False)


def test_control_tokens_other_than_the_end_are_never_written():
    model, voc = tiny_base().model, vocabulary()
    head = model.text_lm_head.weight  # all control tokens but the end score above every letter
    head.zero_()
    state = model.model(
        input_ids=torch.from_numpy(prompt_of(conversation("speak", 1)).ids_L)[None]
    ).last_hidden_state[0, -1]
    head[sorted(voc.control_ids.keys() - {voc.end_of_turn})] = state
    head[20] = 0.5 * state
    prompt = Prompt("p", prompt_of(conversation("speak", 1)).ids_L, np.zeros((0, 4), np.int64))
    assert write_text(model, voc, prompt, max_tokens=1).ids == (20,)
