"""LoRA dropout acts as in PEFT, draws an adapter's masks alike in any pack, and is only for training."""

import copy

import pytest
import torch
from host_syncs import HostReads
from peft import LoraConfig, get_peft_model
from sides import stock_inputs
from torch import nn

from higgs_tune.config import ALL_LINEAR
from higgs_tune.data.collate import collate, count_targets
from higgs_tune.model import packed_forward
from higgs_tune.model.dropout import Masks, Section
from higgs_tune.model.targets import lora_regex
from higgs_tune.train import engine as engine_module
from higgs_tune.train.checkpoint import lora_config
from higgs_tune.train.engine import Engine
from higgs_tune.train.residents import PackLimits
from tests.models import NUM_CODEBOOKS, example, tiny_base, trial

EVERY = (*ALL_LINEAR, "text_head", "audio_head")
# of equal length, so that the stock forward has no padding among its text rows
LISTEN = example("transcribe", 1, 9, 6)
SPEAK = (example("speak", 2, 9, letters) for letters in range(1, 26))
PAIR = [LISTEN, next(e for e in SPEAK if e.num_rows == LISTEN.num_rows)]


def filled(configs, share=False):
    """An engine with these adapters; their B is not 0, which would hide A's gradient."""
    limits = PackLimits.of(configs, num_slots=len(configs))
    engine = Engine(tiny_base(), limits, share_matmuls=share)
    for n, config in enumerate(configs):
        engine.add(str(n), config)
        for view in engine.bank.views(n, "master").values():
            generator = torch.Generator().manual_seed(config.seed)
            view.copy_(0.1 * torch.randn(view.shape, generator=generator))
    return engine


def backward(engine, examples):
    """One forward and backward; returns a copy of each slot's gradients."""
    counts = {slot: count_targets(own, NUM_CODEBOOKS) for slot, own in examples.items()}
    engine.forward_backward(engine.batch(examples), counts)
    return [
        {name: g.clone() for name, g in engine.bank.views(slot, "grad").items()}
        for slot in examples
    ]


class Given(nn.Module):
    """Inverted dropout by a given mask, chosen by the number of rows: of all positions, text or audio."""

    def __init__(self, mask_ND, dropout, text, audio):
        super().__init__()
        self.by_count = {len(m): m for m in (mask_ND, mask_ND[text], mask_ND[audio])}
        assert len(self.by_count) == 3
        self.keep = 1 - dropout

    def forward(self, x):
        mask = self.by_count[x.shape[:-1].numel()]
        return x * mask.reshape(x.shape) / self.keep


def record(monkeypatch):
    """Linear's name → the mask drawn for it and the sections of its rows, filled as forwards run."""
    drawn, names = {}, []
    plain_linear, plain_draw = packed_forward.adapted_linear, Masks.draw

    def linear(x_KND, group, weights, sections):
        names[:] = list(group)
        return plain_linear(x_KND, group, weights, sections)

    def draw(self, rows, keeps, num_linears, num_inputs, sections):
        masks = plain_draw(self, rows, keeps, num_linears, num_inputs, sections)
        drawn.update({name: (m, sections) for name, m in zip(names, masks, strict=True)})
        return masks

    monkeypatch.setattr(packed_forward, "adapted_linear", linear)
    monkeypatch.setattr(Masks, "draw", draw)
    return drawn


def test_gradients_match_peft_with_the_same_masks(monkeypatch):
    drawn = record(monkeypatch)
    config = trial(targets=EVERY, rank=3, alpha=7.0, audio_loss_weight=4.0, dropout=0.4)
    engine = filled([config])
    start = engine.state("0").weights
    batch = collate({0: PAIR})
    counts = {0: count_targets(PAIR, NUM_CODEBOOKS)}
    text_K, audio_KC = engine.forward_backward(batch, counts)
    ours = engine.bank.views(0, "grad")

    is_audio = torch.zeros(sum(e.num_rows for e in PAIR), dtype=torch.bool)
    for n, e in enumerate(PAIR):
        is_audio[n * e.num_rows + torch.from_numpy(e.audio_rows_A)] = True
    text, audio = (~is_audio).nonzero()[:, 0], is_audio.nonzero()[:, 0]
    kinds = {
        (len(text), len(audio)): (text, audio),
        (batch.num_text_labelled_K[0], batch.num_audio_labelled_K[0]): (
            text[batch.text_rows_KM[0]],
            audio[batch.audio_rows_KM[0]],
        ),
    }
    stock = get_peft_model(
        copy.deepcopy(tiny_base().model),
        LoraConfig(r=3, lora_alpha=7.0, target_modules=lora_regex(EVERY)),
    )
    short = {
        n.removeprefix("base_model.model.").replace(".default", ""): p
        for n, p in stock.named_parameters()
        if p.requires_grad
    }
    assert {name.rsplit(".", 2)[0] for name in short} == drawn.keys()
    with torch.no_grad():
        for name, parameter in short.items():
            parameter.copy_(start[name])
    for name, (mask, sections) in drawn.items():
        where = [rows for sizes in kinds.values() for rows in sizes]
        assert len({len(r) for r in where}) == 4
        rows = [next(r for r in where if len(r) == s.own_K[0]) for s in sections]
        spread = torch.ones(len(is_audio), mask.shape[1], dtype=torch.bool)
        spread[torch.cat(rows)] = mask
        module = stock.get_submodule(f"base_model.model.{name}")
        module.lora_dropout["default"] = Given(spread, 0.4, text, audio)
    stock.train()
    loss = stock(**stock_inputs(PAIR, NUM_CODEBOOKS), use_cache=False).loss
    loss.backward()

    total = text_K[0] / counts[0].text + (audio_KC[0] / torch.from_numpy(counts[0].audio_C)).sum()
    torch.testing.assert_close(total, loss.detach(), rtol=1e-5, atol=1e-5)
    for name, parameter in short.items():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


CONFIGS = [
    trial(seed=1, dropout=0.3),
    trial(seed=2, dropout=0.0, rank=2),
    trial(seed=3, dropout=0.6, targets=("text_mlp", "text_head", "audio_head")),
    trial(
        seed=4, dropout=0.2, cross_attention="audio_self", targets=("attention", "audio_attention")
    ),
]
EXAMPLES = {
    n: [example(task, 10 * n + i, 4 + 3 * n + i, 9 - 2 * n) for i, task in enumerate(tasks)]
    for n, tasks in enumerate([("clone", "speak"), ("transcribe",), ("speak",), ("clone",)])
}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("n", range(len(CONFIGS)))
def test_packed_gradients_with_dropout_match_each_alone(n, share):
    packed = backward(filled(CONFIGS, share), EXAMPLES)[n]
    single = backward(filled([CONFIGS[n]]), {0: EXAMPLES[n]})[0]
    total = torch.cat([g.flatten() for g in single.values()]).norm()
    for name, gradient in single.items():
        # fp32 rounding of differently shaped matmuls; another mask would give 1e-1
        assert (packed[name] - gradient).norm() / total < 1e-5, name


@pytest.mark.parametrize("share", [False, True])
def test_a_neighbours_dropout_does_not_change_gradients(share):
    clean = [CONFIGS[0].model_copy(update={"dropout": 0.0}), *CONFIGS[1:]]
    with_dropout, without = (backward(filled(c, share), EXAMPLES) for c in (CONFIGS, clean))
    assert any(not torch.equal(with_dropout[0][name], g) for name, g in without[0].items())
    for ours, theirs in zip(with_dropout[1:], without[1:], strict=True):
        for name, gradient in theirs.items():
            if share:  # rounding: without masks, one matmul serves all linears of a group
                torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
            else:
                assert torch.equal(ours[name], gradient), name


def test_validation_has_no_dropout():
    dropped, plain = (filled([trial(seed=1, dropout=p)]) for p in (0.5, 0.0))
    batch = collate({0: PAIR})
    for ours, theirs in zip(dropped.evaluate(batch), plain.evaluate(batch), strict=True):
        assert torch.equal(ours, theirs)


def test_a_step_without_dropout_makes_no_masks(monkeypatch):
    def refuse(*args):
        raise AssertionError("masks were made")

    monkeypatch.setattr(engine_module, "Masks", refuse)
    backward(filled([CONFIGS[1]]), {0: PAIR})
    with pytest.raises(AssertionError, match="masks were made"):
        backward(filled([CONFIGS[0]]), {0: PAIR})


def test_masks_do_not_make_the_host_wait_for_the_device():
    engine = filled(CONFIGS)
    with HostReads() as reads:
        backward(engine, EXAMPLES)
    assert reads.found == {}


def test_the_adapters_lora_config_states_its_dropout():
    assert lora_config(CONFIGS[0], "tiny").lora_dropout == 0.3


def sums_of(engine, steps):
    """Train these steps of two micro-batches each; returns the losses of each micro-batch."""
    losses = []
    for step in steps:
        parts = [[example("clone", 2 * step + n)] for n in range(2)]
        counts = {0: count_targets([*parts[0], *parts[1]], NUM_CODEBOOKS)}
        for part in parts:
            text_K, audio_KC = engine.forward_backward(collate({0: part}), counts)
            losses.append(torch.cat([text_K[:, None], audio_KC], 1))
        engine.optim_step(["0"])
    return torch.cat(losses)


def test_resumed_training_with_dropout_equals_uninterrupted():
    config = trial(seed=7, dropout=0.3)
    whole, first, second = (
        Engine(tiny_base(), PackLimits.of([config], num_slots=1)) for _ in range(3)
    )
    whole.add("0", config)
    expected = sums_of(whole, range(4))
    first.add("0", config)
    sums_of(first, range(2))
    second.add("0", config, first.state("0"))
    assert torch.equal(sums_of(second, range(2, 4)), expected[4:])


def test_each_seed_step_process_and_micro_batch_has_its_own_masks():
    drawn = set()
    wide = [Section(40, (40,))]
    for numbers in ((1, 0, 0, 0), (2, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1)):
        masks = Masks(torch.device("cpu"), {0: numbers})
        first, second = masks.draw(0, (0.7,), 2, 500, wide)
        # 40 · 500 draws: sd 0.0032
        assert abs(float(first.float().mean()) - 0.7) < 0.02
        drawn |= {first.numpy().tobytes(), second.numpy().tobytes()}
        again = Masks(torch.device("cpu"), {0: numbers}).draw(0, (0.7,), 2, 500, wide)[0]
        assert torch.equal(again, first)
    assert len(drawn) == 10


def test_a_mask_does_not_depend_on_padding():
    def draw(text, audio):
        masks = Masks(torch.device("cpu"), {0: (5,)})
        sections = [Section(text, (3,)), Section(audio, (4,))]
        return masks.draw(0, (0.5,), 2, 16, sections)

    for tight, loose in zip(draw(3, 4), draw(5, 9), strict=True):
        assert torch.equal(tight, torch.cat([loose[:3], loose[5:9]]))


def test_every_forward_of_an_engine_seeds_its_own_masks(monkeypatch):
    named, plain = [], engine_module.Masks

    def masks(device, seeds):
        named.append(seeds[0])
        return plain(device, seeds)

    monkeypatch.setattr(engine_module, "Masks", masks)
    config = trial(seed=7, dropout=0.3)
    for process in (0, 1):
        engine = Engine(tiny_base(), PackLimits.of([config], num_slots=1), process)
        engine.add("0", config)
        sums_of(engine, range(2))
    micro = range(2)
    assert named == [(7, step, process, n) for process in (0, 1) for step in (0, 1) for n in micro]
    assert len(set(named)) == 8
