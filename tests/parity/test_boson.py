"""A snapshot in the original format gives the original code's logits."""

import pytest
import torch
from sides import stock_inputs
from torch.nn import functional as F

from higgs_tune.config import BaseSettings
from higgs_tune.data.collate import collate
from higgs_tune.errors import ModelError
from higgs_tune.model.audio_attention import cross_attention_of, with_cross_attention
from higgs_tune.model.load import load_base, load_checkpoint
from higgs_tune.model.packed_forward import packed_nll
from higgs_tune.train.engine import Engine
from higgs_tune.train.residents import PackLimits
from tests.boson_reference import boson_logits
from tests.checkpoints import boson_config, write_boson
from tests.models import NUM_CODEBOOKS, example, tiny_base, trial

EXAMPLES = [example("transcribe", 1, 9, 5), example("clone", 3, 4, 3), example("speak", 2, 6, 11)]


def settings(folder) -> BaseSettings:
    return BaseSettings(path=str(folder), device="cpu")


def whole_logits(model, one):
    """Text logits of every row and audio logits of the audio rows, by the whole model."""
    inputs = {k: v for k, v in stock_inputs([one], NUM_CODEBOOKS).items() if "labels" not in k}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[0]
    audio = model.audio_lm_head(hidden[torch.from_numpy(one.audio_rows_A)])
    return model.text_lm_head(hidden), audio.unflatten(-1, (model.config.num_codebooks, -1))


def reference_sums(weights, config, examples):
    """Summed nats of the labels under the original's logits: of text, and of each codebook."""
    text, audio = torch.zeros(()), torch.zeros(config["audio_num_codebooks"])
    for one in examples:
        text_logits, audio_logits = boson_logits(weights, config, one)
        text += F.cross_entropy(text_logits, torch.from_numpy(one.text_labels_L), reduction="sum")
        labels = torch.from_numpy(one.audio_labels_AC)
        nll = F.cross_entropy(audio_logits.flatten(0, 1), labels.flatten(), reduction="none")
        audio += nll.unflatten(0, labels.shape).sum(0)
    return text, audio


@pytest.mark.parametrize("audio_self", [False, True])
def test_the_whole_model_gives_the_originals_logits(tmp_path, audio_self):
    weights = write_boson(tmp_path / "base", audio_self=audio_self)
    base = load_checkpoint(settings(tmp_path / "base"))
    assert cross_attention_of(base.model.config) == ("audio_self" if audio_self else "off")
    config = boson_config(2, audio_self=audio_self)
    for one in EXAMPLES:
        for ours, theirs in zip(
            whole_logits(base.model, one), boson_logits(weights, config, one), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_reference_depends_on_the_audio_self_flag(tmp_path):
    weights = write_boson(tmp_path / "base", audio_self=True)
    on, off = (
        boson_logits(weights, boson_config(2, audio_self=flag), EXAMPLES[0])[1]
        for flag in (True, False)
    )
    assert not torch.allclose(on, off, atol=1e-2)


def test_the_packed_forward_gives_the_originals_losses(tmp_path):
    weights = write_boson(tmp_path / "base", audio_self=False)
    base = load_base(settings(tmp_path / "base"))
    text, audio = packed_nll(base.model, collate({0: EXAMPLES}), None)
    expected = reference_sums(weights, boson_config(2, audio_self=False), EXAMPLES)
    torch.testing.assert_close(text[0], expected[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(audio[0], expected[1], rtol=1e-5, atol=1e-4)


def test_the_packed_audio_self_modules_give_the_originals_losses(tmp_path):
    """The snapshot's stock part is the base, its audio_attn an adapter's new modules."""
    weights = write_boson(tmp_path / "base", audio_self=True)
    whole = load_checkpoint(settings(tmp_path / "base")).model
    stock = load_stock_part(tmp_path, weights)
    config = trial(cross_attention="audio_self", targets=("attention", "audio_attention"))
    engine = Engine(stock, PackLimits.of([config], num_slots=1))
    engine.add("on", config)
    parameters = dict(whole.named_parameters())
    views = engine.bank.views(engine.residents["on"].slot, "master")
    assert any("audio_attn" in name for name in views)
    for name, view in views.items():
        if name in parameters:
            view.copy_(parameters[name])
    text, audio = engine.evaluate(engine.batch({0: EXAMPLES}))
    expected = reference_sums(weights, boson_config(2, audio_self=True), EXAMPLES)
    torch.testing.assert_close(text[0], expected[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(audio[0], expected[1], rtol=1e-5, atol=1e-4)


def load_stock_part(tmp_path, weights):
    """The same snapshot without its audio_attn, as a base for training."""
    write_boson(tmp_path / "stock", audio_self=False)
    base = load_base(settings(tmp_path / "stock"))
    with torch.no_grad():
        for name, parameter in base.model.named_parameters():
            outside = {
                "model.embed_audio_tokens.embed_audio_tokens.weight": "audio_codebook_embeddings.weight",
                "audio_lm_head.weight": "audio_decoder_proj.audio_lm_head.weight",
                "text_lm_head.weight": "audio_decoder_proj.text_lm_head.weight",
            }
            parameter.copy_(weights[outside.get(name, name.removeprefix("model."))])
    return base


def test_new_modules_cannot_be_added_twice():
    model = with_cross_attention(tiny_base().model, "audio_self", seed=0)
    with pytest.raises(ModelError, match=r"already has cross_attention modules \(audio_self\)"):
        with_cross_attention(model, "text_to_audio", seed=0)
