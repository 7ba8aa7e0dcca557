"""Target paths select exactly the modules that they name, by full names."""

import re

import pytest
from torch import nn

from higgs_tune.errors import ConfigError
from higgs_tune.model.audio_attention import with_cross_attention
from higgs_tune.model.targets import PATTERNS, linear_modules, lora_regex
from tests.models import tiny_base

_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
WITHIN_A_LAYER = {
    "attention": [f"self_attn.{name}" for name in _ATTENTION],
    "text_mlp": [f"mlp.{name}" for name in _MLP],
    "audio_mlp": [f"audio_mlp.{name}" for name in _MLP],
}
HEADS = {"text_head": ["text_lm_head"], "audio_head": ["audio_lm_head"]}


@pytest.fixture(scope="module")
def stock():
    return tiny_base().model


@pytest.fixture(scope="module", params=["off", "audio_self", "text_to_audio"])
def model(request, stock):
    return with_cross_attention(stock, request.param, seed=0)


@pytest.mark.parametrize("path", PATTERNS)
def test_a_path_selects_exactly_its_linears_of_every_layer(path, model):
    """Also beside cross-attention modules, whose linears are named like those of self_attn."""
    wanted = HEADS.get(path) or [
        f"model.layers.{n}.{name}"
        for n in range(len(model.model.layers))
        for name in WITHIN_A_LAYER[path]
    ]
    assert sorted(linear_modules(model, path)) == sorted(wanted)
    by_peft = [n for n, _ in model.named_modules() if re.fullmatch(lora_regex([path]), n)]
    assert sorted(by_peft) == sorted(wanted)


@pytest.mark.parametrize("path", PATTERNS)
def test_a_path_that_matches_nothing_is_an_error(path, stock):
    """Names are matched in full: inside another model, the same modules have longer names."""
    inside = nn.ModuleDict({"inner": stock})
    with pytest.raises(ConfigError, match=f"targets: {path} matches no module of ModuleDict"):
        linear_modules(inside, path)


def test_the_regex_of_several_paths_is_their_union(stock):
    regex = lora_regex(("audio_mlp", "audio_attention", "text_head"))
    found = {name for name, _ in stock.named_modules() if re.fullmatch(regex, name)}
    assert found == {*linear_modules(stock, "audio_mlp"), "text_lm_head"}
