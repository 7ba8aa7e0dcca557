"""tune.slots_per_worker: auto, the number of trials for which a machine has memory."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray._private import utils

from higgs_tune.errors import ConfigError, SweepError
from higgs_tune.sweep import nodes, slots
from higgs_tune.sweep.control import Control
from higgs_tune.sweep.folder import record_slots
from higgs_tune.train import capacity
from tests.crew import NOT_INSTALLED

AUTO = {"slots_per_worker": "auto", "num_workers": 2, "num_trials": 40, "gpus_per_worker": 1}


class FakeRay:
    """One actor that starts and answers at given times; waiting for it advances the clock."""

    def __init__(self):
        self.asked = {}
        self.killed = 0
        self.now = 0.0
        self.starts_at = self.answers_at = 0.0
        self.happens = {}  # time → called when a wait reaches it

    def remote(self, cls):
        assert cls is slots.Counter
        actor = SimpleNamespace(
            __ray_ready__=SimpleNamespace(remote=lambda: "start"),
            count=SimpleNamespace(remote=lambda *args: args),
        )
        return SimpleNamespace(
            options=lambda **asked: (
                self.asked.update(asked) or SimpleNamespace(remote=lambda: actor)
            )
        )

    def wait(self, refs, timeout):
        due = self.starts_at if refs == ["start"] else self.answers_at
        if due > self.now + timeout:
            self.now += timeout
            self.happens.pop(self.now, lambda: None)()
            return [], refs
        self.now = max(self.now, due)
        return refs, []

    def get(self, args):
        return slots.Counter().count(*args)

    def kill(self, actor):
        self.killed += 1


@pytest.fixture
def fake_ray(monkeypatch):
    fake = FakeRay()
    monkeypatch.setattr(slots, "ray", fake)
    monkeypatch.setattr(slots.time, "monotonic", lambda: fake.now)
    up = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}}]
    monkeypatch.setattr(nodes, "ray", SimpleNamespace(nodes=lambda: up))
    return fake


def counts(monkeypatch, number):
    monkeypatch.setattr(slots.Counter, "count", lambda self, config, num_cpus: number)


def resolve(config, control=None, warn=pytest.fail):
    return slots.resolve_slots(config, control or Control(), warn)


def test_auto_counts_on_a_machine_like_a_workers_and_frees_it(make_config, fake_ray, monkeypatch):
    counts(monkeypatch, 5)
    resolved = resolve(make_config(tune=AUTO))
    assert slots.slots_of(resolved) == 5
    assert (fake_ray.asked["num_cpus"], fake_ray.asked["num_gpus"]) == (4, 1)
    assert fake_ray.killed == 1


def test_auto_gives_no_more_slots_than_the_trials_need(make_config, fake_ray, monkeypatch):
    counts(monkeypatch, 99)
    tune = {"slots_per_worker": "auto", "num_workers": 2, "num_trials": 7}
    assert slots.slots_of(resolve(make_config(tune=tune))) == 4


def test_no_room_for_a_single_trial_is_one_clear_error(make_config, fake_ray, monkeypatch):
    counts(monkeypatch, 0)
    with pytest.raises(
        ConfigError, match=r"no memory for a single trial\. Lower train\.token_budget"
    ):
        resolve(make_config(tune={"slots_per_worker": "auto"}))
    assert fake_ray.killed == 1


def test_the_user_is_told_once_which_machine_the_count_waits_for(
    make_config, fake_ray, monkeypatch
):
    counts(monkeypatch, 5)
    said = []
    fake_ray.starts_at = fake_ray.answers_at = 40.0
    config = make_config(tune=AUTO)
    assert slots.slots_of(resolve(config, warn=lambda text: said.append((fake_ray.now, text)))) == 5
    ((when, text),) = said
    assert when == nodes.PATIENCE_S
    assert text.startswith(
        "waiting for a machine on which to determine tune.slots_per_worker: it needs 4 CPU, 1 GPU; "
        "the cluster has 8 CPU, 2 GPU in all"
    )


def test_a_slow_count_on_a_running_machine_gives_no_warning(make_config, fake_ray, monkeypatch):
    counts(monkeypatch, 5)
    fake_ray.starts_at, fake_ray.answers_at = 3.0, 90.0
    assert slots.slots_of(resolve(make_config(tune=AUTO))) == 5


@pytest.mark.parametrize("starts_at", [2.0, 1e9])
def test_ctrl_c_ends_the_wait_for_the_count_within_a_second(make_config, fake_ray, starts_at):
    control, config = Control(), make_config(tune=AUTO)

    def interrupt():
        control.request.number = signal.SIGINT

    fake_ray.starts_at, fake_ray.answers_at = starts_at, 1e9
    fake_ray.happens[7.0] = interrupt
    assert resolve(config, control) is config
    assert fake_ray.now == 7.0
    assert fake_ray.killed == 1


def test_a_count_that_cannot_start_is_one_clear_error(make_config, fake_ray):
    def get(_):
        raise NOT_INSTALLED

    fake_ray.get = get
    with pytest.raises(SweepError, match=r"determines tune\.\S+ cannot start: ModuleNotFoundError"):
        resolve(make_config(tune=AUTO))
    assert fake_ray.killed == 1


@pytest.mark.parametrize(("num_cpus", "share"), [(2, 4), (4, 2), (8, 1)])
def test_workers_on_the_same_host_share_its_memory(make_config, monkeypatch, num_cpus, share):
    node = {"Alive": True, "Resources": {"CPU": 8.0}}
    monkeypatch.setattr(nodes, "ray", SimpleNamespace(nodes=lambda: [node] * 4))
    monkeypatch.setattr(slots, "_free_host_bytes", lambda: 1200)
    monkeypatch.setattr(
        capacity, "slots_on_cpu", lambda config, shape, free_bytes, num_cpus: free_bytes
    )
    tune = {"slots_per_worker": "auto", "num_workers": 4}
    assert slots.Counter().count(make_config(tune=tune), num_cpus) == 1200 // share


def test_the_free_memory_of_the_host_is_less_than_its_total():
    whole = Path("/proc/meminfo").read_text().splitlines()[0]  # MemTotal
    assert 0 < slots._free_host_bytes() < int(whole.split()[1]) * 1024


def test_the_free_memory_is_within_the_limit_of_a_container(monkeypatch):
    monkeypatch.setattr(utils, "get_used_memory", lambda: 2**20)
    monkeypatch.setattr(utils, "get_system_memory", lambda: 2**24)
    assert slots._free_host_bytes() == 2**24 - 2**20


def test_the_number_of_slots_is_recorded_in_the_results_folder(make_config, tmp_path):
    (tmp_path / "env.json").write_text('{"num_cpus": 2}')
    record_slots(tmp_path, make_config(tune={"slots_per_worker": 6}))
    assert json.loads((tmp_path / "env.json").read_text()) == {"num_cpus": 2, "slots_per_worker": 6}
    stored = yaml.safe_load((tmp_path / "sweep.yaml").read_text())
    assert stored["tune"]["slots_per_worker"] == 6
