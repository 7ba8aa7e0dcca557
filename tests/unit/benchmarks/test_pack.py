"""The pack benchmarks, on the embedded base and at full size, run at small size on a CPU."""

import json
import runpy
import sys

import gpu_pack
import pack_time
import pytest
import sides
import stock_processes
import torch
from random_base import PRESETS, random_base, random_clips
from sides import our_step, prediction

from higgs_tune.train.memory import Memory

CPU = torch.device("cpu")


def test_a_pack_split_over_cores_has_the_losses_of_a_whole_one():
    base = random_base(PRESETS["small"], CPU, torch.float32)
    examples = [random_clips(base, 1, 60 + 10 * k, 0.2, [k]) for k in range(3)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        whole, split = (our_step(base, [4, 2, 4], split=split) for split in (False, True))
        for _ in range(2):
            torch.testing.assert_close(split(examples), whole(examples), rtol=1e-5, atol=0)
    finally:
        torch.set_num_threads(threads)


def test_random_clips_for_the_embedded_base_have_the_given_length():
    base = pack_time.embedded_base("cpu")
    for rows in (100, 401):
        (clip,) = random_clips(base, 1, rows, 0.15, [rows])
        assert clip.num_rows == rows


def test_times_are_per_adapter_and_ratios_are_to_one_stock_step():
    record = {
        "adapters": 4,
        "losses_compared": 3,
        "ours": {"status": "ok", "ms": 20.0, "host_syncs": 0},
        "stock": {"status": "ok", "ms": 30.0},
        "ratio_to_alone": 2.4,
    }
    found = pack_time.figures(record, 100, 2)
    assert (found["ours_ms_per_adapter"], found["ratio_to_stock"]) == (5.0, 6.0)
    assert (found["threads_ours"], found["threads_stock"]) == ("2 × 1", "1 × 2")
    assert "host_syncs" not in found["ours"]  # not visible in other threads
    assert len(pack_time.picture([found]).axes) == 2


@pytest.mark.parametrize("guess", [0, 1, 8, 30, 200])
@pytest.mark.parametrize("most", [0, 1, 2, 7, 8, 9, 30, 99])
def test_the_largest_pack_is_found_by_doubling_and_halving(most, guess):
    tried = []

    def fits(adapters):
        tried.append(adapters)
        return adapters <= most

    assert gpu_pack.largest(fits, 30, guess) == min(most, 30)
    assert len(tried) == len(set(tried)) <= 11 and 1 <= min(tried) <= max(tried) <= 30
    assert len(tried) <= 2 or guess != most


def test_rates_of_processes_that_share_a_device_are_summed():
    ok = {"status": "ok", "steps": 100, "seconds": 10.0}
    found = stock_processes.shared_figures([ok, {**ok, "steps": 300}], 2)
    assert found["ms_per_adapter"] == 25.0  # 40 steps a second
    failed = stock_processes.shared_figures([ok, {"status": "out_of_memory"}], 2)
    assert failed == {"status": "out_of_memory", "processes": 2}
    ended = stock_processes.shared_figures([ok, {"status": "failed", "exit_code": -9}], 2)
    assert ended == {"status": "failed", "exit_code": -9, "processes": 2}
    pack = {
        "adapters": 8, "ours": {"ms": 80.0}, "stock": {"ms": 50.0},
        "share_of_floor_h100": 0.5, "share_of_floor_here": 0.6,
    }  # fmt: skip
    (ratios,) = gpu_pack.ratios([pack], found)
    assert (ratios["to_one_process"], ratios["to_shared"]) == (5.0, 2.5)
    assert gpu_pack.ratios([pack], failed)[0]["to_shared"] is None


def gpu_script(monkeypatch, out, **measured):
    """Run gpu_pack.py in this process with these functions replaced; returns what it saved."""
    measured["base_of"] = lambda args: None
    for name, function in measured.items():
        monkeypatch.setattr(gpu_pack, name, function)
    options = ["--preset=small", "--device=cpu", "--adapters=1,2,4", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["gpu_pack.py", *options])
    gpu_pack.main()
    return json.loads(out.read_text())


def record(adapters, ms):
    side = {"status": "ok", "ms": ms} if ms else {"status": "out_of_memory"}
    shares = dict.fromkeys(("share_of_floor_h100", "share_of_floor_here", "ratio_to_stock"))
    return {"adapters": adapters, "ours": side, "stock": {"status": "ok", "ms": 9.0}, **shares}


def test_every_figure_is_saved_before_the_next_is_measured(monkeypatch, tmp_path):
    out, saved = tmp_path / "pack.json", []

    def compare(base, args, *, ranks):
        for adapters in args.adapters:
            yield record(adapters, 5.0 * adapters)
            saved.append(len(json.loads(out.read_text())["packs"]))

    def end(*_):
        raise SystemExit("the machine is gone")

    with pytest.raises(SystemExit, match="gone"):
        gpu_script(monkeypatch, out, compare=compare, measure_shared=end)
    assert saved[:3] == [1, 2, 3]
    result = json.loads(out.read_text())
    assert len(result["unlike"]) == 1 and result["shared"] == {"status": "left_out"}


def test_unlike_ranks_are_measured_in_the_largest_pack_that_fitted(monkeypatch, tmp_path):
    counts = []

    def compare(base, args, *, ranks):
        counts.append(args.adapters)
        yield from (record(n, 5.0 * n if n < 4 else None) for n in args.adapters)

    shared = {"status": "failed", "exit_code": 1, "processes": 4}
    result = gpu_script(
        monkeypatch, tmp_path / "pack.json",
        compare=compare, measure_shared=lambda *_: shared, measure_fill=lambda *_: {"measured": 2},
    )  # fmt: skip
    assert counts == [[1, 2, 4], [2]]
    assert [one["ms_per_adapter"] for one in result["ratios"]] == [5.0, 5.0, None]
    assert result["fits"] == {"measured": 2}


def test_mps_is_detected_by_its_control_file(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert not stock_processes.has_mps()
    (tmp_path / "control").touch()
    assert stock_processes.has_mps()


def test_memory_is_predicted_once_for_equal_steps(monkeypatch):
    base = random_base(PRESETS["small"], CPU, torch.float32)
    clips = random_clips(base, 1, 61, 0.2, [0])
    slots = []

    def predict(config, dtype, limits, modes, shape):
        assert (config.to_dict(), dtype) == (PRESETS["small"].to_dict(), "float32")
        slots.append(limits.num_slots)
        return Memory(100, 10 * limits.num_slots, 0, 0, 0)

    monkeypatch.setattr(sides, "predict", predict)
    first, second = (prediction(base, 4, clips) for _ in range(2))
    assert first(3) == second(3) == 130
    assert slots == [1, 2]
    sides._predicted.cache_clear()  # it holds made-up figures


@pytest.mark.slow
def test_the_gpu_script_runs_end_to_end_on_a_cpu(tmp_path, monkeypatch):
    out = tmp_path / "pack.json"
    script = gpu_pack.__file__
    options = ["--preset=small", "--device=cpu", "--dtype=float32", "--tokens=60", "--adapters=1,2"]
    options += ["--repeats=2", "--processes=2", "--seconds=0.5", "--fill", "--limit=2"]
    monkeypatch.setattr(sys, "argv", [script, *options, f"--out={out}"])
    runpy.run_path(script, run_name="__main__")  # the stock side starts its own processes
    result = json.loads(out.read_text())
    assert result["shared"]["status"] == "ok" and min(result["shared"]["steps"]) > 0
    assert [one["adapters"] for one in result["ratios"]] == [1, 2]
    assert all(one["to_one_process"] > 0 and one["to_shared"] > 0 for one in result["ratios"])
    (unlike,) = result["unlike"]
    assert unlike["ranks"] == [16, 8] and unlike["losses_compared"] > 0
    assert result["unlike_ratios"][0]["to_shared"] > 0
    assert result["fits"]["measured"] == result["fits"]["predicted"] == 2
    assert out.with_suffix(".png").exists()
