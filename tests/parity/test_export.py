"""Exports load with the stock libraries alone and give the adapted model's logits."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from sides import stock_inputs
from transformers import AutoConfig, AutoTokenizer, HiggsAudioV2ForConditionalGeneration

from higgs_tune import cli
from higgs_tune.config import ALL_LINEAR, BaseSettings
from higgs_tune.errors import ModelError
from higgs_tune.model.load import load_base, load_checkpoint
from higgs_tune.train.checkpoint import load_adapter, save_adapter, save_interval
from higgs_tune.train.engine import Engine
from higgs_tune.train.export import adapter_base, merge
from higgs_tune.train.residents import PackLimits
from tests.boson_reference import boson_logits
from tests.checkpoints import SHARD_BYTES, boson_config, boson_names, write_boson, write_native
from tests.full_disk import largest_file
from tests.models import NUM_CODEBOOKS, example, tiny_base, trial

EXAMPLES = [example("transcribe", 1, 9, 5), example("speak", 2, 6, 11), example("clone", 3, 4, 3)]
HEADS = ("text_head", "audio_head")
MODES = ["off", "audio_self", "text_to_audio"]
INDEX = "model.safetensors.index.json"


def settings(folder, **changes) -> BaseSettings:
    return BaseSettings(path=str(folder), device="cpu", **changes)


def train(base_folder: Path, adapter: Path, mode: str = "off", targets=None, **changes) -> Path:
    """An adapter with random factors and modules, on the base in a folder."""
    paths = targets or (*ALL_LINEAR, *HEADS)
    paths = paths if mode == "off" else (*paths, "audio_attention")
    config = trial(rank=3, cross_attention=mode, targets=paths)
    base = load_base(settings(base_folder, **changes))
    engine = Engine(base, PackLimits.of([config], num_slots=1))
    engine.add("a", config)
    generator = torch.Generator().manual_seed(0)
    for view in engine.bank.views(engine.residents["a"].slot, "master").values():
        view.copy_(0.1 * torch.randn(view.shape, generator=generator))
    adapter.mkdir()
    save_adapter(adapter, engine.state("a"), config, base.source)
    save_interval(adapter, {})
    return adapter


def logits(model, examples=EXAMPLES):
    inputs = {k: v for k, v in stock_inputs(examples, NUM_CODEBOOKS).items() if "labels" not in k}
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = inner.model(**inputs, use_cache=False).last_hidden_state
    return torch.cat([inner.text_lm_head(hidden), inner.audio_lm_head(hidden)], dim=-1)


def adapted(base_folder: Path, adapter: Path):
    """Base and adapter, not merged."""
    return load_adapter(load_base(settings(base_folder)).model, adapter)


def export(*arguments) -> None:
    assert cli.main(["export", *(str(a) for a in arguments)]) == 0


@pytest.fixture(params=["native", "boson"])
def base_folder(request, tmp_path) -> Path:
    """A base in each format."""
    if request.param == "native":
        return write_native(tmp_path / "base", tiny_base().model)
    write_boson(tmp_path / "base", audio_self=False)
    return tmp_path / "base"


def test_an_exported_adapter_loads_with_plain_peft(tmp_path):
    base_folder = write_native(tmp_path / "base", tiny_base().model)
    adapter = train(base_folder, tmp_path / "adapter")
    export(adapter, "--out", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "higgs_tune.json"}
    stock = HiggsAudioV2ForConditionalGeneration.from_pretrained(base_folder, use_text_head=True)
    model = PeftModel.from_pretrained(stock, str(tmp_path / "out")).eval()
    expected = logits(adapted(base_folder, adapter))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_a_merged_native_checkpoint_loads_with_transformers_alone(tmp_path, base_folder):
    adapter = train(base_folder, tmp_path / "adapter")
    export(adapter, "--out", tmp_path / "out", "--merge")
    model, info = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        tmp_path / "out", use_text_head=True, output_loading_info=True
    )
    assert not any(info.values()), info
    expected = logits(adapted(base_folder, adapter))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    plain = logits(load_base(settings(base_folder)).model)
    assert not torch.allclose(plain, expected, atol=0.1)
    theirs, ours = (AutoTokenizer.from_pretrained(f) for f in (base_folder, tmp_path / "out"))
    assert theirs.get_vocab() == ours.get_vocab()
    assert theirs.chat_template == ours.chat_template
    assert not (tmp_path / "out" / "training_state.safetensors").exists()


def test_a_merged_checkpoint_can_be_the_base_of_an_adapter(tmp_path):
    base_folder = write_native(tmp_path / "base", tiny_base().model)
    export(train(base_folder, tmp_path / "adapter"), "--out", tmp_path / "out", "--merge")
    again = train(tmp_path / "out", tmp_path / "second")
    assert json.loads((again / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(tmp_path / "out")


def test_a_bf16_base_is_merged_in_fp32_and_rounded_once(tmp_path):
    base_folder = write_native(tmp_path / "base", tiny_base(dtype=torch.bfloat16).model)
    adapter = train(base_folder, tmp_path / "adapter", targets=("attention",))
    export(adapter, "--out", tmp_path / "out", "--merge")
    factors = load_file(adapter / "adapter_model.safetensors")
    before, after = ({}, {})
    for folder, tensors in ((tmp_path / "base", before), (tmp_path / "out", after)):
        for shard in folder.glob("*.safetensors"):
            tensors |= load_file(shard)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    for name, weight in before.items():
        lora = f"base_model.model.{name.removesuffix('.weight')}.lora"
        expected = weight
        if f"{lora}_A.weight" in factors:
            scale = 8.0 / 3  # alpha / rank
            product = factors[f"{lora}_B.weight"] @ factors[f"{lora}_A.weight"]
            expected = (weight.float() + scale * product).bfloat16()
            assert not torch.equal(expected, weight)
        torch.testing.assert_close(after[name], expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES[1:])
def test_new_modules_stay_in_a_merged_native_checkpoint(tmp_path, mode):
    base_folder = write_native(tmp_path / "base", tiny_base().model)
    adapter = train(base_folder, tmp_path / "adapter", mode)
    export(adapter, "--out", tmp_path / "out", "--merge")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["cross_attention"] == mode
    # the stock classes would drop the modules, so transformers must not take it for a stock model
    with pytest.raises(ValueError, match="higgs_audio_v2_cross_attention"):
        AutoConfig.from_pretrained(tmp_path / "out")
    base = load_checkpoint(settings(tmp_path / "out"))
    expected = adapted(base_folder, adapter)
    torch.testing.assert_close(logits(base.model), logits(expected), rtol=1e-4, atol=1e-4)
    prompt = {
        k: v for k, v in stock_inputs(EXAMPLES[:1], NUM_CODEBOOKS).items() if "labels" not in k
    }
    made = [m.generate(**prompt, do_sample=False, max_new_tokens=6) for m in (base.model, expected)]
    assert torch.equal(made[0], made[1])


@pytest.mark.parametrize("mode", MODES[:2])
def test_an_export_in_the_original_format_has_its_names_shapes_and_logits(
    tmp_path, base_folder, mode
):
    adapter = train(base_folder, tmp_path / "adapter", mode)
    expected = adapted(base_folder, adapter)
    export(adapter, "--out", tmp_path / "out", "--format", "boson")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    names = boson_names(2, audio_self=mode == "audio_self")
    assert weights.keys() == names.keys()
    native = expected.get_base_model().state_dict()
    shapes = {name.replace(".base_layer", ""): tensor.shape for name, tensor in native.items()}
    shapes = {name.replace(".modules_to_save.default", ""): s for name, s in shapes.items()}
    assert {name: weights[name].shape for name in names} == {n: shapes[names[n]] for n in names}

    back = load_checkpoint(settings(tmp_path / "out")).model
    torch.testing.assert_close(logits(back), logits(expected), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


@pytest.mark.parametrize("mode", MODES[:2])
def test_the_originals_equations_give_the_exported_models_logits(tmp_path, mode):
    write_boson(tmp_path / "base", audio_self=False)
    adapter = train(tmp_path / "base", tmp_path / "adapter", mode)
    export(adapter, "--out", tmp_path / "out", "--format", "boson")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    released = boson_config(2, audio_self=mode == "audio_self")
    # fields that do not affect the forward keep the original's defaults
    silent = {"audio_tokenizer_config", "rq_transformer_num_hidden_layers", "transformers_version"}
    silent |= {"audio_in_token_idx", "text_config"}
    assert {k: v for k, v in config.items() if k != "text_config"} == {
        k: v for k, v in released.items() if k not in silent
    }
    text = {k: v for k, v in released["text_config"].items() if k != "pad_token_id"}
    assert config["text_config"] == text | {"tie_word_embeddings": False}
    weights = load_file(tmp_path / "out" / "model.safetensors")
    model = adapted(tmp_path / "base", adapter)
    for one in EXAMPLES:
        text_logits, audio_logits = boson_logits(weights, config, one)
        ours = logits(model, [one])[0]
        vocab = text_logits.shape[1]
        torch.testing.assert_close(text_logits, ours[:, :vocab], rtol=1e-4, atol=1e-4)
        audio = ours[torch.from_numpy(one.audio_rows_A), vocab:]
        torch.testing.assert_close(audio_logits.flatten(1), audio, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", ["native", "boson"])
def test_a_large_checkpoint_is_written_in_shards(tmp_path, monkeypatch, to):
    monkeypatch.setattr("higgs_tune.train.export.MAX_SHARD", SHARD_BYTES)
    base_folder = write_native(tmp_path / "base", tiny_base().model)
    adapter = train(base_folder, tmp_path / "adapter")
    export(adapter, "--out", tmp_path / "out", "--merge", "--format", to)
    assert len(list((tmp_path / "out").glob("model-0*.safetensors"))) > 2
    model = load_base(settings(tmp_path / "out")).model
    expected = logits(adapted(base_folder, adapter))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_text_to_audio_is_refused_for_the_original_code(tmp_path, capsys):
    base_folder = write_native(tmp_path / "base", tiny_base().model)
    adapter = train(base_folder, tmp_path / "adapter", "text_to_audio")
    arguments = ["export", str(adapter), "--out", str(tmp_path / "out"), "--format", "boson"]
    assert cli.main(arguments) == cli.BAD_INPUT
    assert "text_to_audio is unknown to the original code" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_refused_and_kept(tmp_path, capsys):
    base_folder = write_native(tmp_path / "base", tiny_base().model)
    adapter = train(base_folder, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    for extra in ([], ["--merge"], ["--format", "boson"]):
        arguments = ["export", str(adapter), "--out", str(tmp_path / "out"), *extra]
        assert cli.main(arguments) == cli.BAD_INPUT
        assert f"--out: {tmp_path / 'out'} exists" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_failed_export_leaves_nothing_behind(tmp_path, capsys):
    base_folder = write_native(tmp_path / "base", tiny_base().model)
    adapter = train(base_folder, tmp_path / "adapter")
    other = write_native(tmp_path / "other", tiny_base(num_layers=1).model)
    arguments = ["export", str(adapter), "--out", str(tmp_path / "out"), "--merge"]
    assert cli.main([*arguments, "--base", str(other)]) == cli.BAD_INPUT
    assert "do not belong together" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "other"}


def test_a_base_without_merge_is_refused(tmp_path, capsys):
    arguments = ["export", str(tmp_path), "--out", str(tmp_path / "out"), "--base", "embedded"]
    assert cli.main(arguments) == cli.BAD_INPUT
    assert "add --merge" in capsys.readouterr().err


def test_an_adapter_on_a_text_head_from_the_embedding_can_be_merged(tmp_path):
    base_folder = write_native(tmp_path / "base", tiny_base().model)
    index = json.loads((base_folder / INDEX).read_text())
    shard = base_folder / index["weight_map"].pop("text_lm_head.weight")
    tensors = load_file(shard)
    del tensors["text_lm_head.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    (base_folder / INDEX).write_text(json.dumps(index))
    adapter = train(base_folder, tmp_path / "adapter", text_head="from_embedding")
    export(adapter, "--out", tmp_path / "out", "--merge")
    base = load_base(settings(base_folder, text_head="from_embedding"))
    expected = logits(load_adapter(base.model, adapter))
    model = load_base(settings(tmp_path / "out")).model
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_with_a_tensor_missing_is_refused(tmp_path):
    """PEFT alone would only warn and keep that factor's initial values."""
    base_folder = write_native(tmp_path / "base", tiny_base().model)
    adapter = train(base_folder, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="do not belong together: they differ in base_model"):
        adapted(base_folder, adapter)


def test_the_revision_of_a_hub_base_is_saved_with_the_adapter(tmp_path):
    config = trial(targets=("attention",))
    engine = Engine(tiny_base(), PackLimits.of([config], num_slots=1))
    engine.add("a", config)
    save_adapter(tmp_path, engine.state("a"), config, "owner/name", "0123abc")
    found = adapter_base(tmp_path, None, None, "cpu")
    assert (found.path, found.revision) == ("owner/name", "0123abc")
    moved = adapter_base(tmp_path, "/models/here", None, "cpu")
    assert (moved.path, moved.revision) == ("/models/here", None)


@pytest.mark.parametrize("extra", [[], ["--merge"], ["--format", "boson"]])
def test_an_export_that_does_not_fit_on_the_disk_is_one_error_and_leaves_nothing(
    tmp_path, capsys, extra
):
    base_folder = write_native(tmp_path / "base", tiny_base().model)
    adapter = train(base_folder, tmp_path / "adapter")
    arguments = ["export", str(adapter), "--out", str(tmp_path / "out"), *extra]
    with largest_file(10_000):
        assert cli.main(arguments) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert re.search(rf"^error: {tmp_path}/out: cannot be written: .*File too large", error, re.M)
    assert "free space, or give another --out" in error.lower()
    assert "sweep" not in error and "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
    assert cli.main(arguments) == 0


def test_an_export_into_a_folder_that_cannot_be_made_is_one_error(tmp_path, capsys):
    base_folder = write_native(tmp_path / "base", tiny_base().model)
    adapter = train(base_folder, tmp_path / "adapter")
    (tmp_path / "file").touch()
    assert cli.main(["export", str(adapter), "--out", str(tmp_path / "file" / "out")]) == 2
    assert "file/out: cannot be written: [Errno 20] Not a directory" in capsys.readouterr().err


def test_a_merge_leaves_the_rotary_frequencies_in_float32(tmp_path):
    base = tiny_base(dtype=torch.bfloat16)
    base.model.model.rotary_emb.float()  # as from_pretrained leaves it
    config = trial()
    engine = Engine(base, PackLimits.of([config], num_slots=1))
    engine.add("a", config)
    save_adapter(tmp_path, engine.state("a"), config, "tiny")
    merged = merge(base.model, tmp_path)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in merged.model.rotary_emb.buffers()} == {torch.float32}
