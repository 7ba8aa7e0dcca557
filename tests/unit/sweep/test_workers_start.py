"""Workers that are missing, load for long or die while loading: what the user is told, and what ends."""

import pytest

from higgs_tune.errors import SweepError
from higgs_tune.sweep.workers import LOADING_S, MAX_DEATHS, PATIENCE_S, PAUSE_S
from tests.crew import DEAD, NOT_INSTALLED


def test_the_user_is_told_once_which_worker_is_missing_and_what_it_needs(crew):
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


def test_the_user_is_told_once_that_a_worker_loads_for_very_long(crew):
    for actor in crew.actors:
        actor.answer("figures", {})
    crew.actors[1].answer("describe", {})
    for now in (LOADING_S - 1, LOADING_S, 2 * LOADING_S):
        crew.now[0] = now
        crew.hear()
    assert crew.heard.waits == ["worker-0 (of 2) has been loading base and data for 15 minutes"]


def test_the_user_is_told_both_that_a_worker_is_missing_and_loads_for_long(crew):
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


def test_a_machine_without_this_package_ends_the_sweep_with_one_line(crew):
    crew.actors[1].answer("describe", NOT_INSTALLED)
    cause = "ModuleNotFoundError: No module named 'higgs_tune'"
    with pytest.raises(SweepError, match=rf"^worker-1 cannot start: {cause}\. Every machine .*$"):
        crew.hear()


def kill_loading(crew, actor):
    """Let a worker's process start, begin to load, and be killed."""
    crew.now[0] += 40.0
    crew.hear(actor, "figures", {})
    crew.hear(actor, "describe", DEAD)


def test_a_worker_that_dies_each_time_it_loads_ends_the_sweep(crew):
    for _ in range(MAX_DEATHS - 1):
        kill_loading(crew, crew.actors[0])
    with pytest.raises(SweepError, match=r"^worker-0 ends each time it loads base and data, .*"):
        kill_loading(crew, crew.actors[0])
    assert not any("worker-0" in text for text in crew.heard.waits)  # its process started each time


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
    crew.hear(actor, "describe", {})
    assert crew.workers.rooms() == [2, 2]


def test_deaths_while_loading_are_forgotten_once_the_worker_serves(crew):
    actor = crew.actors[0]
    for _ in range(3):
        for _ in range(MAX_DEATHS - 1):
            kill_loading(crew, actor)
        crew.hear(actor, "describe", {})
        crew.hear(actor, "serve", DEAD)
    assert crew.workers.rooms() == [2, 2]


def test_an_unreachable_machine_does_not_count_as_a_death(crew):
    for _ in range(2 * MAX_DEATHS):
        for method in ("figures", "describe"):
            crew.actors[0].answer(method, DEAD)
        crew.hear()
    assert crew.workers.rooms() == [2, 2]


def test_the_user_is_told_once_that_a_lost_worker_is_waited_for(crew):
    actor = crew.actors[0]
    actor.answer("describe", {})
    crew.actors[1].answer("figures", {})
    crew.now[0] = 100.0
    crew.hear()
    for second in range(40):  # no call is answered while its node is away
        crew.now[0] = 200.0 + second
        actor.answer("describe" if second else "serve", DEAD)
        crew.hear(actor, "figures", DEAD)
    assert [text[:29] for text in crew.heard.waits] == ["waiting for worker-0 (of 2): "]
