"""How processes share work, and which launches are refused. Real launches: tests/integration."""

import pytest

from higgs_tune.errors import ConfigError
from higgs_tune.train.parallel import ALONE, World, join_world

LAUNCH = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)


def test_shares_are_disjoint_and_complete():
    items = list(range(11))
    shares = [World(rank, 4).share(items) for rank in range(4)]
    assert sorted(item for share in shares for item in share) == items
    assert [len(share) for share in shares] == [3, 3, 3, 2]


def test_a_single_process_needs_no_group():
    assert join_world("auto", "float32") == (ALONE, "auto")
    assert ALONE.on_main(lambda: 3) == 3
    assert ALONE.any(True)
    assert not ALONE.any(False)
    assert ALONE.highest(2.5) == 2.5


@pytest.mark.parametrize(
    ("environment", "device", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "auto", "mixed precision is bf16, base.dtype f"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "auto", "--set base.dtype=bfloat16 for bf16"),
        ({"ACCELERATE_USE_FSDP": "true"}, "auto", "asked for FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "auto", "asked for DeepSpeed"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "auto", "--set base.compile=true"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "auto", "--set run.gradient_acc"),
        ({"ACCELERATE_USE_CPU": "true"}, "cuda", "Leave out --cpu"),
        ({"ACCELERATE_USE_CPU": "true", "MASTER_PORT": "1"}, "auto", "through MPI only"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "cuda:1", "one device for 2 processes"),
    ],
)
def test_launch_options_that_could_not_take_effect_are_refused(
    monkeypatch, environment, device, message
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        join_world(device, "float32")


def test_accelerates_cpu_and_bf16_options_are_accepted(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")  # as the launcher sets it by default
    assert join_world("auto", "bfloat16") == (ALONE, "cpu")
