"""Adapters that no training can start from."""

import pytest
import torch

from higgs_tune.errors import ConfigError, ModelError
from tests.runs import TRIAL
from tests.starts import edit_config, edit_weights


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_whose_initialisation_changed_the_base_is_refused(run_single, plain_peft, init):
    """When PEFT loads such an adapter, it takes that part out of the base's weights again."""
    run, _, out = run_single
    adapter, _ = plain_peft(init_lora_weights=init)
    with pytest.raises(ModelError, match=rf"init_lora_weights '{init}' took a part of"):
        run(start_from=str(adapter), trial=TRIAL.model_copy(update={"alpha": 2.0}))
    assert not out.exists()


def text_head(weights):
    weights["base_model.model.text_lm_head.lora_A.weight"] = torch.ones(4, 32)


def not_a_number(weights):
    next(iter(weights.values()))[0, 0] = float("nan")


def other_shape(weights):
    name = next(name for name in weights if "lora_B" in name)
    weights[name] = torch.ones(7, 4)


def half_a_pair(weights):
    del weights[next(name for name in weights if "lora_B" in name)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            text_head,
            r"adapter_model.safetensors: has text_lm_head.lora_A.weight, which trial.targets",
        ),
        (not_a_number, r"lora_A.weight is not finite: that training diverged"),
        (other_shape, r"lora_B.weight has shape \(7, 4\), needed \(\d+, 4\)"),
        (half_a_pair, r"has .*lora_A.weight without .*lora_B.weight. Save the adapter again"),
        (dict.clear, r"adapter_model.safetensors: has no weights"),
    ],
)
def test_weights_that_cannot_be_a_start_are_refused(run_single, trained, change, message):
    run, lines, out = run_single
    adapter, _ = trained
    edit_weights(adapter, change)
    with pytest.raises(ModelError, match=message):
        run(start_from=str(adapter))
    assert not lines and not out.exists()


def test_a_start_whose_losses_are_not_finite_is_refused(run_single, trained):
    run, lines, out = run_single
    adapter, _ = trained
    edit_weights(adapter, lambda weights: [tensor.fill_(1e30) for tensor in weights.values()])
    with pytest.raises(
        ModelError, match=r"adapter: val/text/nll is nan at the start: its training"
    ):
        run(start_from=str(adapter))
    assert len(lines) == 1 and not (out / "adapter").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"r": 8}, ConfigError, r"has rank 8, the trial 4. Train with --set trial.rank=8"),
        ({"use_rslora": True}, ConfigError, r"scale .* of 4, .* has 2, .* --set trial.alpha=16"),
        ({"alpha_pattern": {"q_proj": 3}}, ModelError, r"modules differ in rank or alpha"),
        ({"rank_pattern": {"q_proj": 8}}, ModelError, r"modules differ in rank or alpha"),
        (
            {"init_lora_weights": "olora"},
            ModelError,
            r"init_lora_weights 'olora' took a part of each weight out of the base",
        ),
        (
            {"alora_invocation_tokens": [1]},
            ModelError,
            r"works only after its invocation tokens",
        ),
        ({"peft_type": "IA3"}, ModelError, r"an adapter of type .*IA3.*, needed LORA"),
        ({"peft_type": "no such"}, ModelError, r"no readable adapter_config.json"),
    ],
)
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments", "ignore:aLoRA is currently")
def test_an_adapter_of_another_kind_is_refused_before_anything_is_loaded(
    run_single, trained, monkeypatch, changes, error, message
):
    run, _, out = run_single
    adapter, _ = trained
    edit_config(adapter, **changes)
    monkeypatch.setattr("higgs_tune.train.single.load_base", None)
    with pytest.raises(error, match=message):
        run(start_from=str(adapter))
    assert not out.exists()


def test_a_start_without_an_adapter_in_its_folder_is_refused(run_single, tmp_path):
    run, _, out = run_single
    with pytest.raises(ModelError, match=r"/nowhere: no such folder. Give one that a sweep or"):
        run(start_from=str(tmp_path / "nowhere"))
    (tmp_path / "earlier" / "adapter").mkdir(parents=True)
    (tmp_path / "earlier" / "adapter" / "adapter_config.json").write_text("{}")
    needed = (
        r"earlier: no adapter_config.json in it, so it is not an adapter. Give .*earlier/adapter\."
    )
    with pytest.raises(ModelError, match=needed):
        run(start_from=str(tmp_path / "earlier"))
    assert not out.exists()


def test_a_start_whose_weights_are_no_safetensors_is_refused(run_single, trained):
    run, _, out = run_single
    adapter, _ = trained
    weights = adapter / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))  # as PEFT wrote them before 0.7
    with pytest.raises(ModelError, match=rf"^{weights}: not there. Give .* saved as safetensors"):
        run(start_from=str(adapter))
    assert not out.exists()
