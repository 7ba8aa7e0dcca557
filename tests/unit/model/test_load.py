"""Loading a base: every format gives the source's logits, and every fault is one clear error."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sides import stock_inputs
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from higgs_tune.config import BaseSettings
from higgs_tune.errors import ConfigError, ModelError
from higgs_tune.model.audio_attention import with_cross_attention
from higgs_tune.model.load import load_base, load_checkpoint, vocabulary_of
from tests.checkpoints import boson_config, boson_names, tokenizer, write_boson, write_native
from tests.models import NUM_CODEBOOKS, NUM_CODES, example, tiny_base

INDEX = "model.safetensors.index.json"
FORMATS = ["native", "boson"]


@pytest.fixture(params=FORMATS)
def folder(request, tmp_path: Path) -> Path:
    """A sharded checkpoint in each format."""
    path = tmp_path / "base"
    if request.param == "native":
        return write_native(path, tiny_base().model)
    write_boson(path, audio_self=False)
    return path


def settings(folder: Path, **changes) -> BaseSettings:
    return BaseSettings(**({"path": str(folder), "device": "cpu"} | changes))


def logits(model) -> torch.Tensor:
    stock = stock_inputs([example("clone", 3)], NUM_CODEBOOKS)
    inputs = {k: v for k, v in stock.items() if "labels" not in k}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    return torch.cat([model.text_lm_head(hidden), model.audio_lm_head(hidden)], dim=-1)


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def first_name(folder: Path) -> str:
    return min(json.loads((folder / INDEX).read_text())["weight_map"])


def edit(path: Path, **changes) -> None:
    """Change fields of a JSON file; None removes one."""
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


def rewrite(path: Path, change) -> None:
    """Change the tensors of one shard."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sharded_native_checkpoint_gives_the_stock_classes_logits(tmp_path, dtype):
    folder = write_native(tmp_path / "base", tiny_base().model)
    base = load_base(settings(folder, dtype=dtype))
    stock = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        folder, use_text_head=True, dtype=getattr(torch, dtype)
    )
    assert base.model.dtype == getattr(torch, dtype)
    torch.testing.assert_close(logits(base.model), logits(stock), rtol=0, atol=0)
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.folder == tmp_path / "base"
    assert base.vocabulary.encode_text("ab") == [13, 14]


def test_a_boson_snapshot_gives_the_logits_of_the_same_native_checkpoint(tmp_path):
    weights = write_boson(tmp_path / "boson", audio_self=False)
    base = load_base(settings(tmp_path / "boson"))
    native = HiggsAudioV2ForConditionalGeneration(base.model.config, use_text_head=True)
    names = boson_names(2, audio_self=False)
    native.load_state_dict({names[name]: tensor for name, tensor in weights.items()})
    torch.testing.assert_close(logits(base.model), logits(native), rtol=0, atol=0)
    assert base.model.config.codebook_size == NUM_CODES + 2
    assert base.model.generation_config.eos_token_id == base.vocabulary.end_of_turn


def test_a_checkpoint_loaded_from_the_original_is_saved_under_native_names(tmp_path):
    write_boson(tmp_path / "boson", audio_self=False)
    base = load_base(settings(tmp_path / "boson"))
    base.model.save_pretrained(tmp_path / "native")
    names = boson_names(2, audio_self=False).values()
    assert load_file(tmp_path / "native" / "model.safetensors").keys() == set(names)


def test_eager_attention_gives_the_logits_of_sdpa(folder):
    sdpa, eager = (
        load_checkpoint(settings(folder, attention=name)).model for name in ("sdpa", "eager")
    )
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(eager), logits(sdpa), rtol=1e-4, atol=1e-5)


def test_training_refuses_an_attention_that_it_does_not_use(folder):
    with pytest.raises(ConfigError, match=r"base\.attention: found eager"):
        load_base(settings(folder, attention="eager"))


def test_a_hub_id_loads_the_pinned_revision_from_the_cache(tmp_path, monkeypatch):
    revision = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub"
    write_native(cache / "models--owner--name" / "snapshots" / revision, tiny_base().model)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    base = load_base(settings(Path("owner/name"), revision=revision))
    assert base.source == "owner/name"
    torch.testing.assert_close(logits(base.model), logits(tiny_base().model), rtol=0, atol=0)
    with pytest.raises(ModelError, match="owner/name at 0000 cannot be downloaded"):
        load_base(settings(Path("owner/name"), revision="0000"))


def test_a_hub_id_without_a_revision_is_a_config_error():
    with pytest.raises(ConfigError, match=r"base\.revision: not set for Hub id owner/name"):
        load_base(settings(Path("owner/name")))


def drop_text_head(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    name = next(name for name in index["weight_map"] if "text_lm_head" in name)
    rewrite(folder / index["weight_map"].pop(name), lambda tensors: tensors.pop(name))
    (folder / INDEX).write_text(json.dumps(index))


def test_a_missing_text_head_is_an_error_that_names_the_setting(folder):
    drop_text_head(folder)
    with pytest.raises(
        ModelError, match=r"no text_lm_head.weight.*base\.text_head .*to from_embedding"
    ):
        load_base(settings(folder))


def test_a_missing_text_head_can_start_from_the_embedding(folder):
    drop_text_head(folder)
    model = load_base(settings(folder, text_head="from_embedding")).model
    assert torch.equal(model.text_lm_head.weight, model.model.embed_tokens.weight)
    assert model.text_lm_head.weight is not model.model.embed_tokens.weight


def test_an_existing_text_head_is_not_replaced(folder):
    kept, asked = (
        load_base(settings(folder, text_head=choice)).model
        for choice in ("checkpoint", "from_embedding")
    )
    assert torch.equal(asked.text_lm_head.weight, kept.text_lm_head.weight)
    assert not torch.equal(kept.text_lm_head.weight, kept.model.embed_tokens.weight)


def test_a_truncated_shard_is_a_model_error(folder):
    path = shard_of(folder, first_name(folder))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=rf"{path.name}: cut off or damaged"):
        load_base(settings(folder))


def test_a_missing_shard_is_a_model_error(folder):
    path = shard_of(folder, first_name(folder))
    path.unlink()
    with pytest.raises(ModelError, match=rf"names {path.name}, which is not there"):
        load_base(settings(folder))


def test_a_tensor_that_only_the_index_names_is_a_model_error(folder):
    name = first_name(folder)
    rewrite(shard_of(folder, name), lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=rf"names 1 tensors that no file holds, {name}"):
        load_base(settings(folder))


def test_a_missing_weight_is_a_model_error(folder):
    name = next(name for name in boson_names(2, audio_self=False) if "q_proj" in name)
    index = json.loads((folder / INDEX).read_text())
    name = name if name in index["weight_map"] else f"model.{name}"
    rewrite(folder / index["weight_map"].pop(name), lambda tensors: tensors.pop(name))
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks 1 weights, model\.layers\.0\.self_attn\.q_proj"):
        load_base(settings(folder))


def test_an_unknown_weight_is_a_model_error(folder):
    def add(tensors):
        tensors["layers.0.audio_attn.q_proj.weight"] = torch.zeros(2)

    rewrite(shard_of(folder, first_name(folder)), add)
    with pytest.raises(ModelError, match=r"has 1 weights that .* no place for, .*audio_attn"):
        load_base(settings(folder))


def test_a_weight_of_another_shape_is_a_model_error(folder):
    name = first_name(folder)
    rewrite(shard_of(folder, name), lambda tensors: tensors.update({name: torch.zeros(3, 5)}))
    with pytest.raises(ModelError, match=r"has shape \(3, 5\), but its config.json needs"):
        load_base(settings(folder))


def test_quantised_weights_are_a_model_error(folder):
    name = first_name(folder)
    quantised = torch.zeros(3, 5, dtype=torch.int8)
    rewrite(shard_of(folder, name), lambda tensors: tensors.update({name: quantised}))
    with pytest.raises(ModelError, match=r"tensors of type 'I8'"):
        load_base(settings(folder))


def test_a_folder_without_weights_is_a_model_error(folder):
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    with pytest.raises(ModelError, match=r"found neither model\.safetensors nor"):
        load_base(settings(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', needed 'higgs_audio_v2'"),
        ({"model_type": None}, "model_type is None"),
    ],
)
def test_another_model_type_is_a_model_error(folder, changes, message):
    edit(folder / "config.json", **changes)
    with pytest.raises(ModelError, match=message):
        load_base(settings(folder))


def test_an_unsupported_activation_is_a_model_error(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"silu"', '"gelu"'))
    with pytest.raises(ModelError, match="hidden_act is 'gelu', needed 'silu'"):
        load_base(settings(folder))


@pytest.mark.parametrize(
    ("value", "message"), [("7", "not a multiple"), ('"many"', "expected int, got str")]
)
def test_a_config_with_impossible_sizes_is_a_model_error(folder, value, message):
    path = folder / "config.json"
    path.write_text(re.sub(r'("num_attention_heads": )\d+', rf"\g<1>{value}", path.read_text()))
    with pytest.raises(ModelError, match=rf"^base\.path: .* cannot be loaded: .*{message}.*$"):
        load_base(settings(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audio_adapter_type": "stack"}, "audio_adapter_type is 'stack'"),
        ({"audio_dual_ffn_layers": [1]}, r"audio_dual_ffn_layers \[1\], needed dual_ffn in all 2"),
        ({"audio_embed_avg": True}, "audio_embed_avg is True"),
        ({"skip_audio_tower": None}, "skip_audio_tower is None"),
        ({"audio_out_token_idx": 99}, r"audio_out_token_idx is 99, but <\|AUDIO_OUT\|> is 7"),
        ({"audio_num_codebooks": None}, "audio_num_codebooks is None"),
        ({"text_config": None}, "text_config is not that of a Llama model"),
        ({"use_audio_out_self_attention": True}, r"lacks 10 weights, model\.layers\.0\.audio_attn"),
    ],
)
def test_an_unsupported_config_in_the_original_format_is_a_model_error(tmp_path, changes, message):
    write_boson(tmp_path / "base", audio_self=False)
    edit(tmp_path / "base" / "config.json", **changes)
    with pytest.raises(ModelError, match=message):
        load_base(settings(tmp_path / "base"))


def test_a_token_id_that_differs_from_the_tokenizers_is_a_model_error(tmp_path):
    folder = write_native(tmp_path / "base", tiny_base().model)
    edit(folder / "config.json", audio_token_id=8)
    with pytest.raises(ModelError, match=r"<\|AUDIO_OUT\|> is 7 in the tokenizer .* and 8"):
        load_base(settings(folder))


def test_a_codebook_too_small_for_the_end_of_stream_is_a_model_error(tmp_path):
    """The default of transformers' config is 1024, too small for the released checkpoint's EOS, 1025."""
    folder = write_native(tmp_path / "base", tiny_base().model)
    eos = json.loads((folder / "config.json").read_text())["audio_stream_eos_id"]
    edit(folder / "config.json", codebook_size=eos)
    with pytest.raises(
        ModelError, match=f"codebook_size {eos} cannot hold EOS .* set it to {eos + 1}"
    ):
        load_base(settings(folder))


@pytest.mark.parametrize("token", ["<|audio_bos|>", None])
def test_the_token_before_user_audio_is_used_if_the_tokenizer_has_it(token):
    found = tokenizer()
    if token is not None:
        found.add_special_tokens({"extra_special_tokens": [token]})
    config = HiggsAudioV2Config.from_dict(
        {**tiny_base().model.config.to_dict(), "vocab_size": len(found)}
    )
    expected = None if token is None else found.convert_tokens_to_ids(token)
    assert vocabulary_of(found, config).audio_in_bos == expected


@pytest.mark.parametrize("end", ["<|eot_id|>\n\n", "<|begin_of_text|>"])
def test_a_template_that_differs_from_training_is_a_model_error(folder, end):
    other = tokenizer().chat_template.replace("<|eot_id|>", end)
    tokenizer(template=other).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"chat template .* where\s+training writes"):
        load_base(settings(folder))


def test_a_template_without_audio_answers_is_a_model_error(folder):
    refusing = "{{ raise_exception('text only') }}"
    tokenizer(template=refusing).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"does not accept a text .* \(text only\)"):
        load_base(settings(folder))


def test_a_base_with_its_own_audio_attention_loads_but_not_for_training(tmp_path):
    write_boson(tmp_path / "base", audio_self=True)
    with pytest.raises(ModelError, match="already has audio_self modules"):
        load_base(settings(tmp_path / "base"))
    assert load_checkpoint(settings(tmp_path / "base")).model.config.cross_attention == "audio_self"


@pytest.mark.parametrize("mode", ["audio_self", "text_to_audio"])
def test_new_modules_do_not_change_a_bf16_base(tmp_path, mode):
    folder = write_native(tmp_path / "base", tiny_base().model)
    base = load_base(settings(folder, dtype="bfloat16")).model
    model = with_cross_attention(base, mode, seed=1)
    torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=0.02)
    rotary = model.model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32
    assert torch.equal(rotary, base.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("mode", ["audio_self", "text_to_audio"])
def test_a_saved_model_with_new_modules_loads_with_them(tmp_path, mode):
    model = with_cross_attention(tiny_base().model, mode, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "audio_attn" in name:
                parameter.normal_(0.5, 0.2)
    again = load_checkpoint(settings(write_native(tmp_path / "base", model))).model
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_the_fixtures_original_config_has_the_released_fields():
    """A guard on the fixture: fields of the released config.json that loading depends on."""
    fields = boson_config(2, audio_self=False)
    assert {"text_config", "audio_num_codebooks", "use_audio_out_self_attention"} <= fields.keys()
    assert fields["text_config"]["rope_scaling"]["rope_type"] == "llama3"
