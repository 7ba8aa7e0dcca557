"""Command lines of the benchmarks: a mistake is reported before anything is measured."""

import argparse
import sys
from importlib.metadata import PackageNotFoundError

import compile_time
import encode_throughput
import fixed_costs
import gpu_pack
import gpu_step
import options
import output
import pack_ops
import pack_time
import pytest
import simulate
import stand_in_gpu
import step_time
import sweep_time

from higgs_tune.errors import ConfigError

# With these, every script ends before it loads a model.
MISTAKES = [
    (compile_time, "--repeats=0", "found '0', needs a whole number of at least 1"),
    (encode_throughput, "--clips=none", "found 'none', needs a whole number of at least 1"),
    (encode_throughput, "--device=cuda:x", "--device: found 'cuda:x', which names no device"),
    (fixed_costs, "--trials=4", "no trial would follow another; these --slots and"),
    (fixed_costs, "--gpus=2", "argument --gpus: invalid choice: "),
    (gpu_pack, "--unlike=16,0", "found '0', needs a whole number of at least 1"),
    (gpu_pack, "--processes=-1", "found '-1', needs a whole number of at least 0"),
    (gpu_pack, "--seconds=nan", "found 'nan', needs a number of at least 0.1"),
    (gpu_pack, "--out=figures.png", "found 'figures.png', needs a file that ends in .json"),
    (gpu_pack, "--device=gpu", "--device: found 'gpu', which names no device"),
    (gpu_step, "--layers=0", "found '0', needs a whole number of at least 1"),
    (gpu_step, "--out=/dev/null/x.json", "/dev/null: "),
    (pack_ops, "--adapters=1,,2", "found '', needs a whole number of at least 1"),
    (pack_time, "--repeats=0", "found '0', needs a whole number of at least 1"),
    (simulate, "--slots=0", "found '0', needs a whole number of at least 1"),
    (simulate, "--num-steps=150", "--num-steps must be a multiple of --report-every"),
    (simulate, "--grace-fraction=2", "grace_fraction"),
    (simulate, "--steps=nowhere.json", "nowhere.json: "),
    (step_time, "--clips=1", "found '1', needs a whole number of at least 2"),
    (sweep_time, "--trials=0", "found '0', needs a whole number of at least 1"),
]


@pytest.mark.parametrize("script, mistake, message", MISTAKES)
def test_a_mistake_ends_a_script_with_its_message(script, mistake, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.__name__, mistake])
    with pytest.raises(SystemExit) as ended:
        options.run(script.main)
    shown = str(ended.value) if isinstance(ended.value.code, str) else capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


def test_errors_of_the_package_end_a_script_with_their_message():
    def main():
        raise ConfigError("base.device: found 'x'")

    with pytest.raises(SystemExit, match=r"^error: base\.device: found 'x'$"):
        options.run(main)


def test_numbers_are_sorted_and_deduplicated():
    assert options.ascending("8,1,2,8") == [1, 2, 8]


def test_the_folder_of_the_results_file_is_created(tmp_path):
    out = options.json_file(str(tmp_path / "new" / "figures.json"))
    assert out.parent.is_dir() and not out.exists()
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(argparse.ArgumentTypeError, match=r"a file that ends in \.json"):
        options.json_file(str(tmp_path / "folder.json"))


def test_a_machine_without_ray_and_optuna_can_be_described(monkeypatch):
    def version(package):
        if package in ("ray", "optuna"):
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(output, "version", version)
    assert output.machine()["versions"] == {
        "torch": "1.0", "transformers": "1.0", "peft": "1.0", "ray": None, "optuna": None,
    }  # fmt: skip


def test_a_missing_compiler_is_a_clear_error(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    with pytest.raises(SystemExit, match=r"needs a C\+\+ compiler .*no-such-compiler"):
        stand_in_gpu.ensure_preloaded()


@pytest.mark.parametrize("load, warned", [(0.1, False), (99.0, True)])
def test_a_busy_machine_gives_a_warning(load, warned, monkeypatch, capsys):
    monkeypatch.setattr(output.os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert output.machine()["load"] == [load, 0.0, 0.0]
    assert ("this machine is busy with other work (load 99.0" in capsys.readouterr().err) == warned
