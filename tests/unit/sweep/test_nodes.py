"""How many CPUs a worker asks for, and the messages when no machine has them."""

from types import SimpleNamespace

import pytest

from higgs_tune.errors import ConfigError
from higgs_tune.sweep import nodes

TWO_GPUS = {"num_workers": 2, "gpus_per_worker": 1}


@pytest.fixture
def cluster(monkeypatch):
    """Makes a cluster of nodes, each given by its CPUs and GPUs, and of one dead node."""

    def make(*sizes):
        dead = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}
        alive = [
            {"Alive": True, "Resources": {"CPU": c, "GPU": g} if g else {"CPU": c}}
            for c, g in sizes
        ]
        monkeypatch.setattr(nodes, "ray", SimpleNamespace(nodes=lambda: [dead, *alive]))

    return make


@pytest.mark.parametrize(
    ("sizes", "tune", "expected"),
    [
        ([(8, 0)], {"num_workers": 2}, 4),
        ([(8, 0)], {"num_workers": 3}, 2),
        ([(2, 0)], {"num_workers": 3}, 1),
        ([(16, 4)], {"num_workers": 4, "gpus_per_worker": 1}, 4),
        ([(4, 0), (8, 1), (8, 1)], TWO_GPUS, 8),
        ([(32, 1), (6, 1)], TWO_GPUS, 6),  # one fits on each, so the smaller one decides
        ([(32, 4), (6, 4)], TWO_GPUS, 16),  # both fit on the larger
        ([(16, 2), (16, 2)], {"num_workers": 4, "gpus_per_worker": 1}, 8),
        ([(4, 0), (8, 0), (8, 0)], {"num_workers": 2}, 8),
        ([(4, 0), (8, 0)], {"num_workers": 3}, 4),
    ],
)
def test_a_worker_asks_for_the_most_cpus_with_which_all_can_start(
    make_config, cluster, sizes, tune, expected
):
    cluster(*sizes)
    assert nodes.cpus_of_worker(make_config(tune=tune).tune) == expected


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(4, 0)], 1),  # no node with a GPU is up
        ([(4, 0), (8, 1)], 8),  # one of two: the other will be like it
        ([(0, 1), (8, 1)], 8),  # no worker starts without a CPU
    ],
)
def test_missing_nodes_are_assumed_to_be_like_those_that_are_up(
    make_config, cluster, sizes, expected
):
    cluster(*sizes)
    assert nodes.cpus_of_worker(make_config(tune=TWO_GPUS).tune) == expected


def test_a_given_number_of_cpus_is_kept(make_config, cluster):
    cluster((8, 1))
    assert nodes.cpus_of_worker(make_config(tune={"cpus_per_worker": 3}).tune) == 3


def test_the_message_about_a_missing_worker_names_the_largest_node(cluster):
    cluster((64, 0), (8, 1), (8, 1))
    assert nodes.shortage("worker-0 (of 2)", 10, 1) == (
        "waiting for worker-0 (of 2): it needs 10 CPU, 1 GPU; the cluster has 80 CPU, 2 GPU in all, "
        "its largest node with GPUs 8 CPU, 1 GPU"
    )
    assert nodes.shortage("worker-0 (of 2)", 99, 0).endswith(
        "in all, its largest node 64 CPU, 0 GPU"
    )


def test_without_gpus_anywhere_the_node_with_the_most_cpus_is_named(cluster):
    cluster((4, 0), (2, 0))
    assert nodes.shortage("w", 1, 1).endswith("6 CPU, 0 GPU in all, its largest node 4 CPU, 0 GPU")


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"gpus_per_worker": 1}, r"tune\.num_workers \(1\) × tune\.gpus_per_worker \(1\)"),
        (TWO_GPUS, r"tune\.gpus_per_worker \(1\) is more than this machine has \(0\)"),
        ({"num_workers": 2, "cpus_per_worker": 4}, r"tune\.cpus_per_worker \(4\) is more than"),
        ({"num_workers": 3}, r"tune\.num_workers \(3\) × tune\.cpus_per_worker \(1\)"),
    ],
)
def test_workers_that_this_machine_cannot_hold_are_refused(make_config, cluster, tune, message):
    cluster((2, 0))
    with pytest.raises(ConfigError, match=message):
        nodes.refuse_more_than_here(make_config(tune=tune).tune)


def test_workers_that_this_machine_holds_are_not_refused(make_config, cluster):
    cluster((4, 2))
    nodes.refuse_more_than_here(make_config(tune=TWO_GPUS).tune)


def test_gpus_that_a_sweep_leaves_idle_are_reported(make_config, cluster):
    cluster((4, 0), (8, 2))
    said = nodes.idle_gpus(make_config().tune)
    assert said is not None
    assert said.startswith("there are 2 GPUs here, and this sweep trains on CPUs.")
    assert nodes.idle_gpus(make_config(tune=TWO_GPUS).tune) is None
    cluster((4, 0))
    assert nodes.idle_gpus(make_config().tune) is None


@pytest.mark.parametrize(
    ("sizes", "num_workers", "num_cpus", "expected"),
    [
        ([(8, 0)], 4, 2, 4),
        ([(8, 0)] * 4, 4, 8, 1),
        ([(8, 0)] * 4, 4, 3, 2),
        ([(8, 0), (16, 0)], 9, 4, 4),  # the larger one decides
        ([(64, 0)], 2, 4, 2),
        ([(2, 0)], 3, 4, 3),  # no node with enough CPUs is up
        ([], 3, 4, 3),
    ],
)
def test_as_many_workers_share_a_machine_as_its_cpus_allow(
    cluster, sizes, num_workers, num_cpus, expected
):
    cluster(*sizes)
    assert nodes.most_on_one_node(num_workers, num_cpus) == expected
