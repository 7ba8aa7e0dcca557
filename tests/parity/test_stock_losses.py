"""Our losses and gradients match those of the stock classes on the same labels."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sides import stock_inputs
from torch.nn import functional as F

from higgs_tune.data.collate import collate, count_targets
from higgs_tune.model.packed_forward import packed_nll
from higgs_tune.model.targets import lora_regex
from higgs_tune.train.engine import Engine
from higgs_tune.train.residents import PackLimits
from tests.models import NUM_CODEBOOKS, example, tiny_base, trial

MIXED = [
    example("transcribe", 1, 9, 5),
    example("speak", 2, 6, 11),
    example("clone", 3, 4, 3),
    example("speak", 4, 12, 2),
]


def our_total(text_sum_K, audio_sum_KC, examples):
    """The stock total: text mean plus a sum of per-codebook means."""
    counts = count_targets(examples, audio_sum_KC.shape[1])
    return text_sum_K[0] / counts.text + (audio_sum_KC[0] / torch.from_numpy(counts.audio_C)).sum()


def test_losses_match_the_stock_forward_on_the_same_labels():
    base = tiny_base()
    ours = our_total(*packed_nll(base.model, collate({0: MIXED}), None), MIXED)
    stock = base.model(**stock_inputs(MIXED, NUM_CODEBOOKS), use_cache=False).loss
    torch.testing.assert_close(ours, stock, rtol=1e-6, atol=1e-6)


def test_every_codebook_matches_the_stock_logits():
    base = tiny_base()
    inputs = stock_inputs(MIXED, NUM_CODEBOOKS)
    labels, audio_labels = inputs.pop("labels"), inputs.pop("audio_labels")
    logits = base.model(**inputs, use_cache=False).logits
    rows = base.model.model.get_placeholder_mask(inputs["input_ids"], None, None)
    spread = torch.full((*labels.shape, 4), -100)
    spread[rows] = audio_labels[inputs["audio_input_ids_mask"]]
    logits = logits.unflatten(-1, (4, -1))[:, :-1].flatten(0, 1)
    per_codebook = torch.stack(
        [
            F.cross_entropy(logits[:, c], spread[:, 1:].flatten(0, 1)[:, c], reduction="sum")
            for c in range(4)
        ]
    )
    _, audio_sum_KC = packed_nll(base.model, collate({0: MIXED}), None)
    torch.testing.assert_close(audio_sum_KC[0], per_codebook, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "targets",
    [
        ("attention",),
        ("text_mlp",),
        ("audio_mlp", "audio_head"),
        ("attention", "text_mlp", "audio_mlp", "text_head", "audio_head"),
    ],
)
def test_gradients_match_stock_transformers_with_peft(targets):
    base = tiny_base()
    # 4.0, the number of codebooks: stock sums over them
    config = trial(targets=targets, rank=3, alpha=7.0, audio_loss_weight=4.0)
    engine = Engine(base, PackLimits.of([config], num_slots=1))
    engine.add("a", config)
    for view in engine.bank.views(0, "master").values():  # B = 0 would hide A's gradient
        view.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    stock = get_peft_model(
        copy.deepcopy(base.model),
        LoraConfig(r=3, lora_alpha=7.0, target_modules=lora_regex(targets)),
    )
    state = engine.state("a")
    names = {n: p for n, p in stock.named_parameters() if p.requires_grad}
    short = {
        n.removeprefix("base_model.model.").replace(".default", ""): p for n, p in names.items()
    }
    assert short.keys() == state.weights.keys()
    with torch.no_grad():
        for name, parameter in short.items():
            parameter.copy_(state.weights[name])

    engine.forward_backward(collate({0: MIXED}), {0: count_targets(MIXED, 4)})
    ours = engine.bank.views(0, "grad")
    stock(**stock_inputs(MIXED, NUM_CODEBOOKS), use_cache=False).loss.backward()
    for name, parameter in short.items():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_loss_does_not_depend_on_padding_to_longer_neighbours():
    base = tiny_base()
    alone = packed_nll(base.model, collate({0: MIXED[:1]}), None)
    beside = packed_nll(base.model, collate({0: MIXED[:1], 1: [example("clone", 9, 40, 30)]}), None)
    torch.testing.assert_close(beside[0][0], alone[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(beside[1][0], alone[1][0], rtol=1e-5, atol=1e-5)
