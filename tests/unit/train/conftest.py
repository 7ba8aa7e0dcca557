"""A run of `higgs-tune train` on a tiny base, in this process."""

import pytest

from higgs_tune.config import BaseSettings, RunSettings
from higgs_tune.train import single
from higgs_tune.train.recorder import Watcher
from tests.models import DATA, make_dataset, tiny_base
from tests.packs import TRIALS, loop_of
from tests.runs import TRIAL
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
