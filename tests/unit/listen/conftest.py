"""Fixtures: a base overfitted on six examples, the embedded base, and an adapter for it."""

import pytest
import torch

from higgs_tune.config import BaseSettings, TrialConfig
from higgs_tune.data.collate import collate, count_targets
from higgs_tune.data.conversation import Conversation
from higgs_tune.data.tokens import encode_conversation
from higgs_tune.model.load import Base, load_base
from higgs_tune.model.packed_forward import packed_nll
from higgs_tune.train.checkpoint import save_adapter
from higgs_tune.train.engine import Engine
from higgs_tune.train.residents import PackLimits
from tests.models import conversation, tiny_base, trial, vocabulary

TALKS = [
    conversation(task, seed, num_frames=4 + 3 * seed, num_letters=3 + 2 * seed)
    for task in ("speak", "clone", "transcribe")
    for seed in range(2)
]


@pytest.fixture(scope="session")
def by_heart() -> tuple[Base, list[Conversation]]:
    """A tiny base overfitted on two conversations of each task."""
    base = tiny_base(seed=3)
    model = base.model.requires_grad_(True)
    examples = [encode_conversation(talk, vocabulary()) for talk in TALKS]
    count = count_targets(examples, 4)
    batch, count_C = collate({0: examples}), torch.from_numpy(count.audio_C)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    loss = torch.tensor(torch.inf)
    for _ in range(600):
        text_K, audio_KC = packed_nll(model, batch, None)
        loss = (audio_KC[0] / count_C).mean() + text_K[0] / count.text
        if float(loss.detach()) < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.01
    model.requires_grad_(False).eval()
    return base, TALKS


@pytest.fixture(scope="session")
def embedded() -> Base:
    """The embedded base on the CPU."""
    return load_base(BaseSettings(device="cpu"))


@pytest.fixture(scope="session")
def adapter_config() -> TrialConfig:
    """A trial that trains every path of the base."""
    targets = ("attention", "text_mlp", "audio_mlp", "text_head", "audio_head")
    return trial(targets=targets, rank=2)


@pytest.fixture(scope="session")
def state(embedded, adapter_config):
    """An adapter with random factors."""
    engine = Engine(embedded, PackLimits.of([adapter_config], num_slots=1))
    engine.add("a", adapter_config)
    generator = torch.Generator().manual_seed(0)
    for view in engine.bank.views(engine.residents["a"].slot, "master").values():
        view.copy_(0.1 * torch.randn(view.shape, generator=generator))
    return engine.state("a")


@pytest.fixture(scope="session")
def adapter(state, adapter_config, tmp_path_factory):
    """That adapter on disk, exported without its training state."""
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    folder.mkdir()
    save_adapter(folder, state, adapter_config, "embedded")
    (folder / "training_state.safetensors").unlink()
    return folder
