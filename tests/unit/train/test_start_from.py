"""Training that starts from another adapter's weights."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from higgs_tune import metrics
from higgs_tune.base_source import EMBEDDED_BASE
from higgs_tune.errors import ConfigError
from higgs_tune.train.loop import PackLoop
from higgs_tune.train.residents import PackLimits
from higgs_tune.train.start_from import warn_if_trained_differently
from tests.models import DATA, tiny_base
from tests.runs import TRIAL, assert_same_run, read_lines
from tests.starts import WEIGHTS, edit_config

VALIDATED = (metrics.VAL_TEXT_NLL, metrics.VAL_AUDIO_NLL, metrics.VAL_AUDIO_GAIN)


def figures(line):
    return {name: line[name] for name in VALIDATED}


def killed_at(step, num_lines):
    """A report that raises at this line, as if the process were killed."""
    seen = []

    def report(line):
        seen.append(line["step"])
        if (line["step"], len(seen)) == (step, num_lines):
            raise RuntimeError("killed")

    return report


def test_a_run_starts_with_the_losses_of_its_adapter(run_single, trained):
    run, lines, out = run_single
    adapter, last = trained
    run(start_from=str(adapter), trial=TRIAL.model_copy(update={"num_steps": 5, "seed": 8}))
    base, start, first = lines
    assert base["step"] == start["step"] == 0 and first["step"] == 5
    assert figures(start) == figures(last) != figures(base)
    assert start["start_from"] == str(adapter)
    assert read_lines(out / "metrics.jsonl") == lines


def test_the_first_checkpoint_has_the_adapters_weights_and_zero_moments(run_single, trained):
    run, _, out = run_single
    adapter, _ = trained
    with pytest.raises(RuntimeError, match="killed"):
        run(start_from=str(adapter), report=killed_at(0, 2))
    saved = load_file(out / "adapter" / WEIGHTS)
    torch.testing.assert_close(saved, load_file(adapter / WEIGHTS), rtol=0, atol=0)
    moments = load_file(out / "adapter" / "training_state.safetensors")
    assert len(moments) == 2 * len(saved)
    assert all(not moment.any() for moment in moments.values())


@pytest.mark.parametrize(("step", "num_lines"), [(0, 1), (0, 2), (10, 4)])
def test_a_killed_run_that_started_from_an_adapter_resumes_exactly(
    run_single, trained, tmp_path, step, num_lines
):
    run, _, out = run_single
    adapter, _ = trained
    run(out=tmp_path / "whole", start_from=str(adapter))
    with pytest.raises(RuntimeError, match="killed"):
        run(start_from=str(adapter), report=killed_at(step, num_lines))
    if num_lines == 1:
        with pytest.raises(ConfigError, match=r"run.start_from was '.*adapter', now None"):
            run(resume=True)
        assert run(resume=True, start_from=str(adapter))["status"] == "completed"
    else:
        shutil.rmtree(adapter)  # no longer needed once there is a checkpoint
        assert run(resume=True)["status"] == "completed"
    assert_same_run(out, tmp_path / "whole")
    best = "best_adapter/adapter_model.safetensors"
    assert (out / best).read_bytes() == (tmp_path / "whole" / best).read_bytes()


def test_a_start_that_training_only_makes_worse_stays_the_best(run_single, trained):
    run, lines, out = run_single
    adapter, _ = trained
    spoil = TRIAL.model_copy(update={"learning_rate": 3.0, "clip_norm": 100.0, "num_steps": 5})
    run(start_from=str(adapter), trial=spoil, audio_tolerance=9.0)
    assert lines[2][metrics.VAL_TEXT_NLL] > lines[1][metrics.VAL_TEXT_NLL]
    assert json.loads((out / "best_adapter" / "best.json").read_text()) == {"step": 0}
    saved = load_file(out / "best_adapter" / WEIGHTS)
    torch.testing.assert_close(saved, load_file(adapter / WEIGHTS), rtol=0, atol=0)


def test_an_adapter_with_gaussian_initial_weights_is_accepted(run_single, plain_peft):
    run, lines, _ = run_single
    adapter, _ = plain_peft(init_lora_weights="gaussian")
    run(start_from=str(adapter), trial=TRIAL.model_copy(update={"alpha": 2.0, "num_steps": 5}))
    assert lines[1]["start_from"] == str(adapter)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_plain_peft_adapter_starts_with_the_losses_of_its_merged_model(
    run_single, plain_peft, dataset, rslora
):
    """The reference is the stock model with the adapter merged into its weights."""
    run, lines, _ = run_single
    adapter, wrapped = plain_peft(use_rslora=rslora)
    merged = tiny_base()
    merged.model.load_state_dict(wrapped.merge_and_unload().state_dict())
    expected = PackLoop(merged, dataset, DATA, PackLimits.of([], num_slots=1)).base_metrics
    changes = {"alpha": 4.0 if rslora else 2.0, "num_steps": 5}
    run(start_from=str(adapter), trial=TRIAL.model_copy(update=changes))
    base, start = lines[:2]
    # float32 sums in another order
    assert figures(start) == pytest.approx(figures(expected), rel=1e-5, abs=1e-5)
    assert abs(base[metrics.VAL_TEXT_NLL] - start[metrics.VAL_TEXT_NLL]) > 0.01


def test_modules_that_the_adapter_lacks_begin_fresh(run_single, trained):
    run, lines, out = run_single
    adapter, last = trained
    wider = TRIAL.model_copy(
        update={
            "targets": (*TRIAL.targets, "text_head", "audio_attention"),
            "cross_attention": "text_to_audio",
            "num_steps": 5,
        }
    )
    run(start_from=str(adapter), trial=wider)
    assert figures(lines[1]) == pytest.approx(figures(last), rel=1e-5, abs=1e-5)
    ended = load_file(out / "adapter" / WEIGHTS)
    assert ended["base_model.model.text_lm_head.lora_B.weight"].any()


def test_the_alpha_that_a_refusal_names_is_accepted(run_single, trained):
    run, lines, _ = run_single
    adapter, last = trained
    ruled = TRIAL.model_copy(update={"alpha_rule": "rslora", "num_steps": 5})
    with pytest.raises(ConfigError, match=r"--set trial.alpha=16\.") as refused:
        run(start_from=str(adapter), trial=ruled)
    alpha = float(str(refused.value).rsplit("=", 1)[1].rstrip("."))
    run(start_from=str(adapter), trial=ruled.model_copy(update={"alpha": alpha}))
    assert figures(lines[1]) == figures(last)


def test_the_settings_of_a_resumed_run_keep_its_start(run_single, trained):
    """Whether a resume leaves it out or gives it again."""
    run, _, out = run_single
    adapter, _ = trained
    with pytest.raises(RuntimeError, match="killed"):
        run(start_from=str(adapter), report=killed_at(0, 2))
    with pytest.raises(RuntimeError, match="killed"):
        run(resume=True, report=killed_at(5, 1))
    assert json.loads((out / "config.json").read_text())["run"]["start_from"] == str(adapter)
    assert run(resume=True, start_from=str(adapter))["status"] == "completed"


def test_a_resume_may_give_its_start_by_another_path(run_single, trained, tmp_path, monkeypatch):
    run, _, out = run_single
    adapter, _ = trained
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="killed"):
        run(start_from="adapter", report=killed_at(0, 2))
    assert json.loads((out / "config.json").read_text())["run"]["start_from"] == str(adapter)
    monkeypatch.chdir(out)
    assert run(resume=True, start_from="../adapter/")["status"] == "completed"


def test_a_start_of_another_base_or_system_text_causes_a_warning(run_single, trained, caplog):
    run, _, out = run_single
    adapter, _ = trained
    short = TRIAL.model_copy(update={"num_steps": 5})
    run(start_from=str(adapter), trial=short)
    assert "run.start_from" not in caplog.text
    edit_config(adapter, base_model_name_or_path="someone/other", revision="0" * 40)
    told = DATA.model_copy(update={"system_text": "yes"})
    run(start_from=str(adapter), trial=short, data=told, out=out.with_name("told"))
    base, text = [line.getMessage() for line in caplog.records if "start_from" in line.msg]
    assert f"trained on the base someone/other at {'0' * 40}, this run on tiny: unless" in base
    assert text.endswith("adapter was trained with data.system_text None, this run has 'yes'")


@pytest.mark.parametrize(
    ("named", "is_other"),
    [("/far/higgs_tune/embedded/base", False), ("/far/base", True), (None, False)],
)
def test_the_embedded_base_counts_as_the_same_in_any_folder(trained, caplog, named, is_other):
    adapter, _ = trained
    edit_config(adapter, base_model_name_or_path=named)
    embedded = replace(tiny_base(), source=str(EMBEDDED_BASE))
    warn_if_trained_differently(adapter, embedded, None)
    assert ("on the base /far/base, this run" in caplog.text) == is_other


def test_a_resume_with_another_start_is_refused(run_single, trained):
    run, _, _ = run_single
    adapter, _ = trained
    with pytest.raises(RuntimeError, match="killed"):
        run(report=killed_at(10, 3))
    with pytest.raises(ConfigError, match=r"run.start_from was None, now '.*adapter'"):
        run(resume=True, start_from=str(adapter))


def test_refusing_other_settings_names_the_way_to_reuse_the_weights(run_single):
    run, _, out = run_single
    run()
    longer = TRIAL.model_copy(update={"num_steps": 40})
    with pytest.raises(ConfigError, match=rf"another --out .* --start-from {out / 'adapter'}"):
        run(resume=True, trial=longer)
