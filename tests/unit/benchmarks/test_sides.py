"""The stock side on a GPU, with fake tensors: forward only, as autograd would need a driver."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sides import stock_inputs, under_autocast
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from higgs_tune.config import ALL_LINEAR
from higgs_tune.model.targets import lora_regex
from tests.models import NUM_CODEBOOKS, example, tiny_base

EXAMPLES = [example("speak", 3), example("transcribe", 4)]


@pytest.fixture
def autocast():
    """CUDA's autocast, which torch.autocast leaves off where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])
    torch.clear_autocast_cache()


def loss_on_a_gpu(model) -> torch.Tensor:
    """The stock loss of a bfloat16 base; a ShapeEnv, as its masks make shapes depend on values."""
    model = get_peft_model(model, LoraConfig(r=4, target_modules=lora_regex(ALL_LINEAR))).train()
    inputs = stock_inputs(EXAMPLES, NUM_CODEBOOKS)
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        model.to("cuda")
        inputs = {name: tensor.to("cuda") for name, tensor in inputs.items()}
        return model(**inputs, use_cache=False).loss


@pytest.mark.usefixtures("autocast")
def test_stock_forward_prepared_by_under_autocast_runs_on_a_gpu():
    loss = loss_on_a_gpu(under_autocast(tiny_base(dtype=torch.bfloat16).model))
    assert (loss.device.type, loss.dtype) == ("cuda", torch.float32)


@pytest.mark.usefixtures("autocast")
def test_stock_forward_without_under_autocast_fails_on_a_gpu():
    with pytest.raises(RuntimeError, match="masked_scatter: expected self and source to have same"):
        loss_on_a_gpu(tiny_base(dtype=torch.bfloat16).model)


def test_under_autocast_changes_nothing_on_a_cpu():
    inputs = stock_inputs(EXAMPLES, NUM_CODEBOOKS)
    plain, wrapped = tiny_base().model, under_autocast(tiny_base().model)
    losses = [model(**inputs, use_cache=False).loss for model in (plain, wrapped)]
    assert torch.isfinite(losses[0])
    assert torch.equal(*losses)
