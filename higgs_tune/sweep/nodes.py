"""The resources of a Ray cluster's nodes, and how many of them a worker requests."""

from typing import NamedTuple

import ray
from ray.exceptions import RayActorError

from higgs_tune.config import TuneSettings
from higgs_tune.errors import ConfigError

PATIENCE_S = 15.0  # until the user is told that a process has found no node


class Node(NamedTuple):
    """What Ray may allocate on one machine."""

    num_cpus: float
    num_gpus: float


def alive_nodes() -> list[Node]:
    """The nodes that are up."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(each.get("CPU", 0), each.get("GPU", 0)) for each in resources]


def cpus_of_worker(tune: TuneSettings) -> int:
    """CPUs that each worker requests: by default the most with which all can run at once.

    Only nodes with a worker's GPUs count. If too few are up, those to come are assumed to be like them.
    If none is up, it is 1, with which a worker starts on a machine of any size.
    """
    if tune.cpus_per_worker is not None:
        return tune.cpus_per_worker
    gpus = tune.gpus_per_worker
    rooms = [
        (int(node.num_cpus), int(node.num_gpus // gpus) if gpus else tune.num_workers)
        for node in alive_nodes()
        if node.num_cpus >= 1
    ]
    num_placed = min(tune.num_workers, sum(most for _, most in rooms))
    for num_cpus in range(max((have for have, most in rooms if most), default=1), 1, -1):
        if sum(min(most, have // num_cpus) for have, most in rooms) >= num_placed:
            return num_cpus
    return 1


def most_on_one_node(num_workers: int, num_cpus: int) -> int:
    """How many workers without a GPU may share a machine: as many as the largest one has CPUs for.

    If none has CPUs for one yet, all may share.
    """
    largest = max((node.num_cpus for node in alive_nodes()), default=0)
    return min(num_workers, int(largest // num_cpus) or num_workers)


def refuse_more_than_here(tune: TuneSettings) -> None:
    """Raise ConfigError if the cluster, to which nothing will be added, cannot hold the workers."""
    here = _total(alive_nodes())
    for name, each, have in (
        ("gpus_per_worker", tune.gpus_per_worker, here.num_gpus),
        ("cpus_per_worker", cpus_of_worker(tune), here.num_cpus),
    ):
        if tune.num_workers * each > have:
            raise ConfigError(
                f"tune.num_workers ({tune.num_workers}) × tune.{name} ({each}) is more than "
                f"this machine has ({have:g}). Lower one of them."
            )


def idle_gpus(tune: TuneSettings) -> str | None:
    """A warning if the cluster has GPUs but the sweep requests none, else None."""
    num_gpus = _total(alive_nodes()).num_gpus
    if not num_gpus or tune.gpus_per_worker:
        return None
    return (
        f"there are {num_gpus:g} GPUs here, and this sweep trains on CPUs. To use them, set "
        "tune.gpus_per_worker=1 and tune.num_workers."
    )


def shortage(who: str, num_cpus: int, num_gpus: int) -> str:
    """A message that `who` waits for resources, with those that the cluster has."""
    nodes = alive_nodes()
    with_gpus = [node for node in nodes if num_gpus and node.num_gpus]
    largest = max(with_gpus or nodes, default=Node(0, 0))  # none is left if Ray is ending
    return (
        f"waiting for {who}: it needs {num_cpus} CPU, {num_gpus} GPU; "
        f"the cluster has {_amount(_total(nodes))} in all, its largest node "
        f"{'with GPUs ' if with_gpus else ''}{_amount(largest)}"
    )


def cannot_start(error: RayActorError) -> str:
    """A message about a process that ended for good before it did anything."""
    cause = str(error).strip().splitlines()[-1].strip().rstrip(".")
    return (
        f"cannot start: {cause}. Every machine of the cluster needs this package and its "
        "dependencies in the same versions, and enough memory"
    )


def _total(nodes: list[Node]) -> Node:
    return Node(sum(node.num_cpus for node in nodes), sum(node.num_gpus for node in nodes))


def _amount(node: Node) -> str:
    return f"{node.num_cpus:g} CPU, {node.num_gpus:g} GPU"
