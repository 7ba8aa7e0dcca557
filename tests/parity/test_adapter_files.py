"""A saved adapter loads with plain PEFT, and refuses a base that lacks its modules."""

import copy
import json
import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from sides import stock_inputs
from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_tune.config import ALL_LINEAR
from higgs_tune.errors import ModelError
from higgs_tune.train.checkpoint import (
    adapted,
    attach_adapter,
    load_adapter,
    load_state,
    read_trial,
    save_adapter,
)
from higgs_tune.train.engine import Engine
from higgs_tune.train.residents import PackLimits
from tests.models import NUM_CODEBOOKS, example, tiny_base, trial

EXAMPLES = [example("transcribe", 1, 9, 5), example("speak", 2, 6, 11), example("clone", 3, 4, 3)]
TARGETS = (*ALL_LINEAR, "text_head", "audio_head")


def trained(tmp_path, **changes):
    """An engine whose adapter has random factors, saved to disk."""
    config = trial(**({"targets": TARGETS, "rank": 3} | changes))
    wider = trial(targets=TARGETS, rank=8)
    engine = Engine(tiny_base(), PackLimits.of([config, wider], num_slots=2))
    engine.add("wider", wider)
    engine.add("a", config)
    generator = torch.Generator().manual_seed(0)
    for view in engine.bank.views(engine.residents["a"].slot, "master").values():
        view.copy_(0.1 * torch.randn(view.shape, generator=generator))
    save_adapter(tmp_path, engine.state("a"), config, "tiny")
    return engine


def our_sums(engine):
    text_K, audio_KC = engine.evaluate(engine.batch({1: EXAMPLES}))
    return float(text_K[0]), float(audio_KC[0].sum())


def sums_of(model):
    """The same sums from a whole model's logits."""
    inputs = stock_inputs(EXAMPLES, NUM_CODEBOOKS)
    labels, audio_labels = inputs.pop("labels"), inputs.pop("audio_labels")
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = inner.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    text = torch.nn.functional.cross_entropy(
        inner.text_lm_head(hidden).flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    rows = inner.model.get_placeholder_mask(inputs["input_ids"], None, None)
    spread = torch.full((*labels.shape, 4), -100)
    spread[rows] = audio_labels[inputs["audio_input_ids_mask"]]
    audio = torch.nn.functional.cross_entropy(
        inner.audio_lm_head(hidden).unflatten(-1, (4, -1)).flatten(0, 2),
        spread[:, 1:].flatten(),
        reduction="sum",
    )
    return float(text), float(audio)


@pytest.mark.parametrize("rule", ["fixed", "rslora", "ratio"])
def test_plain_peft_on_the_stock_model_gives_the_packs_losses(tmp_path, rule):
    engine = trained(tmp_path, alpha=32.0, alpha_rule=rule)
    model = PeftModel.from_pretrained(copy.deepcopy(engine.base.model), str(tmp_path)).eval()
    assert sums_of(model) == pytest.approx(our_sums(engine), rel=1e-5)
    assert sums_of(engine.base.model) != pytest.approx(our_sums(engine), rel=1e-3)


def test_an_adapters_config_names_no_task(tmp_path):
    """PEFT's model for CAUSAL_LM would pass `labels` to a forward that shifts them again."""
    trained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["task_type"] is None
    assert (saved["r"], saved["lora_alpha"], saved["use_rslora"]) == (3, 8.0, False)


@pytest.mark.parametrize("mode", ["audio_self", "text_to_audio"])
def test_new_modules_are_saved_whole_with_the_adapter(tmp_path, mode):
    engine = trained(tmp_path, cross_attention=mode, targets=(*ALL_LINEAR, "audio_attention"))
    model = load_adapter(copy.deepcopy(engine.base.model), tmp_path)
    assert sums_of(model) == pytest.approx(our_sums(engine), rel=1e-5)


@pytest.mark.parametrize("mode", ["audio_self", "text_to_audio"])
def test_a_base_without_the_new_modules_is_refused(tmp_path, mode):
    engine = trained(tmp_path, cross_attention=mode, targets=("attention", "audio_attention"))
    with pytest.raises(ModelError, match=f"cross_attention {mode}, the base has off"):
        attach_adapter(copy.deepcopy(engine.base.model), tmp_path)


def test_a_base_without_the_adapted_text_head_is_refused(tmp_path):
    engine = trained(tmp_path)
    base = HiggsAudioV2ForConditionalGeneration(engine.base.model.config, use_text_head=False)
    with pytest.raises(ModelError, match="targets text_head, and the base has no text_lm_head"):
        attach_adapter(base, tmp_path)


def test_an_adapter_is_loaded_onto_the_device_of_its_base(tmp_path, monkeypatch):
    trained(tmp_path)
    asked = []
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: asked.append("cuda") or "cpu")
    load_adapter(tiny_base().model, tmp_path)
    assert not asked, "export merges on a CPU, beside GPUs that may be full"


def test_an_adapter_that_does_not_fit_leaves_the_base_unchanged(tmp_path):
    base = trained(tmp_path).base.model
    before = [(name, type(module)) for name, module in base.named_modules()]
    weights = load_file(tmp_path / "adapter_model.safetensors")
    name, weight = weights.popitem()
    for broken in (weights, weights | {name: weight[:1, :1].clone()}):  # one missing, one too small
        save_file(broken, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
        with (
            pytest.raises(ModelError, match=r"do not belong together|does not fit this base"),
            adapted(base, tmp_path),
        ):
            pass
        assert [(name, type(module)) for name, module in base.named_modules()] == before


def test_a_saved_state_is_loaded_bit_equal(tmp_path):
    engine = trained(tmp_path)
    engine.bank.lora.exp_avg.normal_()
    engine.bank.lora.exp_avg_sq.uniform_()
    engine.residents["a"].step = 17
    state = engine.state("a")
    for file in tmp_path.iterdir():
        file.unlink()
    save_adapter(tmp_path, state, engine.residents["a"].config, "tiny")
    read = load_state(tmp_path)
    assert read.step == 17
    for part in ("weights", "exp_avg", "exp_avg_sq"):
        ours, theirs = getattr(read, part), getattr(state, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_damaged_adapter_is_one_clear_error(tmp_path):
    trained(tmp_path)
    (tmp_path / "training_state.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="not a readable adapter"):
        load_state(tmp_path)


def test_the_error_for_a_folder_that_is_no_adapter_says_what_to_give(tmp_path):
    run, merged = tmp_path / "run", tmp_path / "merged"
    (run / "adapter").mkdir(parents=True)
    with pytest.raises(
        ModelError, match=r"gone: no such folder\. Give one that a sweep or `train`"
    ):
        read_trial(tmp_path / "gone")
    with pytest.raises(ModelError, match=r"run: no higgs_tune\.json in it, .*\. Give one that a"):
        read_trial(run)
    trained(run / "adapter")
    with pytest.raises(
        ModelError, match=rf"so it is not an adapter\. Give {re.escape(str(run))}/adapter\.$"
    ):
        read_trial(run)
    merged.mkdir()
    (merged / "higgs_tune.json").write_text('{"cross_attention": "off"}')
    with pytest.raises(ModelError, match=r"higgs_tune\.json: no readable trial .* it is a base"):
        read_trial(merged)
