"""The weights that an adapter starts from."""

import torch

from higgs_tune.model.groups import lora_groups
from higgs_tune.model.initial import initial_weights
from tests.models import tiny_base, trial


def test_initial_weights_depend_on_the_seed_and_are_distributed_as_in_peft():
    model = tiny_base().model
    configs = [trial(seed=1), trial(seed=1), trial(seed=2)]
    groups = lora_groups(model, frozenset(configs[0].targets))
    first, again, other = (initial_weights(model, groups, config) for config in configs)
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        if name.endswith("lora_B.weight"):
            assert not weight.any()
            continue
        assert not torch.equal(weight, other[name])
        bound = weight.shape[1] ** -0.5  # of kaiming_uniform_ with a = sqrt(5), by inputs
        assert 0.9 * bound < float(weight.abs().max()) <= bound
