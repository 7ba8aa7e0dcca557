"""Speech and text that adapters generate with a cache or in batches equal those without."""

import numpy as np
import pytest
import torch

from higgs_tune.config import ALL_LINEAR
from higgs_tune.data.tokens import encode_conversation, undelay_codes
from higgs_tune.listen.generate import prompt_before_audio, speak
from higgs_tune.listen.options import SpeechOptions
from higgs_tune.model.writing import prompt_before_text, write_text
from higgs_tune.train import checkpoint
from higgs_tune.train.engine import Engine
from higgs_tune.train.residents import PackLimits
from tests.models import NUM_CODES, conversation, tiny_base, trial, vocabulary

GREEDY = SpeechOptions(temperature=0)
MODES = ["off", "audio_self", "text_to_audio"]


@pytest.fixture(params=MODES)
def adapted(request, tmp_path):
    """A tiny base with a random adapter of each cross_attention mode."""
    new = () if request.param == "off" else ("audio_attention",)
    config = trial(cross_attention=request.param, targets=(*ALL_LINEAR, "text_head", *new))
    base = tiny_base(seed=8)
    engine = Engine(base, PackLimits.of([config], num_slots=1))
    engine.add("a", config)
    generator = torch.Generator().manual_seed(0)
    for view in engine.bank.views(engine.residents["a"].slot, "master").values():
        view.copy_(0.2 * torch.randn(view.shape, generator=generator))
    checkpoint.save_adapter(tmp_path, engine.state("a"), config, "tiny")
    with checkpoint.adapted(base.model, tmp_path) as model:
        yield model


def prompts(task, count=3):
    talks = [conversation(task, 40 + n, 3 + 2 * n, 2 + 6 * n) for n in range(count)]
    before = prompt_before_text if task == "transcribe" else prompt_before_audio
    return [before(encode_conversation(talk, vocabulary())) for talk in talks]


def whole_sequences(model, prompt, num_rows):
    """Rows of codes generated greedily after a prompt with a reference, without a cache."""
    codes = torch.from_numpy(prompt.codes_AC)[None]
    rows = model.generate(
        input_ids=torch.from_numpy(prompt.ids_L)[None],
        attention_mask=torch.ones(1, len(prompt.ids_L), dtype=torch.long),
        audio_input_ids=codes,
        audio_input_ids_mask=torch.ones(codes.shape[:2], dtype=torch.bool),
        max_new_tokens=num_rows,
        do_sample=False,
        use_cache=False,
    )
    return rows[0, codes.shape[1] :].numpy()


def test_speech_in_batches_equals_speech_alone(adapted):
    some = [*prompts("speak"), *prompts("clone")]
    num_frames = 0
    together = speak(adapted, vocabulary(), some, GREEDY, seed=0, max_frames=20)
    for prompt, spoken in zip(some, together, strict=True):
        alone = speak(adapted, vocabulary(), [prompt], GREEDY, seed=0, max_frames=20)[0]
        np.testing.assert_array_equal(spoken.codes_TC, alone.codes_TC)
        num_frames += len(alone.codes_TC)
    assert num_frames > 20


def test_speech_with_a_cache_equals_speech_without(adapted):
    for prompt in prompts("clone"):
        cached = speak(adapted, vocabulary(), [prompt], GREEDY, seed=0, max_frames=20)[0]
        rows_AC = whole_sequences(adapted, prompt, num_rows=20 + 4 + 1)
        whole_TC = np.minimum(undelay_codes(rows_AC, NUM_CODES + 1)[:20], NUM_CODES - 1)
        np.testing.assert_array_equal(cached.codes_TC, whole_TC)


def test_text_with_a_cache_equals_text_without(adapted):
    voc = vocabulary()
    banned = sorted(voc.control_ids.keys() - {voc.end_of_turn})
    for prompt in prompts("transcribe"):
        written = write_text(adapted, voc, prompt, max_tokens=12)
        ids, codes = list(prompt.ids_L), torch.from_numpy(prompt.codes_AC)[None]
        for token in written.ids:
            hidden = adapted.model(
                input_ids=torch.tensor([ids]),
                audio_input_ids=codes,
                audio_input_ids_mask=torch.ones(codes.shape[:2], dtype=torch.bool),
                use_cache=False,
            ).last_hidden_state[0, -1]
            logits = adapted.text_lm_head(hidden)
            logits[banned] = -torch.inf
            assert token == int(logits.argmax())
            ids.append(token)
        assert written.ids
