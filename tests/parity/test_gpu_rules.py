"""A full-size step by PyTorch's own rules for a GPU, on shapes without values (tests/stand_in_gpu.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

TESTS = Path(__file__).parents[1]
CUDA_HEADERS = Path(triton.__file__).parent / "backends" / "nvidia" / "include"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What `python -m tests.stand_in_gpu` prints."""
    library = tmp_path_factory.mktemp("gpu") / "libcuda.so.1"
    shared = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-I", CUDA_HEADERS]
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, *shared, "-o", library, TESTS / "stand_in_gpu.cpp"], check=True)
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS.parent / "benchmarks")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.stand_in_gpu"],
        env=os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("dtype", "kernels"), [("bfloat16", {"flash", "efficient"}), ("float32", {"efficient"})]
)
def test_a_gpu_holds_no_attention_score_of_every_pair(found, dtype, kernels):
    forward = {f"_scaled_dot_product_{kernel}_attention" for kernel in kernels}
    backward = {f"{name}_backward" for name in forward}
    # a softmax beside the losses' own would be attention in pieces, as PyTorch falls back to
    assert set(found[dtype]["cuda"]["attention"]) == forward | backward | {"_log_softmax"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_memory_model_counts_what_a_gpu_takes(found, dtype):
    on_gpu, predicted = (sum(found[dtype][d]["memory"].values()) for d in ("cuda", "cpu"))
    assert predicted == pytest.approx(on_gpu, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nothing_of_a_step_waits_for_a_gpu(found, dtype):
    assert found[dtype]["cuda"]["reads"] == {}
