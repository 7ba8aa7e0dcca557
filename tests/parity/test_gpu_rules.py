"""A full-size step by PyTorch's own rules for a GPU, on shapes without values (tests/gpu_rules.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in_gpu import preload

from tests.compilers import needs_compiler

ROOT = Path(__file__).parents[2]
pytestmark = needs_compiler


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What `python -m tests.gpu_rules` prints."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu_rules"],
        env=preload(tmp_path_factory.mktemp("gpu")) | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("dtype", "kernels"), [("bfloat16", {"flash", "efficient"}), ("float32", {"efficient"})]
)
def test_a_gpu_holds_no_full_matrix_of_attention_scores(found, dtype, kernels):
    forward = {f"_scaled_dot_product_{kernel}_attention" for kernel in kernels}
    backward = {f"{name}_backward" for name in forward}
    # any softmax besides that of the losses would be PyTorch's fallback, attention in pieces
    assert set(found[dtype]["cuda"]["attention"]) == forward | backward | {"_log_softmax"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_predicted_on_a_cpu_matches_a_gpus_rules(found, dtype):
    on_gpu, predicted = (sum(found[dtype][d]["memory"].values()) for d in ("cuda", "cpu"))
    assert predicted == pytest.approx(on_gpu, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_operation_of_a_step_on_a_gpu_depends_on_values(found, dtype):
    assert found[dtype]["cuda"]["reads"] == {}
