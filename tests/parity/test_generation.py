"""Generation with a cache equals the full forward, with and without new modules."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sides import stock_inputs
from transformers import DynamicCache, StaticCache

from higgs_tune.data.tokens import Encoded
from higgs_tune.errors import ModelError
from higgs_tune.model.audio_attention import with_cross_attention
from tests.models import NUM_CODEBOOKS, NUM_CODES, example, tiny_base

MODES = ["off", "audio_self", "text_to_audio"]
# a clip before text, a clip after text, and reference text and audio before both
TASKS = ["transcribe", "speak", "clone"]
STREAM_BOS, STREAM_EOS = NUM_CODES, NUM_CODES + 1


@pytest.fixture(params=MODES)
def model(request):
    """Random weights everywhere, so that every path affects the logits."""
    model = with_cross_attention(tiny_base().model, request.param, seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "audio_attn" in name:
                parameter.normal_(0.8 if "norm" in name else 0.0, 0.2, generator=generator)
    return model


def inputs_of(examples: list[Encoded]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in stock_inputs(examples, NUM_CODEBOOKS).items() if "labels" not in k}


def chunks(one: Encoded, first: int) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs of the first rows together, then row by row, as generation gives them."""
    audio_at = {int(row): n for n, row in enumerate(one.audio_rows_A)}
    for start, stop in [(0, first), *((row, row + 1) for row in range(first, one.num_rows))]:
        codes = [one.codes_AC[audio_at[row]] for row in range(start, stop) if row in audio_at]
        given = {}
        if codes:
            given["audio_input_ids"] = torch.from_numpy(np.stack(codes))[None]
        if stop - start > 1 and codes:
            given["audio_input_ids_mask"] = torch.ones(1, len(codes), dtype=torch.bool)
        if stop - start > 1 or not codes:  # a generated audio row has no input_ids
            given["input_ids"] = torch.from_numpy(one.ids_L[start:stop])[None]
        yield given


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("first", [1, 4, 13])
def test_row_by_row_logits_equal_the_full_forward(model, task, first):
    one = example(task, 3, num_frames=9, num_letters=5)
    whole = model.model(**inputs_of([one]), use_cache=False).last_hidden_state
    cache, rows = DynamicCache(config=model.config), []
    for given in chunks(one, first):
        out = model.model(**given, cache=cache, use_cache=True)
        rows.append(out.last_hidden_state)
    assert cache.get_seq_length() == one.num_rows
    hidden = torch.cat(rows, dim=1)
    for head in (model.text_lm_head, model.audio_lm_head):
        torch.testing.assert_close(head(hidden), head(whole), rtol=1e-5, atol=1e-5)


def prompts(num_letters: list[int]) -> dict[str, torch.Tensor]:
    """Left-padded prompts with a reference clip, up to the answer's <|audio_out_bos|>."""
    examples = [example("clone", n, num_frames=3, num_letters=n) for n in num_letters]
    cuts = [int(e.audio_rows_A[-(3 + NUM_CODEBOOKS + 1)]) for e in examples]
    longest = max(cuts)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    attention = torch.zeros_like(ids)
    codes = []
    for n, (e, cut) in enumerate(zip(examples, cuts, strict=True)):
        ids[n, longest - cut :] = torch.from_numpy(e.ids_L[:cut])
        attention[n, longest - cut :] = 1
        codes.append(torch.from_numpy(e.codes_AC[: int((e.audio_rows_A < cut).sum())]))
    audio = torch.stack(codes)  # all references have equally many frames
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "audio_input_ids": audio,
        "audio_input_ids_mask": torch.ones(audio.shape[:2], dtype=torch.bool),
    }


def greedy_by_full_forward(model, prompt: dict[str, torch.Tensor], num_steps: int) -> torch.Tensor:
    """Greedy delayed codes after one prompt, by a full forward for each row."""
    pad = int((prompt["attention_mask"][0] == 0).sum())
    ids, audio = prompt["input_ids"][:, pad:], prompt["audio_input_ids"]
    ended_at = None
    made = []
    for step in range(num_steps):
        mask = torch.ones(audio.shape[:2], dtype=torch.bool)
        out = model(
            input_ids=ids, audio_input_ids=audio, audio_input_ids_mask=mask, use_cache=False
        )
        logits = out.logits[0, -1].unflatten(-1, (NUM_CODEBOOKS, -1))
        codes = logits.argmax(-1)
        codes[step:] = STREAM_BOS  # codebook k starts k rows later
        if ended_at is not None:  # and ends k rows after the row of the first EOS
            codes[: step - ended_at] = STREAM_EOS
        elif (codes == STREAM_EOS).any():
            ended_at = step
        made.append(codes)
        if (codes == STREAM_EOS).all():
            break
        token = (
            model.config.audio_token_id if ended_at is None else model.config.audio_delay_token_id
        )
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        audio = torch.cat([audio, codes[None, None]], dim=1)
    return torch.stack(made)


@pytest.mark.parametrize("num_letters", [[4], [4, 11]])
def test_greedy_generation_equals_the_full_forward(model, num_letters):
    prompt = prompts(num_letters)
    num_steps = 14
    made = model.generate(**prompt, do_sample=False, max_new_tokens=num_steps)
    made = made[:, prompt["audio_input_ids"].shape[1] :]
    for n in range(len(num_letters)):
        alone = {name: value[n : n + 1] for name, value in prompt.items()}
        expected = greedy_by_full_forward(model, alone, num_steps)
        torch.testing.assert_close(made[n, : len(expected)], expected, rtol=0, atol=0)
        assert len(expected.unique(dim=0)) > NUM_CODEBOOKS + 2  # not one row over and over


def test_the_marks_of_audio_rows_survive_cropping_the_cache(model):
    one = example("clone", 3, num_frames=9, num_letters=5)
    cache = DynamicCache(config=model.config)
    outs = [
        model.model(**given, cache=cache, use_cache=True).last_hidden_state
        for given in chunks(one, 4)
    ]
    last = list(chunks(one, one.num_rows - 1))[-1]
    cache.crop(-1)
    again = model.model(**last, cache=cache, use_cache=True).last_hidden_state
    torch.testing.assert_close(again, outs[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_cache_that_the_new_modules_cannot_grow_is_refused(mode):
    model = with_cross_attention(tiny_base().model, mode, seed=1)
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ModelError, match="does not work with a StaticCache"):
        model(**inputs_of([example("speak", 1)]), cache=cache)
