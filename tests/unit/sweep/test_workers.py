"""How the driver handles its workers' answers, without Ray."""

import pytest
from ray.exceptions import RayTaskError

from higgs_tune.errors import ConfigError, DataError, NoMemoryError, SweepError
from higgs_tune.sweep.workers import GIVE_UP_S, PAUSE_S
from tests.crew import DEAD

CAUSE = SweepError("on node 10.0.0.2 cannot load base and data: RuntimeError: CUDA error: ECC")
BROKEN = RayTaskError("describe", "traceback", CAUSE, ip="10.0.0.2")


def test_every_worker_describes_its_load_and_serves_only_once_accepted(crew):
    crew.hear()
    assert [actor.count("describe") for actor in crew.actors] == [1, 1]
    crew.hear(crew.actors[1], "describe", {"n": 1})
    assert crew.heard.accepted == [("worker-1", {"n": 1})]
    assert [actor.count("serve") for actor in crew.actors] == [0, 1]
    crew.heard.refuse = ConfigError("worker-0: other data")
    crew.actors[0].answer("describe", {"n": 0})
    with pytest.raises(ConfigError, match="worker-0: other data"):
        crew.hear()
    assert crew.actors[0].count("serve") == 0


def test_an_error_while_loading_names_the_worker(crew):
    error = DataError("on node 10.0.0.2: data.path: no such folder")
    crew.actors[1].answer("describe", RayTaskError("describe", "traceback", error, ip="10.0.0.2"))
    with pytest.raises(DataError, match=r"^worker-1 on node 10\.0\.0\.2: data\.path: no such"):
        crew.hear()


def test_a_worker_that_died_is_described_again_before_it_serves(crew):
    actor = crew.actors[1]
    crew.hear(actor, "describe", {"n": 1})
    crew.hear(actor, "serve", DEAD)
    assert (actor.count("describe"), actor.count("serve")) == (2, 1)
    crew.hear(actor, "describe", {"n": 2})
    assert crew.heard.accepted == [("worker-1", {"n": 1}), ("worker-1", {"n": 2})]
    assert actor.count("serve") == 2


def test_a_worker_takes_waiting_trials_once_its_pack_trains_in_this_stage(crew):
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
    crew.hear(crew.actors[1], "serve", DEAD)
    assert crew.workers.rooms() == [2, 2]
    crew.hear(crew.actors[0], "trains", None)
    assert crew.workers.rooms() == [3, 2]
    crew.workers.begin_stage()
    assert crew.workers.rooms() == [2, 2]
    crew.hear()
    assert crew.actors[0].count("trains") == 2
    crew.hear(crew.actors[0], "trains", None)
    assert crew.heard.begun == ["worker-1", "worker-0", "worker-0"]


def test_a_worker_that_dies_before_its_pack_trains_is_asked_again(crew):
    actor = crew.actors[0]
    crew.hear(actor, "describe", {})
    crew.hear(actor, "trains", DEAD)
    crew.hear()
    assert crew.workers.rooms() == [2, 2]
    assert actor.count("trains") == 2
    assert crew.heard.begun == []


def test_a_restarted_worker_that_finds_no_memory_tries_again(crew):
    error = NoMemoryError("on node 10.0.0.2 finds no memory for base and data: MemoryError: full")
    full = RayTaskError("describe", "traceback", error, ip="10.0.0.2")
    actor = crew.actors[1]
    crew.hear(actor, "describe", {"n": 1})
    crew.hear(actor, "serve", DEAD)
    for count in (3, 4):
        crew.hear(actor, "describe", full)
        crew.now[0] += PAUSE_S - 1
        crew.hear()
        assert actor.count("describe") == count - 1
        crew.now[0] += 1
        crew.hear()
        assert actor.count("describe") == count
    (said,) = [text for text in crew.heard.waits if "memory" in text]
    assert said.startswith("worker-1 on node 10.0.0.2 finds no memory for base and data")
    crew.hear(actor, "describe", {"n": 2})
    assert crew.heard.accepted == [("worker-1", {"n": 1}), ("worker-1", {"n": 2})]


def test_a_worker_that_restarts_on_a_bad_machine_is_replaced_while_others_train(crew):
    for actor in crew.actors:
        actor.answer("describe", {})
    crew.hear()
    actor = crew.actors[1]
    crew.hear(actor, "serve", DEAD)
    for count in (1, 2, 3):
        crew.hear(actor, "describe", BROKEN)
        assert crew.killed == [(1, False)] * count
        assert crew.workers.rooms() == [2, 0]  # else trials would be sent to it
        crew.now[0] += GIVE_UP_S
        crew.hear()
    (said,) = [text for text in crew.heard.waits if "cannot load" in text]
    assert said == f"worker-1 {CAUSE}; it tries again every 30 s"
    crew.hear(actor, "describe", {})
    assert crew.workers.serving() == [0, 1]
    assert crew.workers.rooms() == [2, 2]


def test_a_worker_failing_for_long_does_not_end_a_sweep_while_another_restarts(crew):
    well, ill = crew.actors
    for actor in crew.actors:
        actor.answer("describe", {})
    crew.hear()
    crew.hear(ill, "serve", DEAD)
    ill.answer("figures", {})  # its process is there, and loads again each time
    for _ in range(3):
        crew.hear(ill, "describe", BROKEN)
        crew.now[0] += GIVE_UP_S
        crew.hear()
    crew.hear(well, "serve", DEAD)  # Ray replaces it
    crew.hear(ill, "describe", BROKEN)
    assert not any("has been loading" in text for text in crew.heard.waits)
    crew.hear(well, "describe", {})
    assert crew.workers.serving() == [0]


def test_a_sweep_ends_when_no_worker_serves_and_one_fails_to_load_for_long(crew):
    actor = crew.actors[1]
    crew.hear(actor, "describe", {})
    crew.hear(actor, "serve", DEAD)
    crew.hear(actor, "describe", BROKEN)
    crew.now[0] += GIVE_UP_S - 1
    crew.hear()
    crew.hear(actor, "describe", BROKEN)
    crew.now[0] += PAUSE_S
    crew.hear()
    actor.answer("describe", BROKEN)
    with pytest.raises(
        SweepError, match=r"^worker-1 on node 10\.0\.0\.2 cannot load base and data"
    ):
        crew.hear()


def test_a_worker_without_memory_from_the_start_ends_the_sweep(crew):
    error = NoMemoryError("on node 10.0.0.2 finds no memory for base and data: MemoryError: full")
    crew.actors[0].answer("describe", RayTaskError("describe", "traceback", error, ip="10.0.0.2"))
    with pytest.raises(NoMemoryError, match=r"^worker-0 on node 10\.0\.0\.2 finds no memory"):
        crew.hear()


def test_each_warning_is_passed_on_once(crew):
    actor = crew.actors[0]
    crew.hear(actor, "describe", {})
    crew.hear(actor, "serve", ["memory ran out"])
    crew.hear()
    assert crew.heard.warned == [("worker-0", ["memory ran out"])]
    assert actor.count("serve") == 2


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


@pytest.mark.parametrize(("num_accepted", "waited_s"), [(0, 0.0), (1, 5.0)])
def test_the_end_does_not_wait_for_workers_that_never_served(crew, num_accepted, waited_s):
    for actor in crew.actors[:num_accepted]:
        actor.answer("describe", {})
    crew.hear()
    assert crew.workers.last_figures() == {}
    assert crew.now[0] == waited_s
