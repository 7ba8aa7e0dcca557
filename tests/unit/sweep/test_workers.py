"""What the driver makes of its workers' answers, without Ray."""

from types import SimpleNamespace

import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError

from higgs_tune.errors import ConfigError, DataError, NoMemoryError, SweepError
from higgs_tune.sweep import member, nodes
from higgs_tune.sweep import workers as module
from higgs_tune.sweep.workers import (
    GIVE_UP_S,
    LOADING_S,
    MAX_DEATHS,
    PATIENCE_S,
    PAUSE_S,
    Workers,
)

DEAD = ActorUnavailableError("its node is gone", None)


class Actor:
    """Notes what it is asked; an answer is there once it stands in `answers`."""

    def __init__(self):
        self.asked = []
        self.answers = {}

    def __getattr__(self, method):
        return SimpleNamespace(remote=lambda *_, **__: self._ask(method))

    def _ask(self, method):
        self.asked.append(method)
        return (self, len(self.asked) - 1)

    def answer(self, method, value):
        """Answer the newest call of that method."""
        newest = max(n for n, asked in enumerate(self.asked) if asked == method)
        self.answers[newest] = value

    def count(self, method):
        return self.asked.count(method)


@pytest.fixture
def crew(make_config, monkeypatch):
    """Two workers and their actors, a clock, and what `hear` was told."""
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
    workers = Workers(config, loop_path="unused")
    heard = SimpleNamespace(accepted=[], warned=[], waits=[], begun=[], refuse=None)

    def accept(name, description):
        if heard.refuse is not None:
            raise heard.refuse
        heard.accepted.append((name, description))

    def hear():
        waits, begun = heard.waits.append, heard.begun.append
        workers.hear(accept, lambda *what: heard.warned.append(what), waits, begun)

    return SimpleNamespace(
        workers=workers, actors=actors, now=now, killed=killed, heard=heard, hear=hear
    )


def test_every_worker_is_described_and_serves_only_once_it_was_accepted(crew):
    crew.hear()
    assert [actor.count("describe") for actor in crew.actors] == [1, 1]
    crew.actors[1].answer("describe", {"n": 1})
    crew.hear()
    assert crew.heard.accepted == [("worker-1", {"n": 1})]
    assert [actor.count("serve") for actor in crew.actors] == [0, 1]
    crew.heard.refuse = ConfigError("worker-0: other data")
    crew.actors[0].answer("describe", {"n": 0})
    with pytest.raises(ConfigError, match="worker-0: other data"):
        crew.hear()
    assert crew.actors[0].count("serve") == 0


def test_what_a_worker_cannot_load_names_it(crew):
    error = DataError("on node 10.0.0.2: data.path: no such folder")
    crew.actors[1].answer("describe", RayTaskError("describe", "traceback", error, ip="10.0.0.2"))
    with pytest.raises(DataError, match=r"^worker-1 on node 10\.0\.0\.2: data\.path: no such"):
        crew.hear()


def test_a_worker_that_died_is_described_again_before_it_serves(crew):
    actor = crew.actors[1]
    actor.answer("describe", {"n": 1})
    crew.hear()
    actor.answer("serve", DEAD)
    crew.hear()
    assert (actor.count("describe"), actor.count("serve")) == (2, 1)
    actor.answer("describe", {"n": 2})
    crew.hear()
    assert crew.heard.accepted == [("worker-1", {"n": 1}), ("worker-1", {"n": 2})]
    assert actor.count("serve") == 2


def test_a_worker_takes_trials_that_wait_once_its_pack_trains_in_this_stage(crew):
    assert crew.workers.rooms() == [2, 2]
    for actor in crew.actors:
        actor.answer("describe", {})
    crew.hear()
    assert crew.workers.rooms() == [2, 2]
    crew.actors[1].answer("trains", None)
    for _ in range(2):
        crew.hear()
        assert crew.workers.rooms() == [2, 3]
    assert crew.heard.begun == ["worker-1"]
    crew.actors[1].answer("serve", DEAD)
    crew.hear()
    assert crew.workers.rooms() == [2, 2]
    crew.actors[0].answer("trains", None)
    crew.hear()
    assert crew.workers.rooms() == [3, 2]
    crew.workers.begin_stage()
    assert crew.workers.rooms() == [2, 2]
    crew.hear()
    assert crew.actors[0].count("trains") == 2
    crew.actors[0].answer("trains", None)
    crew.hear()
    assert crew.heard.begun == ["worker-1", "worker-0", "worker-0"]


def test_a_worker_that_dies_before_its_pack_trains_is_asked_again(crew):
    actor = crew.actors[0]
    actor.answer("describe", {})
    crew.hear()
    actor.answer("trains", DEAD)
    crew.hear()
    crew.hear()
    assert crew.workers.rooms() == [2, 2]
    assert actor.count("trains") == 2
    assert crew.heard.begun == []


def test_a_worker_whose_memory_is_taken_while_it_is_away_tries_again(crew):
    error = NoMemoryError("on node 10.0.0.2 finds no memory for base and data: MemoryError: full")
    full = RayTaskError("describe", "traceback", error, ip="10.0.0.2")
    actor = crew.actors[1]
    actor.answer("describe", {"n": 1})
    crew.hear()
    actor.answer("serve", DEAD)
    crew.hear()
    for count in (3, 4):
        actor.answer("describe", full)
        crew.hear()
        crew.now[0] += PAUSE_S - 1
        crew.hear()
        assert actor.count("describe") == count - 1
        crew.now[0] += 1
        crew.hear()
        assert actor.count("describe") == count
    (said,) = [text for text in crew.heard.waits if "memory" in text]
    assert said.startswith("worker-1 on node 10.0.0.2 finds no memory for base and data")
    actor.answer("describe", {"n": 2})
    crew.hear()
    assert crew.heard.accepted == [("worker-1", {"n": 1}), ("worker-1", {"n": 2})]


def test_a_worker_that_has_trained_and_meets_a_bad_machine_starts_anew_and_the_others_go_on(crew):
    cause = SweepError("on node 10.0.0.2 cannot load base and data: RuntimeError: CUDA error: ECC")
    broken = RayTaskError("describe", "traceback", cause, ip="10.0.0.2")
    for actor in crew.actors:
        actor.answer("describe", {})
    crew.hear()
    actor = crew.actors[1]
    actor.answer("serve", DEAD)
    crew.hear()
    for count in (1, 2, 3):
        actor.answer("describe", broken)
        crew.hear()
        assert crew.killed == [(1, False)] * count
        assert crew.workers.rooms() == [2, 0]  # it would take trials along
        crew.now[0] += GIVE_UP_S
        crew.hear()
    (said,) = [text for text in crew.heard.waits if "cannot load" in text]
    assert said == f"worker-1 {cause}; it tries again every 30 s"
    actor.answer("describe", {})
    crew.hear()
    assert crew.workers.serving() == [0, 1]
    assert crew.workers.rooms() == [2, 2]


def test_a_worker_that_has_failed_for_long_ends_no_sweep_in_which_others_have_just_trained(crew):
    cause = SweepError("on node 10.0.0.2 cannot load base and data: RuntimeError: CUDA error: ECC")
    broken = RayTaskError("describe", "traceback", cause, ip="10.0.0.2")
    well, ill = crew.actors
    for actor in crew.actors:
        actor.answer("describe", {})
    crew.hear()
    ill.answer("serve", DEAD)
    crew.hear()
    ill.answer("figures", {})  # its process is there, and loads anew each time
    for _ in range(3):
        ill.answer("describe", broken)
        crew.hear()
        crew.now[0] += GIVE_UP_S
        crew.hear()
    well.answer("serve", DEAD)  # it is replaced
    crew.hear()
    ill.answer("describe", broken)
    crew.hear()
    assert not any("has been loading" in text for text in crew.heard.waits)
    well.answer("describe", {})
    crew.hear()
    assert crew.workers.serving() == [0]


def test_a_sweep_ends_when_nobody_trains_and_the_last_worker_cannot_load_its_base_for_long(crew):
    cause = SweepError("on node 10.0.0.2 cannot load base and data: RuntimeError: CUDA error: ECC")
    broken = RayTaskError("describe", "traceback", cause, ip="10.0.0.2")
    actor = crew.actors[1]
    actor.answer("describe", {})
    crew.hear()
    actor.answer("serve", DEAD)
    crew.hear()
    actor.answer("describe", broken)
    crew.hear()
    crew.now[0] += GIVE_UP_S - 1
    crew.hear()
    actor.answer("describe", broken)
    crew.hear()
    crew.now[0] += PAUSE_S
    crew.hear()
    actor.answer("describe", broken)
    with pytest.raises(
        SweepError, match=r"^worker-1 on node 10\.0\.0\.2 cannot load base and data"
    ):
        crew.hear()


def test_a_worker_without_memory_from_the_start_ends_the_sweep(crew):
    error = NoMemoryError("on node 10.0.0.2 finds no memory for base and data: MemoryError: full")
    crew.actors[0].answer("describe", RayTaskError("describe", "traceback", error, ip="10.0.0.2"))
    with pytest.raises(NoMemoryError, match=r"^worker-0 on node 10\.0\.0\.2 finds no memory"):
        crew.hear()


def test_each_warning_is_handed_on_once(crew):
    actor = crew.actors[0]
    actor.answer("describe", {})
    crew.hear()
    actor.answer("serve", ["memory ran out"])
    crew.hear()
    crew.hear()
    assert crew.heard.warned == [("worker-0", ["memory ran out"])]
    assert actor.count("serve") == 2


def test_a_person_is_told_once_which_process_is_missing_and_what_it_needs(crew):
    crew.actors[0].answer("figures", {})  # it is there, and loads
    crew.now[0] = PATIENCE_S - 0.1
    crew.hear()
    assert crew.heard.waits == []
    crew.now[0] = PATIENCE_S
    crew.hear()
    crew.hear()
    assert crew.heard.waits == [
        "waiting for worker-1 (of 2): it needs 1 CPU, 1 GPU; the cluster has 2 CPU, 0 GPU in all, "
        "its largest node 2 CPU, 0 GPU"
    ]


def test_a_person_is_told_once_that_a_worker_loads_for_very_long(crew):
    for actor in crew.actors:
        actor.answer("figures", {})
    crew.actors[1].answer("describe", {})
    for now in (LOADING_S - 1, LOADING_S, 2 * LOADING_S):
        crew.now[0] = now
        crew.hear()
    assert crew.heard.waits == ["worker-0 (of 2) has been loading base and data for 15 minutes"]


def test_a_worker_that_came_late_and_loads_for_very_long_is_told_both(crew):
    crew.actors[0].answer("figures", {})
    crew.actors[0].answer("describe", {})
    actor = crew.actors[1]
    crew.now[0] = PATIENCE_S
    crew.hear()
    crew.now[0] = come = 400.0
    actor.answer("figures", {})
    for now in (come, come + LOADING_S - 1, come + LOADING_S, come + 2 * LOADING_S):
        crew.now[0] = now
        crew.hear()
    missing, loading = crew.heard.waits
    assert missing.startswith("waiting for worker-1 (of 2): it needs")
    assert loading == "worker-1 (of 2) has been loading base and data for 15 minutes"


def kill_loading(crew, actor):
    """Its process comes, begins to load, and is killed."""
    crew.now[0] += 40.0
    actor.answer("figures", {})
    crew.hear()
    actor.answer("describe", DEAD)
    crew.hear()


def test_a_worker_that_dies_each_time_it_loads_ends_the_sweep(crew):
    for _ in range(MAX_DEATHS - 1):
        kill_loading(crew, crew.actors[0])
    with pytest.raises(SweepError, match=r"^worker-0 ends each time it loads base and data, .*"):
        kill_loading(crew, crew.actors[0])
    assert not any("worker-0" in text for text in crew.heard.waits)  # it was there each time


def test_a_worker_that_dies_each_time_it_loads_lets_the_others_train(crew):
    crew.actors[1].answer("describe", {})
    actor = crew.actors[0]
    for _ in range(MAX_DEATHS):
        kill_loading(crew, actor)
    assert crew.workers.rooms() == [0, 2]
    for _ in range(3):
        crew.now[0] += PAUSE_S
        kill_loading(crew, actor)
        assert crew.workers.rooms() == [0, 2]
    assert [text[:31] for text in crew.heard.waits] == ["worker-0 ends each time it load"]
    crew.now[0] += PAUSE_S
    crew.hear()
    actor.answer("describe", {})
    crew.hear()
    assert crew.workers.rooms() == [2, 2]


def test_deaths_before_a_worker_served_are_forgotten(crew):
    actor = crew.actors[0]
    for _ in range(3):
        for _ in range(MAX_DEATHS - 1):
            kill_loading(crew, actor)
        actor.answer("describe", {})
        crew.hear()
        actor.answer("serve", DEAD)
        crew.hear()
    assert crew.workers.rooms() == [2, 2]


def test_a_machine_that_is_away_is_no_death(crew):
    for _ in range(2 * MAX_DEATHS):
        for method in ("figures", "describe"):
            crew.actors[0].answer(method, DEAD)
        crew.hear()
    assert crew.workers.rooms() == [2, 2]


def test_a_worker_that_was_taken_away_is_waited_for_and_said_to_be(crew):
    actor = crew.actors[0]
    actor.answer("describe", {})
    crew.actors[1].answer("figures", {})
    crew.now[0] = 100.0
    crew.hear()
    for second in range(40):  # nobody answers while its node is away
        crew.now[0] = 200.0 + second
        actor.answer("describe" if second else "serve", DEAD)
        actor.answer("figures", DEAD)
        crew.hear()
    assert [text[:29] for text in crew.heard.waits] == ["waiting for worker-0 (of 2): "]


def test_a_worker_that_does_not_answer_keeps_its_former_figures(crew):
    for actor in crew.actors:
        actor.answer("describe", {})
        actor.answer("figures", {"wall_s": 1.0})
    crew.hear()
    crew.now[0] = 10.0
    assert crew.workers.poll_figures() == {"worker-0": {"wall_s": 1.0}, "worker-1": {"wall_s": 1.0}}
    crew.actors[0].answer("figures", {"wall_s": 2.0})
    crew.actors[1].answer("figures", DEAD)
    crew.now[0] = 20.0
    assert crew.workers.poll_figures() == {"worker-0": {"wall_s": 2.0}, "worker-1": {"wall_s": 1.0}}
