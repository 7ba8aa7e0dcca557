"""The system turn before each clip: the same in training, validation and speaking, and saved."""

import dataclasses

import numpy as np
import pytest

from higgs_tune.config import BaseSettings, DataSettings
from higgs_tune.config_data import TaskMix
from higgs_tune.data import tasks
from higgs_tune.data.conversation import TextPart, Turn
from higgs_tune.data.held_out import validation_sets
from higgs_tune.data.order import TrainOrder
from higgs_tune.data.tokens import CONTROL_TOKENS, encode_conversation
from higgs_tune.errors import ConfigError
from higgs_tune.listen.bases import system_text_for
from higgs_tune.listen.clips import choose_clips
from higgs_tune.listen.options import EvaluateOptions
from higgs_tune.listen.takes import take_prompt
from higgs_tune.model.template import requires_system
from higgs_tune.train.checkpoint import read_system_text
from higgs_tune.train.examples import Examples
from higgs_tune.train.loop import PackLoop
from higgs_tune.train.residents import PackLimits
from tests.checkpoints import TEMPLATE, tokenizer
from tests.models import make_dataset, tiny_base, trial, vocabulary
from tests.unit.data.rows import chat, clip, make

TOLD = "speak as told"
SYSTEM = Turn("system", (TextPart(TOLD),))
DATA = DataSettings(num_val_clips=4, tasks=TaskMix(clone=1.0), system_text=TOLD)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


def same_turns(left, right):
    np.testing.assert_equal(
        [dataclasses.asdict(turn) for turn in left], [dataclasses.asdict(turn) for turn in right]
    )


def test_speech_follows_a_system_turn_but_transcriptions_and_chats_do_not(tmp_path):
    rows = [clip(n, speaker=f"s{n % 2}") for n in range(12)]
    held_out = [clip(n, "validation") for n in range(12, 16)]
    dataset = make(tmp_path, [*rows, *held_out, chat(0)])
    mix = TaskMix(transcribe=1, speak=1, clone=1)
    plain, told = (
        [
            c
            for step in range(8)
            for c in TrainOrder(dataset, mix, 5, 0, system_text=text).batch(step)
        ]
        for text in (None, TOLD)
    )
    sets = [validation_sets(dataset, 4, system_text=text) for text in (None, TOLD)]
    for name in ("transcribe", "transcribe_swapped", "speak"):
        plain, told = plain + list(getattr(sets[0], name)), told + list(getattr(sets[1], name))
    assert {talk.task for talk in told} == {"transcribe", "speak", "clone", "chat"}
    for before, after in zip(plain, told, strict=True):
        assert before.key == after.key
        spoken = before.task in ("speak", "clone")
        same_turns(after.turns, (SYSTEM, *before.turns) if spoken else before.turns)


@pytest.mark.parametrize("max_rows", [None, 54, 58])
def test_no_conversation_with_its_system_turn_is_longer_than_the_limit(dataset, max_rows):
    data = DATA.model_copy(update={"max_rows": max_rows, "max_frames": 10, "max_text_tokens": 8})
    examples = Examples(tiny_base(), dataset, data)
    order = examples.order(4, seed=0)
    assert (order.num_skipped == 0) == (max_rows is None)
    talks = [talk for step in range(12) for talk in order.batch(step)]
    assert {talk.task for talk in talks} >= {"transcribe", "speak"}
    for talk in talks:
        examples.encode(talk)  # raises if it is too long


def test_trained_tokens_are_those_that_the_chat_template_writes():
    row = dataclasses.replace(clip(0, text="good day"), codes=(np.zeros((1, 2), np.uint16),))
    talk = tasks.with_system_turn(tasks.speak(row), TOLD)
    voc = dataclasses.replace(vocabulary(), num_codebooks=2)
    ours = encode_conversation(talk, voc)
    messages = [
        {"role": "system", "content": [{"type": "text", "text": TOLD}]},
        {"role": "user", "content": [{"type": "text", "text": "good day"}]},
        {"role": "assistant", "content": [{"type": "audio"}]},
    ]
    text = tokenizer().apply_chat_template(messages, tokenize=False)
    frames = CONTROL_TOKENS["audio"] * (len(ours.codes_AC) - 1) + CONTROL_TOKENS["audio_delay"]
    text = text.replace(CONTROL_TOKENS["audio"], frames)
    assert tokenizer().encode(text, add_special_tokens=False) == ours.ids_L.tolist()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, False),
        (TEMPLATE, False),
        (
            "{% if messages[0].role != 'system' %}{{ raise_exception('system?') }}{% endif %}"
            + TEMPLATE,
            True,
        ),
    ],
)
def test_a_template_that_expects_a_system_message_is_noticed(dataset, caplog, template, expected):
    assert requires_system(tokenizer(template)) == expected
    base = dataclasses.replace(tiny_base(), tokenizer=tokenizer(template))
    for data in (DATA, DATA.model_copy(update={"system_text": None})):
        caplog.clear()
        Examples(base, dataset, data)
        told = "expects a system message, and data.system_text is not set" in caplog.text
        assert told == (expected and data.system_text is None)


def test_an_adapter_is_prompted_with_the_system_text_of_its_training(dataset, tmp_path):
    config, base = trial(), tiny_base()
    loop = PackLoop(base, dataset, DATA, PackLimits.of([config], num_slots=1))
    loop.join("a", config)
    loop.snapshot("a")(tmp_path)
    assert read_system_text(tmp_path) == TOLD
    assert system_text_for([tmp_path], None, BaseSettings()) == TOLD
    assert system_text_for([tmp_path], "other", BaseSettings()) == "other"
    assert system_text_for([tmp_path], "", BaseSettings()) is None
    assert system_text_for([], None, BaseSettings()) is None
    (talk, *_) = validation_sets(dataset, 4, system_text=TOLD).speak
    (part,) = talk.turns[1].parts
    prompt = take_prompt(part.text, None, None, base.vocabulary, TOLD)
    trained = encode_conversation(talk, base.vocabulary).ids_L
    assert list(prompt.ids_L) == list(trained[: len(prompt.ids_L)])
    clips = choose_clips(dataset, DATA, EvaluateOptions(num_generated=2), 400, len)
    for chosen in clips:
        assert chosen.spoken.turns[0] == SYSTEM


def test_comparing_adapters_of_different_system_texts_is_refused(dataset, tmp_path):
    config = trial()
    folders = [tmp_path / name for name in ("with", "without")]
    for folder, data in zip(
        folders, (DATA, DATA.model_copy(update={"system_text": None})), strict=True
    ):
        folder.mkdir()
        loop = PackLoop(tiny_base(), dataset, data, PackLimits.of([config], num_slots=1))
        loop.join("a", config)
        loop.snapshot("a")(folder)
    with pytest.raises(
        ConfigError, match=r"different system texts .*'speak as told'.* --system-text"
    ):
        system_text_for(folders, None, BaseSettings())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ok<|eot_id|>", "data.system_text: text holds the control token <|eot_id|>"),
        (" ", "data.system_text: text is empty"),
    ],
)
def test_a_system_text_that_cannot_be_trained_is_refused(dataset, text, message):
    data = DATA.model_copy(update={"system_text": text})
    with pytest.raises(ConfigError, match=message.replace("|", r"\|")):
        Examples(tiny_base(), dataset, data)
