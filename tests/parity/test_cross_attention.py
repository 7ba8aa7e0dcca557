"""The new modules match plain references and start without an effect on the model."""

import math

import pytest
import torch
from sides import stock_inputs

from higgs_tune.config_file import validate
from higgs_tune.data.collate import collate, count_targets
from higgs_tune.errors import ModelError
from higgs_tune.model import audio_attention
from higgs_tune.model.audio_attention import with_cross_attention
from higgs_tune.model.new_modules import initial_new_modules
from higgs_tune.model.packed_forward import packed_nll
from higgs_tune.train.engine import Engine
from higgs_tune.train.residents import PackLimits
from tests.models import NUM_CODEBOOKS, example, tiny_base, trial

MIXED = [example("transcribe", 1, 9, 5), example("clone", 3, 4, 3), example("speak", 2, 6, 11)]
MODES = ["audio_self", "text_to_audio"]


def rms(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x_HLE, positions, theta=10000.0):
    half = x_HLE.shape[-1] // 2
    angles = positions[:, None].double() / theta ** (torch.arange(half).double() / half)
    cos, sin = (torch.cat([f, f], dim=1).float() for f in (angles.cos(), angles.sin()))
    swapped = torch.cat([-x_HLE[..., half:], x_HLE[..., :half]], dim=-1)
    return x_HLE * cos + swapped * sin


def attention(module, x_query, x_key, sees, query_pos, key_pos, *, zero_key=False):
    """Softmax attention row by row, straight from the definition."""
    head = 8

    def heads(linear, x):
        return (x @ linear.weight.T).unflatten(-1, (-1, head)).transpose(0, 1)

    q = rotate(heads(module.q_proj, x_query), query_pos)
    k = rotate(heads(module.k_proj, x_key), key_pos)
    v = heads(module.v_proj, x_key)
    k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], dim=0) for t in (k, v))
    out = torch.zeros_like(q)
    for row in range(q.shape[1]):
        scores = q[:, row : row + 1] @ k[:, sees[row]].transpose(1, 2) / math.sqrt(head)
        values = v[:, sees[row]]
        if zero_key:
            scores = torch.cat([torch.zeros(q.shape[0], 1, 1), scores], dim=-1)
            values = torch.cat([torch.zeros(q.shape[0], 1, head), values], dim=1)
        out[:, row : row + 1] = scores.softmax(-1) @ values
    return out.transpose(0, 1).flatten(1) @ module.o_proj.weight.T


def reference_hidden(model, example, mode):
    """The whole decoder for one example, by each layer's equations in turn, without mask tricks."""
    inner, eps = model.model, model.config.rms_norm_eps
    is_audio = torch.zeros(example.num_rows, dtype=torch.bool)
    is_audio[torch.from_numpy(example.audio_rows_A)] = True
    h = inner.embed_tokens(torch.from_numpy(example.ids_L)).clone()
    h[is_audio] = inner.embed_audio_tokens(torch.from_numpy(example.codes_AC))
    rows = torch.arange(len(h))
    causal = rows[:, None] >= rows[None, :]
    for layer in inner.layers:
        x = rms(h, layer.input_layernorm.weight, eps)
        x[is_audio] = rms(h[is_audio], layer.audio_input_layernorm.weight, eps)
        if mode == "audio_self":
            audio = rows[is_audio]
            update = attention(
                layer.audio_attn, x[audio], x[audio], causal[audio][:, audio], audio, audio
            )
            h = h.clone()
            h[audio] = h[audio] + update
            x[audio] = rms(h[audio], layer.audio_post_audio_attn_layer_norm.weight, eps)
        elif mode == "text_to_audio":
            audio, text = rows[is_audio], rows[~is_audio]
            update = attention(
                layer.text_audio_attn, x[text], x[audio], causal[text][:, audio], text, audio,
                zero_key=True,
            )  # fmt: skip
            h = h.clone()
            h[text] = h[text] + update
            x[text] = rms(h[text], layer.input_layernorm.weight, eps)
        h = h + attention(layer.self_attn, x, x, causal, rows, rows)
        text_out = layer.mlp(rms(h, layer.post_attention_layernorm.weight, eps))
        audio_out = layer.audio_mlp(rms(h, layer.audio_post_attention_layernorm.weight, eps))
        h = h + torch.where(is_audio[:, None], audio_out, text_out)
    return rms(h, inner.norm.weight, eps)


def randomise(model):
    """Give the new modules random weights that have an effect."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "audio_attn" in name:
                parameter.normal_(0.8 if "norm" in name else 0.0, 0.2, generator=generator)
    return model


@pytest.mark.parametrize("mode", ["off", *MODES])
def test_model_matches_a_plain_reference_of_its_equations(mode):
    model = randomise(with_cross_attention(tiny_base().model, mode, seed=1))
    for one in MIXED:
        inputs = {k: v for k, v in stock_inputs([one], NUM_CODEBOOKS).items() if "labels" not in k}
        ours = model.model(**inputs, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(ours, reference_hidden(model, one, mode), rtol=1e-4, atol=1e-5)


def test_a_transformers_that_renamed_an_argument_of_the_layer_is_refused(monkeypatch):
    def forward(self, hidden_states, past_key_values=None, **kwargs):
        pass

    monkeypatch.setattr(audio_attention.HiggsAudioV2DecoderLayer, "forward", forward)
    with pytest.raises(ModelError, match=r"takes \['past_key_values'\] where .*'cache'.* expected"):
        with_cross_attention(tiny_base().model, "audio_self", seed=1)


@pytest.mark.parametrize("mode", MODES)
def test_new_modules_start_as_the_identity(mode):
    base = tiny_base()
    model = with_cross_attention(base.model, mode, seed=5)
    inputs = {k: v for k, v in stock_inputs(MIXED, NUM_CODEBOOKS).items() if "labels" not in k}
    before = base.model(**inputs, use_cache=False).logits
    torch.testing.assert_close(model(**inputs, use_cache=False).logits, before, rtol=0, atol=2e-6)


@pytest.mark.parametrize("mode", MODES)
def test_the_identity_of_audio_self_also_depends_on_its_norm(mode):
    model = with_cross_attention(tiny_base().model, mode, seed=5)
    inputs = {k: v for k, v in stock_inputs(MIXED, NUM_CODEBOOKS).items() if "labels" not in k}
    before = model(**inputs, use_cache=False).logits
    changed = False
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "audio_post_audio_attn_layer_norm" in name:
                parameter.fill_(1.0)
                changed = True
    assert changed == (mode == "audio_self")
    moved = not torch.allclose(model(**inputs, use_cache=False).logits, before)
    assert moved == changed


@pytest.mark.parametrize("mode", MODES)
def test_packed_forward_matches_the_whole_model(mode):
    base = tiny_base()
    config = trial(cross_attention=mode, targets=("attention", "audio_attention"))
    other = trial(targets=("attention",))
    engine = Engine(base, PackLimits.of([config, other], num_slots=2))
    engine.add("off", other)
    engine.add("on", config)
    model = randomise(with_cross_attention(base.model, mode, seed=config.seed))
    views = engine.bank.views(engine.residents["on"].slot, "master")
    parameters = dict(model.named_parameters())
    for name, view in views.items():
        if name in parameters:
            view.copy_(parameters[name].detach())
    batch = engine.batch({0: MIXED[::-1], 1: MIXED})
    text_K, audio_KC = engine.evaluate(batch)
    counts = count_targets(MIXED, 4)
    ours = text_K[1] / counts.text + (audio_KC[1] / torch.from_numpy(counts.audio_C)).sum()
    whole = model(**stock_inputs(MIXED, NUM_CODEBOOKS), use_cache=False).loss
    torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-5)
    plain = packed_nll(base.model, collate({0: MIXED[::-1]}), None)
    torch.testing.assert_close(text_K[:1], plain[0], rtol=1e-5, atol=1e-5)


def test_audio_self_leaves_the_text_rows_before_self_attn_unchanged():
    """With the original flag on, text rows still read audio through self_attn alone."""
    base = tiny_base(num_layers=1)
    model = randomise(with_cross_attention(base.model, "audio_self", seed=1))
    one = example("transcribe", 1, 9, 5)
    inputs = {k: v for k, v in stock_inputs([one], NUM_CODEBOOKS).items() if "labels" not in k}
    seen = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    base.model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    model(**inputs, use_cache=False)
    base.model(**inputs, use_cache=False)
    is_text = torch.ones(one.num_rows, dtype=torch.bool)
    is_text[torch.from_numpy(one.audio_rows_A)] = False
    torch.testing.assert_close(seen[0][0, is_text], seen[1][0, is_text], rtol=0, atol=1e-6)
    assert not torch.allclose(seen[0][0, ~is_text], seen[1][0, ~is_text])


@pytest.mark.parametrize(("value", "mode"), [(True, "audio_self"), (False, "off")])
def test_yaml_booleans_mean_the_original_flag(value, mode):
    raw = trial(
        cross_attention=mode,
        targets=("attention", "audio_attention") if value else ("attention",),
    ).model_dump()
    read = validate(type(trial()), raw | {"cross_attention": value}, "test")
    assert read.cross_attention == mode


@pytest.mark.parametrize("mode", MODES)
def test_new_modules_are_drawn_from_the_seed_with_the_configs_deviation(mode):
    model = tiny_base().model
    first, again, other = (initial_new_modules(model, mode, seed) for seed in (1, 1, 2))
    for name, weight in first.items():
        is_drawn = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        assert torch.equal(weight, again[name])
        assert torch.equal(weight, other[name]) != is_drawn
        if is_drawn:
            assert float(weight.std()) == pytest.approx(model.config.initializer_range, rel=0.15)


@pytest.mark.parametrize("mode", MODES)
def test_new_modules_train_at_their_own_rate(mode):
    config = trial(
        cross_attention=mode, targets=("attention", "audio_attention"), learning_rate=1e-2,
        new_module_lr_factor=0.25, warmup_fraction=0.0,
    )  # fmt: skip
    engine = Engine(tiny_base(), PackLimits.of([config], num_slots=1))
    engine.add("on", config)
    before = engine.state("on").weights
    engine.forward_backward(engine.batch({0: MIXED}), {0: count_targets(MIXED, 4)})
    engine.optim_step(["on"])
    moved = {n: float((w - before[n]).abs().max()) for n, w in engine.state("on").weights.items()}
    # Adam's first step moves every weight by its rate, whatever its gradient
    rates = {"lora_B.weight": 1e-2, "audio_attn.o_proj.weight": 0.25e-2}
    for end, rate in rates.items():
        found = [largest for name, largest in moved.items() if name.endswith(end)]
        assert found and found == pytest.approx([rate] * len(found), rel=1e-2)
