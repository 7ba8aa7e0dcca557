"""Labels are shifted once, end each codebook with one EOS, and cover only the target turn."""

import re
from dataclasses import replace

import numpy as np
import pytest

from higgs_tune.data.conversation import AudioPart, Conversation, TextPart, Turn
from higgs_tune.data.tokens import (
    CONTROL_TOKENS,
    IGNORE,
    delay_codes,
    encode_conversation,
    undelay_codes,
)
from higgs_tune.errors import DataError
from tests.models import NUM_CODEBOOKS, NUM_CODES, conversation, example, random_codes, vocabulary

BOS, EOS = NUM_CODES, NUM_CODES + 1


@pytest.mark.parametrize("num_frames", [1, 3, 20])
def test_delay_pattern_matches_the_stock_processor(num_frames):
    import torch
    from transformers import HiggsAudioV2Processor

    codes_TC = random_codes(np.random.default_rng(0), num_frames)
    stock = HiggsAudioV2Processor.__new__(HiggsAudioV2Processor)
    stock.audio_stream_bos_id, stock.audio_stream_eos_id = BOS, EOS
    framed = np.pad(codes_TC.T.astype(np.int64), ((0, 0), (1, 0)), constant_values=BOS)
    framed = np.pad(framed, ((0, 0), (0, 1)), constant_values=EOS)
    theirs = stock.build_delay_pattern(torch.from_numpy(framed)[None])[0].T.numpy()
    ours = delay_codes(codes_TC, BOS, EOS)
    assert len(ours) == num_frames + NUM_CODEBOOKS + 1
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(undelay_codes(ours, EOS), codes_TC)


@pytest.mark.parametrize("task", ["transcribe", "speak", "clone"])
def test_user_audio_begins_with_its_own_token_if_the_tokenizer_has_one(task):
    """As in boson_multimodal's prepare_chatml_sample; nothing else differs."""
    talk, own = conversation(task, 3), 999
    plain = encode_conversation(talk, vocabulary())
    found = encode_conversation(talk, replace(vocabulary(), audio_in_bos=own))
    differs = plain.ids_L != found.ids_L
    assert differs.sum() == (task == "transcribe")
    assert set(found.ids_L[differs]) <= {own}
    assert set(plain.ids_L[differs]) <= {vocabulary().audio_bos}
    for name in ("audio_rows_A", "codes_AC", "text_labels_L", "audio_labels_AC"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(found, name))


@pytest.mark.parametrize("task", ["transcribe", "speak", "clone"])
def test_every_label_is_the_next_rows_input(task):
    one = example(task, 5)
    for row in np.flatnonzero(one.text_labels_L != IGNORE):
        assert one.text_labels_L[row] == one.ids_L[row + 1]
    for row, codebook in np.argwhere(one.audio_labels_AC != IGNORE):
        assert one.audio_rows_A[row + 1] == one.audio_rows_A[row] + 1
        assert one.audio_labels_AC[row, codebook] == one.codes_AC[row + 1, codebook]


@pytest.mark.parametrize("task", ["speak", "clone"])
def test_each_codebook_learns_its_codes_and_one_eos(task):
    talk = conversation(task, 3)
    target = talk.turns[-1].parts[0].codes_TC
    one = encode_conversation(talk, vocabulary())
    for codebook in range(NUM_CODEBOOKS):
        learnt = one.audio_labels_AC[:, codebook]
        np.testing.assert_array_equal(learnt[learnt != IGNORE], [*target[:, codebook], EOS])
    assert BOS not in one.audio_labels_AC
    assert (one.text_labels_L == IGNORE).all()


def test_transcribe_learns_only_its_text_and_the_end_of_turn():
    voc = vocabulary()
    talk = conversation("transcribe", 3)
    one = encode_conversation(talk, voc)
    learnt = one.text_labels_L[one.text_labels_L != IGNORE]
    text = talk.turns[-1].parts[0].text
    np.testing.assert_array_equal(learnt, [*voc.encode_text(text), voc.end_of_turn])
    assert (one.audio_labels_AC == IGNORE).all()


def test_clone_learns_neither_its_system_turn_nor_its_reference():
    talk = conversation("clone", 3)
    with_system = Conversation("k", "clone", (Turn("system", (TextPart("be kind"),)), *talk.turns))
    one = encode_conversation(with_system, vocabulary())
    reference_rows = len(talk.turns[1].parts[0].codes_TC) + NUM_CODEBOOKS + 1
    assert (one.audio_labels_AC[:reference_rows] == IGNORE).all()
    assert (one.audio_labels_AC[reference_rows:] != IGNORE).any()
    assert (one.text_labels_L == IGNORE).all()


def test_each_code_row_has_one_audio_placeholder():
    voc = vocabulary()
    one = example("clone", 4)
    placeholders = np.isin(one.ids_L, [voc.audio, voc.audio_delay])
    np.testing.assert_array_equal(np.flatnonzero(placeholders), one.audio_rows_A)
    assert len(one.codes_AC) == placeholders.sum()


def test_nothing_to_learn_is_an_error():
    talk = Conversation("row 7", "chat", (Turn("user", (TextPart("hello"),)),))
    with pytest.raises(DataError, match="row 7: no assistant turn to learn from"):
        encode_conversation(talk, vocabulary())


@pytest.mark.parametrize("name", CONTROL_TOKENS)
def test_a_control_token_inside_a_text_is_refused(name):
    voc = vocabulary()
    parsing = replace(voc, encode_text=lambda t: [getattr(voc, name)] if t == "?" else [20])
    turns = (Turn("user", (TextPart("?"),)), Turn("assistant", (TextPart("a"),), target=True))
    with pytest.raises(DataError, match=f"row 7: .*{re.escape(CONTROL_TOKENS[name])}"):
        encode_conversation(Conversation("row 7", "chat", turns), parsing)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((3, 2), np.uint16), "needed \\(frames ≥ 1, 4\\)"),
        (np.zeros((0, 4), np.uint16), "needed \\(frames ≥ 1, 4\\)"),
        (np.full((3, 4), NUM_CODES, np.uint16), "outside the base's codebook of 30"),
    ],
)
def test_codes_that_do_not_fit_the_base_are_refused(codes, message):
    talk = Conversation("row 7", "speak", (Turn("assistant", (AudioPart(codes),), target=True),))
    with pytest.raises(DataError, match=message):
        encode_conversation(talk, vocabulary())


def test_a_decoded_clip_ends_before_the_first_frame_with_an_eos():
    codes_TC = random_codes(np.random.default_rng(0), 6)
    delayed_AC = delay_codes(codes_TC, BOS, EOS)
    delayed_AC[1 + 2 + 4, 2] = EOS  # frame 4 of codebook 2 only
    np.testing.assert_array_equal(undelay_codes(delayed_AC, EOS), codes_TC[:4])


@pytest.mark.parametrize("text_last", [True, False])
def test_end_of_turn_is_learnt_only_after_a_text(text_last):
    voc = vocabulary()
    text, audio = TextPart("hello"), AudioPart(random_codes(np.random.default_rng(0), 3))
    parts = (audio, text) if text_last else (text, audio)
    turns = (Turn("user", (TextPart("say"),)), Turn("assistant", parts, target=True))
    one = encode_conversation(Conversation("row 7", "chat", turns), voc)
    learnt = one.text_labels_L[one.text_labels_L != IGNORE].tolist()
    assert learnt == [*voc.encode_text("hello"), *[voc.end_of_turn] * text_last]


def test_the_last_rows_of_a_clip_are_delay_placeholders():
    voc = vocabulary()
    one = example("speak", 4)
    wanted = [voc.audio] * (7 + 2) + [voc.audio_delay] * (NUM_CODEBOOKS - 1)
    assert one.ids_L[one.audio_rows_A].tolist() == wanted
