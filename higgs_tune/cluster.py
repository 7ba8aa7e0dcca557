"""Ray: joins the cluster that is there, or starts a private one on this machine, quietly."""

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
from ray._private import services
from ray._private.node import Node

# Its colorama ends with an escape to the standard output of its import: later that is a table's, which
# shows it as text.
from ray.autoscaler._private import cli_logger  # noqa: F401

import higgs_tune
from higgs_tune.errors import ConfigError

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # half-on tokens break `ray start`; the dashboard is on loopback
    "RAY_worker_niceness": "0",  # by default a pack yields to each process that starts: seconds
    "RAY_prestart_worker_first_driver": "0",  # ray.init would wait for two processes, one for nobody
}

# Methods of Ray's Node: of what can wait, the last is the dashboard; what all else waits for.
PUT_OFF = ("start_monitor", "start_log_monitor", "start_api_server")
NODE = "start_ray_processes"
VITAL = ("raylet", "gcs_server")  # of its processes

# Of Ray's agents: names of its parameters, and of files with the ports they chose, for which it would wait.
AGENT_PORTS = (
    "dashboard_agent_listen_port",
    "metrics_agent_port",
    "metrics_export_port",
    "runtime_env_agent_port",
)
PORTS = range(20_000, 32_768)  # above Ray's workers', below those that Linux gives to anybody
NICENESS = 10  # of what was put off
KNOCK_S = 10.0  # in which a head takes a connection
ADDRESS = re.compile(r"auto|local|[^/\s]+:\d+")  # not of Ray Client (ray://), nor of jobs (http://)


@dataclass(frozen=True)
class Cluster:
    """What Ray runs on."""

    is_own: bool  # started by this process, so nothing will ever be added to it
    complete: Callable[[], str | None]  # starts what is left of our own; the dashboard's address
    has_died: Callable[[], bool] = lambda: False  # our own, beneath us: nothing answers any more


@contextmanager
def join_cluster(environment: Mapping[str, str] = ENVIRONMENT) -> Iterator[Cluster]:
    """Join the cluster of RAY_ADDRESS or of this host's head, or else start a local one.

    Args:
        environment: variables that Ray's processes get, unless the user has set them.

    Raises:
        ConfigError: RAY_ADDRESS names no cluster, or one that does not answer.
    """
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        yield Cluster(is_own=False, complete=lambda: None)
        return
    address = _address()
    try:
        _knock(address)
        with _in_parts() as (start_rest, has_died):
            context = _connect(address)
    except ConnectionError:
        raise ConfigError(
            f"No Ray cluster answers at {address}. Start it, or set RAY_ADDRESS=local to run on "
            "this machine alone."
        ) from None
    try:
        if address == "local":
            yield Cluster(is_own=True, complete=start_rest, has_died=has_died)
        else:
            yield Cluster(is_own=False, complete=lambda: context.dashboard_url or None)
    finally:
        ray.shutdown()


@contextmanager
def _in_parts() -> Iterator[tuple[Callable[[], str | None], Callable[[], bool]]]:
    """Let Ray start what work needs first, and its dashboard and monitors later.

    It would wait for the dashboard and its agents before all else, and all of them keep both of two
    processors busy.

    Yields:
        What starts the rest, and returns the dashboard's address; and whether Ray's node has died.
    """
    rest: list[Callable[[], None]] = []
    nodes: list[Node] = []
    former = {name: getattr(Node, name) for name in (*PUT_OFF, NODE)}
    core: Any = _raylet  # has no types

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

    for name in PUT_OFF:
        setattr(Node, name, partialmethod(later, former[name]))
    setattr(Node, NODE, go_on)
    try:
        yield start_rest, has_died
    finally:
        for name, method in former.items():
            setattr(Node, name, method)


@contextmanager
def _low_priority() -> Iterator[None]:
    """Processes that Ray starts meanwhile, and those that they start, give way to work."""
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
    """Ports of this host at which nobody listens, each once, in no order.

    Whoever gets one binds it a second later. Ray's `find_free_port` gives one of those that Linux may give
    to a connection until then.
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
    """Where Ray is, or is to start.

    Raises:
        ConfigError: RAY_ADDRESS is for something else, such as Ray Client, whose Tune runs on the head.
    """
    address = os.environ.get("RAY_ADDRESS") or head_address() or "local"
    if ADDRESS.fullmatch(address) is None:
        raise ConfigError(
            f"RAY_ADDRESS is {address}. Needed is HOST:PORT of a cluster's head (port 6379, as a rule), "
            "auto or local. Run the command on a machine of that cluster, where it need not be set."
        )
    return address


def head_address() -> str | None:
    """Where `ray start` put a cluster on this host.

    Not Ray's own "auto": that also joins the private cluster of any other process it can find.
    """
    noted = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    return noted.read_text().strip() if noted.exists() else None


def _knock(address: str) -> None:
    """ConnectionError if nobody listens there: Ray itself would try for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    if not host:  # auto, or a cluster of our own
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_S).close()
    except OSError as error:  # also of a name that does not resolve
        raise ConnectionError from error


def _connect(address: str) -> Any:
    # Local processes must import this package even from a checkout that is not installed.
    package_root = str(Path(higgs_tune.__file__).parents[1])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    # a dashboard that cannot start is no reason to end: so not include_dashboard=True
    local: dict[str, Any] = {"dashboard_host": "127.0.0.1"}
    return ray.init(
        address=address,
        namespace=f"higgs-tune-{uuid.uuid4().hex[:8]}",
        log_to_driver=False,
        logging_level=logging.ERROR,
        **(local if address == "local" else {}),
    )
