"""The full-size benchmark run at small size, and its count of what a step must compute."""

import copy
import json
import runpy
import sys

import gpu_step
import measured
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from random_base import (
    PRESETS,
    attention_flops,
    head_flops,
    linear_flops,
    random_base,
    random_clip,
    random_clips,
    step_flops,
)
from sides import our_step, prediction, stock_inputs
from torch.utils.flop_counter import FlopCounterMode
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from higgs_tune.config import ALL_LINEAR
from higgs_tune.data.tokens import IGNORE
from higgs_tune.model.targets import lora_regex

CPU = torch.device("cpu")
SMALL = PRESETS["small"]
ONE_LAYER = HiggsAudioV2Config.from_dict({**SMALL.to_dict(), "num_hidden_layers": 1})


def small_base():
    return random_base(SMALL, CPU, torch.float32)


def test_flops_equal_those_that_torch_counts_in_the_stock_step():
    base = small_base()
    clips = random_clips(base, 4, 60, 0.2, [0])
    base.model.set_attn_implementation("eager")  # plain matmuls over the whole square
    stock = get_peft_model(base.model, LoraConfig(r=4, target_modules=lora_regex(ALL_LINEAR)))
    with FlopCounterMode(display=False) as counter:
        stock(**stock_inputs(clips, SMALL.num_codebooks), use_cache=False).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    counted = {name.__name__: flops for name, flops in counts.items()}
    assert counted.pop("bmm") == 2 * attention_flops(SMALL, [60] * 4)
    assert counted == {"mm": linear_flops(SMALL, 4, 240) + head_flops(SMALL, 240, 240)}


def test_full_size_parameters_and_flops_are_as_counted_by_hand():
    base = random_base(PRESETS["full"], torch.device("meta"), torch.bfloat16)
    assert sum(p.numel() for p in base.model.parameters()) == pytest.approx(5.77e9, rel=1e-3)
    clips = random_clips(base, 8, 400, 0.15, [0])
    # counted by hand from the layers' sizes: 37.6 TFLOP, less all that follows the last attention in the
    # 1,698 rows without a label
    assert step_flops(base.model.config, 16, clips) == pytest.approx(37.05e12, rel=1e-3)
    assert step_flops(base.model.config, 16, clips) / gpu_step.H100_FLOPS == pytest.approx(
        0.0473, rel=0.01
    )


def test_after_the_last_attention_only_labelled_rows_are_counted():
    one_layer = copy.deepcopy(SMALL)
    one_layer.num_hidden_layers = 1
    # q, k and v: 8192 weights, forward only; LoRA: 4 (I + O) each, three times, less A's input gradient
    of_a_row = 2 * 8192 + 6 * 4 * (128 + 96 + 96) - 2 * 4 * 3 * 64
    assert linear_flops(one_layer, 4, 10, num_labelled=0) == 10 * of_a_row
    assert linear_flops(one_layer, 4, 10, num_labelled=10) == linear_flops(one_layer, 4, 10)


def test_the_full_size_step_runs_on_the_meta_device():
    base = random_base(PRESETS["full"], torch.device("meta"), torch.bfloat16)
    step = our_step(base, [16, 16])
    assert step([random_clips(base, 8, 400, 0.15, [k]) for k in range(2)]).shape == (2,)


def test_full_size_memory_prediction_is_close_to_the_documented_one():
    base = random_base(PRESETS["full"], torch.device("meta"), torch.bfloat16)
    clips = random_clips(base, 8, 400, 0.2, [0])
    # docs/howto/higgs_v2.md, where `fit` assumes another clip shape
    predicted = prediction(base, 16, clips)
    assert predicted(1) / 2**30 == pytest.approx(20.58, rel=0.02)
    assert predicted(8) / 2**30 == pytest.approx(89.35, rel=0.02)


def test_a_random_base_has_the_buffers_of_a_normally_built_model():
    plain = HiggsAudioV2ForConditionalGeneration(SMALL, use_text_head=True)
    made = random_base(SMALL, CPU, torch.bfloat16).model
    buffers = dict(made.named_buffers())
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(buffers.pop(name), buffer, rtol=0, atol=0)
    assert not buffers
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert made.text_lm_head.weight.float().std() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("task", ["transcribe", "speak", "chat"])
def test_random_clips_have_the_length_and_the_targets_of_their_task(task):
    clip = random_clip(small_base(), task, 100, 0.2, np.random.default_rng(0))
    assert clip.num_rows == 100
    learnt = ((clip.text_labels_L != IGNORE).sum(), (clip.audio_labels_AC != IGNORE).sum())
    assert (learnt[0] >= 20) == (task != "speak")
    assert (learnt[1] > 0) == (task != "transcribe")
    with pytest.raises(SystemExit, match="no room"):
        random_clip(small_base(), task, 20, 0.2, np.random.default_rng(0))


def records(monkeypatch, *arguments):
    """The packs of a run on one layer, with memory prediction replaced by 0."""
    monkeypatch.setattr(sys, "argv", ["gpu_step.py", "--device=cpu", *arguments])
    monkeypatch.setattr(gpu_step, "prediction", lambda *_: lambda adapters: 0)
    base = random_base(ONE_LAYER, CPU, torch.float32)
    return list(gpu_step.compare(base, gpu_step.arguments()))


SHORT = (
    "--preset=small",
    "--layers=1",
    "--dtype=float32",
    "--clips=2",
    "--tokens=60",
    "--repeats=2",
)


def test_stock_out_of_memory_keeps_our_figures(monkeypatch):
    def too_big(base, rank):
        def step(examples):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return step

    monkeypatch.setattr(gpu_step, "stock_step", too_big)
    record, second = records(monkeypatch, *SHORT, "--adapters=1,2")
    assert record["stock"] == second["stock"] == {"status": "out_of_memory"}
    assert record["ours"]["ms"] > 0 and second["ratio_to_alone"] > 0
    assert record["ratio_to_stock"] is None and record["losses_compared"] == 0
    assert gpu_step.row(record).count("out of memory") == 1


def test_memory_is_freed_only_once_after_it_runs_out(monkeypatch):
    freed = []
    monkeypatch.setattr(measured, "free_memory", lambda: freed.append(None))
    side = measured.Side(1, CPU, lambda batch: batch)

    def run_out():
        raise torch.OutOfMemoryError("CUDA out of memory")

    side.attempt(run_out)
    assert side.step is None and len(freed) == 1
    for _ in range(3):  # freeing again would empty the cache before the other side's timed steps
        side.attempt(lambda: side.timed([[]]))
    assert len(freed) == 1 and not side.times


def test_no_pack_is_tried_after_the_first_that_does_not_fit(monkeypatch):
    def limited(base, ranks, split):
        if len(ranks) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return our_step(base, ranks)

    monkeypatch.setattr(gpu_step, "our_step", limited)
    one, two = records(monkeypatch, *SHORT, "--adapters=1,2,4")
    assert one["ours"]["status"] == "ok" and one["ratio_to_stock"] > 0
    assert two["ours"] == {"status": "out_of_memory"} and two["stock"]["ms"] > 0


def test_losses_that_differ_from_stock_end_the_benchmark(monkeypatch):
    def other(base, ranks, split):
        step = our_step(base, ranks)
        return lambda examples: step(examples) * 1.001

    monkeypatch.setattr(gpu_step, "our_step", other)
    with pytest.raises(SystemExit, match="our loss"):
        records(monkeypatch, *SHORT)


@pytest.mark.slow
def test_the_script_runs_end_to_end_on_a_cpu(tmp_path, monkeypatch, capsys):
    script = gpu_step.__file__
    out = tmp_path / "made" / "figures.json"
    options = [*SHORT, "--device=cpu", "--adapters=2,1", "--clips=1", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", [script, *options])
    runpy.run_path(script, run_name="__main__")  # another process would load torch again
    result = json.loads(out.read_text())
    assert [pack["adapters"] for pack in result["packs"]] == [1, 2]
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert len(capsys.readouterr().out.splitlines()) == 5
    model = small_base().model  # of three layers; --layers keeps one
    whole, layer = (sum(p.numel() for p in m.parameters()) for m in (model, model.model.layers[2]))
    assert result["parameters"] == whole - 2 * layer
    for pack in result["packs"]:
        assert pack["losses_compared"] == measured.NUM_CHECKED
        assert pack["ours"]["host_syncs"] == 0 < pack["stock"]["host_syncs"]
        assert len(pack["ours"]["every_ms"]) == len(pack["stock"]["every_ms"]) == 2
        assert pack["ratio_to_stock"] > 0 and pack["ours"]["tokens_per_s"] > 0
        assert pack["share_of_floor_here"] > 0 and pack["predicted_gib"] > 0
