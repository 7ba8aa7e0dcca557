"""tune.slots_per_worker: a number, or what the machine holds."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from higgs_tune.errors import ConfigError
from higgs_tune.sweep import nodes, slots
from higgs_tune.sweep.folder import record_slots


@pytest.fixture
def fake_ray(monkeypatch):
    """Stands in for Ray: runs the task here, and tells which resources it was given."""
    asked = {}

    def remote(function):
        def options(**resources):
            asked.update(resources)
            return SimpleNamespace(remote=lambda *args: function(*args))

        return SimpleNamespace(options=options)

    fake = SimpleNamespace(remote=remote, get=lambda result: result)
    monkeypatch.setattr(slots, "ray", fake)
    up = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}}]
    monkeypatch.setattr(nodes, "ray", SimpleNamespace(nodes=lambda: up))
    return asked


def counts(monkeypatch, number):
    monkeypatch.setattr(slots, "_count", lambda config, num_cpus: number)


def test_a_number_stays_and_starts_nothing(make_config, fake_ray):
    config = make_config(tune={"slots_per_worker": 3})
    assert slots.resolve_slots(config) is config
    assert slots.slots_of(config) == 3
    assert fake_ray == {}


def test_auto_asks_a_machine_like_the_workers(make_config, fake_ray, monkeypatch):
    counts(monkeypatch, 5)
    tune = {"slots_per_worker": "auto", "num_workers": 2, "num_trials": 40, "gpus_per_worker": 1}
    resolved = slots.resolve_slots(make_config(tune=tune))
    assert slots.slots_of(resolved) == 5
    assert fake_ray == {"num_cpus": 4, "num_gpus": 1}


def test_no_more_slots_than_trials(make_config, fake_ray, monkeypatch):
    counts(monkeypatch, 99)
    tune = {"slots_per_worker": "auto", "num_workers": 2, "num_trials": 7}
    assert slots.slots_of(slots.resolve_slots(make_config(tune=tune))) == 4


def test_no_room_for_a_single_trial_is_one_clear_error(make_config, fake_ray, monkeypatch):
    counts(monkeypatch, 0)
    with pytest.raises(
        ConfigError, match=r"no memory for a single trial\. Lower train\.token_budget"
    ):
        slots.resolve_slots(make_config(tune={"slots_per_worker": "auto"}))


def test_the_free_memory_of_the_host_is_below_its_whole():
    whole = Path("/proc/meminfo").read_text().splitlines()[0]  # MemTotal
    assert 0 < slots._free_host_bytes() < int(whole.split()[1]) * 1024


def test_the_number_is_written_down(make_config, tmp_path):
    (tmp_path / "env.json").write_text('{"num_cpus": 2}')
    record_slots(tmp_path, make_config(tune={"slots_per_worker": 6}))
    assert json.loads((tmp_path / "env.json").read_text()) == {"num_cpus": 2, "slots_per_worker": 6}
    stored = yaml.safe_load((tmp_path / "sweep.yaml").read_text())
    assert stored["tune"]["slots_per_worker"] == 6
