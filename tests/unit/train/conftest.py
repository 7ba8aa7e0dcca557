"""Fixtures that run `higgs-tune train` on a tiny base, in this process."""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from higgs_tune.config import BaseSettings, RunSettings
from higgs_tune.train import single
from higgs_tune.train.recorder import Watcher
from tests.models import DATA, make_dataset, tiny_base
from tests.packs import TRIALS, loop_of
from tests.runs import TRIAL
from tests.starts import edit_weights
from tests.threads import torch_threads


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def run_single(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(single, "load_base", lambda _: tiny_base())
    lines = []

    def start(
        *,
        resume=False,
        report=lines.append,
        on_step=lambda step: None,
        data=DATA,
        trial=TRIAL,
        out=tmp_path / "out",
        dataset=dataset,
        **settings,
    ):
        return single.train_single(
            BaseSettings(),
            data,
            trial,
            out,
            dataset=dataset,
            resume=resume,
            watcher=Watcher(report, on_step),
            run=RunSettings(**{"num_samples": 0, "tensorboard": False} | settings),
        )

    return start, lines, tmp_path / "out"


@pytest.fixture
def uninterrupted(run_single, tmp_path):
    run, lines, _ = run_single
    run(out=tmp_path / "whole")
    lines.clear()
    return tmp_path / "whole"


@pytest.fixture
def one_thread():
    with torch_threads(1):
        yield


@pytest.fixture(scope="module")
def clean(dataset):
    with torch_threads(1):
        loop = loop_of(dataset)
        results = [loop.advance() for _ in range(2)]
        return results, {name: loop.engine.state(name) for name in TRIALS}


@pytest.fixture
def trained(run_single, tmp_path):
    """A finished run's adapter without its training state, and the run's last line."""
    run, lines, _ = run_single
    run(out=tmp_path / "earlier")
    last = lines[-1]
    lines.clear()
    adapter = tmp_path / "adapter"
    ignore = shutil.ignore_patterns("training_state*")
    shutil.copytree(tmp_path / "earlier" / "adapter", adapter, ignore=ignore)
    return adapter, last


@pytest.fixture
def plain_peft(tmp_path):
    """Saves a stock PEFT adapter in bfloat16; returns its folder and the wrapped stock model."""

    def save(**settings):
        torch.manual_seed(3)
        config = LoraConfig(
            **({"r": 4, "lora_alpha": 2, "target_modules": ["v_proj", "down_proj"]} | settings)
        )
        wrapped = get_peft_model(tiny_base().model, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.3)
            if "lora_" in name:
                parameter.data = parameter.data.bfloat16().float()
        wrapped.save_pretrained(tmp_path / "peft")
        adapter = tmp_path / "peft"
        edit_weights(adapter, lambda w: w.update({n: t.bfloat16() for n, t in w.items()}))
        return adapter, wrapped

    return save
