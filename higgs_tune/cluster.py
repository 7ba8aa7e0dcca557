"""Joins an existing Ray cluster, or quietly starts a private one on this machine."""

import logging
import os
import random
import re
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any

import ray
from ray import _raylet
from ray._common.utils import get_default_ray_temp_dir
from ray._private import services
from ray._private.node import Node
from ray._private.utils import get_num_cpus, read_ray_address

# Imported early: at exit, its colorama writes an escape sequence to the standard output it found on import.
# Later that would be a live table's, which shows the sequence as text.
from ray.autoscaler._private import cli_logger  # noqa: F401

import higgs_tune
from higgs_tune.errors import ConfigError

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # half-enabled tokens break `ray start`; the dashboard is on loopback
    "RAY_worker_niceness": "0",  # by default 15: each process that starts would hold packs up for seconds
    "RAY_prestart_worker_first_driver": "0",  # ray.init would wait for two processes, one of them unused
}

# Methods of Ray's Node: those that start what can wait, the dashboard last; and the one that starts the
# raylet, for which all work waits.
DELAYED = ("start_monitor", "start_log_monitor", "start_api_server")
NODE = "start_ray_processes"
VITAL = ("raylet", "gcs_server")  # kinds of its processes

# Ports of Ray's agents: names of parameters, and of files with the chosen ports, which Ray would wait for.
AGENT_PORTS = (
    "dashboard_agent_listen_port",
    "metrics_agent_port",
    "metrics_export_port",
    "runtime_env_agent_port",
)
PORTS = range(20_000, 32_768)  # above Ray's worker ports, below Linux's ephemeral ports
NICENESS = 10  # of the delayed processes
KNOCK_S = 10.0  # timeout of a connection to a head
ADDRESS = re.compile(r"auto|local|[^/\s]+:\d+")  # not Ray Client (ray://), not Ray Jobs (http://)


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster in use."""

    is_own: bool  # started by this process, so no node will ever join it
    complete: Callable[[], str | None]  # starts what is delayed; returns the dashboard's address
    has_died: Callable[[], bool] = lambda: False  # whether our own has, so that nothing answers


@contextmanager
def join_cluster(environment: Mapping[str, str] = ENVIRONMENT) -> Iterator[Cluster]:
    """Join the cluster of RAY_ADDRESS or of this host's head, or else start a local one.

    Args:
        environment: variables for Ray's processes, unless the user has set them.

    Raises:
        ConfigError: RAY_ADDRESS is not a cluster's address, no cluster answers at the address or it has
            other versions, or the path of Ray's temporary folder is too long.
    """
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        yield Cluster(is_own=False, complete=lambda: None)
        return
    address = _address()
    try:
        _check_reachable(address)
        with _staged_start() as (start_rest, has_died):
            context = _connect(address)
    except ConnectionError:
        raise ConfigError(
            f"No Ray cluster answers at {address}. Start it, or set RAY_ADDRESS=local to run on "
            "this machine alone."
        ) from None
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise ConfigError(
            f"The Ray cluster at {address} has other versions: {' '.join(str(error).split())}. Install "
            "the same ones here, or set RAY_ADDRESS=local to run on this machine alone."
        ) from None
    except OSError as error:
        if "AF_UNIX" not in str(error):
            raise
        raise ConfigError(
            f"{get_default_ray_temp_dir()}: this path is too long for Ray's sockets. Set RAY_TMPDIR=/tmp, "
            "or to another short path."
        ) from None
    try:
        if address == "local":
            yield Cluster(is_own=True, complete=start_rest, has_died=has_died)
        else:
            yield Cluster(is_own=False, complete=lambda: context.dashboard_url or None)
    finally:
        ray.shutdown()


@contextmanager
def _staged_start() -> Iterator[tuple[Callable[[], str | None], Callable[[], bool]]]:
    """Let Ray start what the work needs first, and its dashboard and monitors later.

    By default Ray first waits for the dashboard and its agents, and together they keep two CPUs busy.

    Yields:
        A function that starts the rest and returns the dashboard's address, and one that says whether
        Ray's node has died.
    """
    rest: list[Callable[[], None]] = []
    nodes: list[Node] = []
    former = {name: getattr(Node, name) for name in (*DELAYED, NODE)}
    core: Any = _raylet  # untyped

    def later(node: Node, start: Callable[..., None], **settings: Any) -> None:
        rest.append(lambda: start(node, **settings))

    def go_on(node: Node) -> None:
        for name, port in zip(AGENT_PORTS, free_ports(), strict=False):
            setattr(node._ray_params, name, port)
            core.persist_port(node.get_session_dir_path(), node.node_id, name, port)
        former[NODE](node)
        nodes.append(node)

    def start_rest() -> str | None:
        with _low_priority():
            while rest:
                rest.pop(0)()
        return nodes[0].webui_url

    def has_died() -> bool:
        return any(kind in VITAL for kind, _ in nodes[0].dead_processes())

    for name in DELAYED:
        setattr(Node, name, partialmethod(later, former[name]))
    setattr(Node, NODE, go_on)
    try:
        yield start_rest, has_died
    finally:
        for name, method in former.items():
            setattr(Node, name, method)


@contextmanager
def _low_priority() -> Iterator[None]:
    """Run the processes that Ray starts within the block, and their children, at low priority."""
    former = services.start_ray_process
    niceness = max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0))  # only root may lower it

    def start(*args: Any, **settings: Any) -> services.ProcessInfo:
        started = former(*args, **settings)
        os.setpriority(os.PRIO_PROCESS, started.process.pid, niceness)
        return started

    services.start_ray_process = start
    try:
        yield
    finally:
        services.start_ray_process = former


def free_ports() -> Iterator[int]:
    """Free ports of this host, each once, in random order.

    A port is bound only a second later. Ray's `find_free_port` picks from the ports that Linux may give to a
    connection in the meantime.
    """
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        yield port


def starts_own() -> bool:
    """Whether `join_cluster` would start a cluster of this machine alone."""
    return not ray.is_initialized() and _address() == "local"


def _address() -> str:
    """The address of the cluster to join, or "local".

    Raises:
        ConfigError: RAY_ADDRESS is for something else, such as Ray Client, whose Tune runs on the head.
    """
    address = os.environ.get("RAY_ADDRESS") or head_address() or "local"
    if ADDRESS.fullmatch(address) is None:
        raise ConfigError(
            f"RAY_ADDRESS is {address}, needed HOST:PORT of a cluster's head (usually port 6379), "
            "auto or local. Run the command on a machine of that cluster, where it need not be set."
        )
    return address


def head_address() -> str | None:
    """The address of a cluster that `ray start` started on this host; None without one.

    Not Ray's own "auto", which would also join the private cluster of any other process.
    """
    return read_ray_address()


def _check_reachable(address: str) -> None:
    """Raise ConnectionError if nothing listens there; Ray itself would try for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    if not host:  # auto, or a cluster of our own
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_S).close()
    except (OSError, UnicodeError) as error:  # also for a name that does not resolve, or is none
        raise ConnectionError from error


def _connect(address: str) -> Any:
    # Local processes must import this package even from a checkout that is not installed.
    package_root = str(Path(higgs_tune.__file__).parents[1])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    # not include_dashboard=True, with which a dashboard that cannot start would raise an error
    local: dict[str, Any] = {
        "dashboard_host": "127.0.0.1",
        # Ray knows a container's quota, but not a batch job's or a cpuset's CPUs
        "num_cpus": min(get_num_cpus(), len(os.sched_getaffinity(0))),
    }
    return ray.init(
        address=address,
        namespace=f"higgs-tune-{uuid.uuid4().hex[:8]}",
        log_to_driver=False,
        logging_level=logging.ERROR,
        **(local if address == "local" else {}),
    )
