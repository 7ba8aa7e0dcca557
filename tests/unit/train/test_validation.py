"""Validation of a pack whose residents change."""

import pytest
import torch

from higgs_tune.errors import ModelError
from higgs_tune.train.engine import Engine
from higgs_tune.train.residents import PackLimits
from higgs_tune.train.validation import Validator
from tests.models import example, tiny_base, trial

SETS = {
    "transcribe": [example("transcribe", 1), example("transcribe", 2, 9, 4)],
    "swapped": [example("transcribe", 3), example("transcribe", 4, 5, 8)],
    "speak": [example("speak", 5), example("speak", 6, 4, 9)],
}


def test_the_next_trial_of_a_slot_is_validated_with_its_own_new_modules():
    new = ("attention", "audio_attention")
    configs = {
        "off": trial(targets=("attention",)),
        "text_to_audio": trial(targets=new, cross_attention="text_to_audio"),
        "audio_self": trial(targets=new, cross_attention="audio_self"),
    }
    engine = Engine(tiny_base(), PackLimits.of([*configs.values()], num_slots=1))
    validator = Validator(engine, **SETS)
    for name, config in configs.items():
        engine.add(name, config)
        generator = torch.Generator().manual_seed(1)
        for view in engine.bank.views(0, "master").values():
            view.copy_(0.3 * torch.randn(view.shape, generator=generator))
        assert validator.validate([name]) == Validator(engine, **SETS).validate([name])
        engine.remove(name)


def test_a_base_without_a_finite_loss_is_refused():
    base = tiny_base()
    letter = SETS["transcribe"][1].ids_L[SETS["transcribe"][1].text_labels_L >= 13][-1]
    with torch.no_grad():
        base.model.model.embed_tokens.weight[letter] = torch.nan
    validator = Validator(Engine(base, PackLimits.of([trial()], num_slots=1)), **SETS)
    with pytest.raises(ModelError, match="val/text/nll is nan for the untouched base"):
        validator.bare()
