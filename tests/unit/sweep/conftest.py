from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from higgs_tune.config import SweepConfig
from higgs_tune.config_file import validate
from higgs_tune.sweep import member, nodes, space
from higgs_tune.sweep import study as studies
from higgs_tune.sweep import workers as module
from higgs_tune.sweep.study import TrialRecord
from tests.crew import Actor


@pytest.fixture
def make_config(tmp_path: Path):
    """A small valid sweep; keyword arguments replace whole sections."""

    def make(**sections: Any) -> SweepConfig:
        raw = {
            "name": "s",
            "results_dir": str(tmp_path / "results"),
            "space": {"cross_attention": ["off", "audio_self", "text_to_audio"]},
            "tune": {"num_trials": 8},
            **sections,
        }
        return validate(SweepConfig, raw, "test")

    return make


@pytest.fixture
def record(make_config):
    """Trial 0 of a sweep of `make_config`: 150 steps."""
    config = make_config()
    trial = space.resolve(space.baseline_values(config, fixed_flag=False), config, 5)
    return TrialRecord("t000", 0, space.short_name("t000", trial), "baseline", None, trial)


@pytest.fixture
def study(tmp_path: Path):
    return studies.open_study("s", tmp_path, None)


@pytest.fixture
def fast_rounds(monkeypatch):
    monkeypatch.setenv("FAKE_ROUND_S", "0.001")


@pytest.fixture
def crew(make_config, monkeypatch):
    """Two workers with fake actors and a fake clock; `heard` has what the callbacks of `hear` got."""
    actors, now, killed = [], [0.0], []

    def create(*_, **__):
        actors.append(Actor())
        return actors[-1]

    def get(reference):
        value = reference[0].answers[reference[1]]
        if isinstance(value, Exception):
            raise value
        return value

    def wait(references, num_returns=1, timeout=None):
        ready = [r for r in references if r[1] in r[0].answers]
        if len(ready) < num_returns:
            now[0] += timeout
        return ready, [r for r in references if r not in ready]

    options = SimpleNamespace(remote=create)
    fake = SimpleNamespace(
        remote=lambda _: SimpleNamespace(options=lambda **_: options),
        get=get,
        wait=wait,
        kill=lambda actor, no_restart: killed.append((actors.index(actor), no_restart)),
    )
    for part in (module, member):
        monkeypatch.setattr(part, "ray", fake)
    up = [{"Alive": True, "Resources": {"CPU": 2.0}}]
    monkeypatch.setattr(nodes, "ray", SimpleNamespace(nodes=lambda: up))
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    config = make_config(tune={"num_workers": 2, "slots_per_worker": 2, "gpus_per_worker": 1})
    workers = module.Workers(config, loop_path="unused")
    heard = SimpleNamespace(accepted=[], warned=[], waits=[], begun=[], refuse=None)

    def accept(name, description):
        if heard.refuse is not None:
            raise heard.refuse
        heard.accepted.append((name, description))

    def hear(actor=None, method=None, value=None):
        """Handle all answers so far; before that, answer an actor's newest call of a method, if given."""
        if actor is not None:
            actor.answer(method, value)
        waits, begun = heard.waits.append, heard.begun.append
        workers.hear(accept, lambda *what: heard.warned.append(what), waits, begun)

    return SimpleNamespace(
        workers=workers, actors=actors, now=now, killed=killed, heard=heard, hear=hear
    )
