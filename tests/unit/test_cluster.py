"""How Ray is joined or started; no test starts it."""

import os
import pty
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import _raylet
from ray._private import ray_constants, utils
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.utils import check_version_info, validate_socket_filepath, write_ray_address

from higgs_tune import cluster
from higgs_tune.errors import ConfigError

ROOT = str(Path(cluster.__file__).parents[1])


@pytest.fixture
def join(tmp_path, monkeypatch):
    """Joins a cluster in an environment; returns cluster, ray.init's arguments and environment."""

    def with_environment(connect=lambda *_: socket.socket(), **variables):
        environment = {"RAY_TMPDIR": str(tmp_path), **variables}
        monkeypatch.setattr(os, "environ", environment)
        given = {}

        def init(**arguments):
            given.update(arguments)
            return SimpleNamespace(dashboard_url="127.0.0.1:8265")

        monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
        monkeypatch.setattr(cluster.ray, "init", init)
        monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
        monkeypatch.setattr(socket, "create_connection", connect)
        starts_own = cluster.starts_own()
        with cluster.join_cluster() as joined:
            assert joined.is_own == starts_own
            return joined, given, environment

    return with_environment


def test_a_cluster_of_ray_start_is_joined_unless_ray_address_is_local(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    assert cluster.head_address() is None
    assert cluster.starts_own()
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379\n")
    assert cluster.head_address() == "10.0.0.1:6379"
    assert not cluster.starts_own()
    monkeypatch.setenv("RAY_ADDRESS", "local")  # takes precedence
    assert cluster.starts_own()


def test_a_cluster_of_ray_start_is_found_in_the_folder_that_ray_uses(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # as in a batch job
    (tmp_path / "ray").mkdir()
    write_ray_address("10.0.0.1:6379")  # as `ray start` does
    assert cluster.head_address() == "10.0.0.1:6379"


def test_ray_that_is_already_initialized_is_used_and_not_shut_down(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: True)
    for name in ("init", "shutdown"):
        monkeypatch.setattr(cluster.ray, name, lambda **_: pytest.fail("it is not ours"))
    assert not cluster.starts_own()
    with cluster.join_cluster(environment={}) as joined:
        assert not joined.is_own


def test_our_own_ray_shows_its_dashboard_on_loopback_only(join):
    joined, given, _ = join()
    assert joined.is_own
    assert (given["address"], given["dashboard_host"]) == ("local", "127.0.0.1")
    assert not given.get("include_dashboard")  # else its failure to start would end a sweep


def test_our_own_ray_has_the_cpus_that_this_process_may_use(join, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})  # as in a batch job
    monkeypatch.setattr(utils, "_get_docker_cpus", lambda: 3.5)
    assert join()[1]["num_cpus"] == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert join()[1]["num_cpus"] == 3
    assert "num_cpus" not in join(RAY_ADDRESS="10.0.0.1:6379")[1]


def test_ray_starts_what_work_needs_first_and_the_rest_on_request(monkeypatch, tmp_path):
    started: list[str] = []
    dead: list[tuple[str, None]] = []
    ports: dict[str, int] = {}

    class Fake:  # calls its methods in the order of Ray's Node
        webui_url = None
        node_id = 28 * "0a"

        def __init__(self):
            self._ray_params = SimpleNamespace(**dict.fromkeys(cluster.AGENT_PORTS, 0))
            self.start_monitor()
            self.start_api_server(include_dashboard=True, raise_on_failure=True)
            self.start_ray_processes()
            started.append("ready")

        def get_session_dir_path(self):
            return str(tmp_path)

        def start_monitor(self):
            started.append("monitor")

        def start_log_monitor(self):
            started.append("log monitor")

        def start_api_server(self, *, include_dashboard, raise_on_failure):
            assert include_dashboard and raise_on_failure
            started.append("dashboard")
            self.webui_url = "127.0.0.1:8265"

        def start_ray_processes(self):
            self.start_log_monitor()
            ports.update(vars(self._ray_params))
            started.append("raylet")

        def dead_processes(self):
            return dead

    methods = dict(vars(Fake))
    monkeypatch.setattr(cluster, "Node", Fake)
    with cluster._staged_start() as (start_rest, has_died):
        Fake()
    assert started == ["raylet", "ready"]
    assert ports.keys() == set(cluster.AGENT_PORTS)
    assert len(set(ports.values())) == len(ports)
    for name, port in ports.items():
        assert port in cluster.PORTS
        assert (tmp_path / f"{name}_{Fake.node_id}").read_text() == str(port)
    assert dict(vars(Fake)) == methods
    for _ in range(2):  # the second time nothing is left to start
        assert start_rest() == "127.0.0.1:8265"
        assert started[2:] == ["monitor", "dashboard", "log monitor"]
    assert not has_died()
    dead.append(("dashboard", None))
    assert not has_died()
    dead.append(("raylet", None))
    assert has_died()


@pytest.mark.parametrize("niceness", [cluster.NICENESS, -5])
def test_deferred_processes_get_a_lower_priority_and_never_a_higher_one(monkeypatch, niceness):
    def process():
        started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        return SimpleNamespace(process=started)

    monkeypatch.setattr(cluster, "NICENESS", niceness)
    monkeypatch.setattr(cluster.services, "start_ray_process", process)
    usual = cluster.services.start_ray_process()
    with cluster._low_priority():
        later = cluster.services.start_ray_process()
    assert cluster.services.start_ray_process is process
    own = os.getpriority(os.PRIO_PROCESS, 0)
    for started, expected in ((usual, own), (later, max(own, niceness))):
        assert os.getpriority(os.PRIO_PROCESS, started.process.pid) == expected
        started.process.kill()
        started.process.wait()


def test_a_port_in_use_is_not_taken(monkeypatch):
    with socket.socket() as taken, socket.socket() as probe:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        probe.bind(("", 0))
        free = probe.getsockname()[1]
        monkeypatch.setattr(cluster, "PORTS", [taken.getsockname()[1], free])
        probe.close()
        assert list(cluster.free_ports()) == [free]


def test_rays_node_has_the_methods_and_ports_that_we_rely_on():
    assert all(callable(getattr(Node, name)) for name in (*cluster.DELAYED, cluster.NODE))
    known = {ray_constants.PROCESS_TYPE_RAYLET, ray_constants.PROCESS_TYPE_GCS_SERVER}
    assert set(cluster.VITAL) == known
    files = {value for name, value in vars(_raylet).items() if name.endswith("_PORT_NAME")}
    assert set(cluster.AGENT_PORTS) == files - {"gcs_server_port"}
    assert set(cluster.AGENT_PORTS) <= vars(RayParams()).keys()


def test_a_joined_cluster_keeps_its_own_dashboard_host(join):
    joined, given, _ = join(RAY_ADDRESS="10.0.0.1:6379")
    assert not joined.is_own
    assert given["address"] == "10.0.0.1:6379"
    assert "dashboard_host" not in given


@pytest.mark.parametrize("address", ["ray://head:10001", "http://127.0.0.1:8265", "head"])
def test_an_address_that_a_driver_cannot_join_is_refused(join, address):
    with pytest.raises(ConfigError, match=rf"^RAY_ADDRESS is {address}, needed HOST:PORT"):
        join(RAY_ADDRESS=address)


@pytest.mark.parametrize("address", ["auto", "[fd00::1]:6379"])
def test_every_form_of_a_heads_address_is_joined(join, address):
    joined, given, _ = join(RAY_ADDRESS=address)
    assert not joined.is_own and given["address"] == address


@pytest.mark.parametrize(
    "error", [socket.gaierror, TimeoutError, ConnectionRefusedError, UnicodeError]
)
def test_a_cluster_that_does_not_answer_is_one_clear_error(join, error):
    def connect(address, timeout):
        assert address == ("fd00::1", 6379) and timeout
        raise error

    with pytest.raises(ConfigError, match=r"^No Ray cluster answers at \[fd00::1\]:6379\. Start"):
        join(connect, RAY_ADDRESS="[fd00::1]:6379")


def test_a_temporary_folder_with_too_long_a_path_is_one_clear_error(monkeypatch):
    folder = f"/scratch/{100 * 'j'}"

    def init(**_):
        validate_socket_filepath(f"{folder}/ray/session/sockets/plasma_store")

    monkeypatch.setattr(os, "environ", {"RAY_ADDRESS": "local", "TMPDIR": folder})
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", init)
    needed = r"^/scratch/j+/ray: this path is too long for Ray's sockets\. Set RAY_TMPDIR=/tmp"
    with pytest.raises(ConfigError, match=needed), cluster.join_cluster():
        pass


def test_a_cluster_of_other_versions_is_one_clear_error(monkeypatch):
    def init(**_):
        check_version_info({"ray_version": "2.9.0", "python_version": "3.9.1"}, "this node")

    monkeypatch.setattr(os, "environ", {"RAY_ADDRESS": "local"})
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", init)
    needed = r"^The Ray cluster at .* has other versions: .*Ray: 2\.9\.0 Python: 3\.9\.1 .*Install the same"
    with pytest.raises(ConfigError, match=needed) as caught, cluster.join_cluster():
        pass
    assert "\n" not in str(caught.value)


def test_auth_mode_is_disabled_unless_the_user_sets_it(join):
    """By default Ray writes a token that `ray start` needs but ray.init with an address does not send."""
    assert join()[2]["RAY_AUTH_MODE"] == "disabled"
    assert join(RAY_AUTH_MODE="token")[2]["RAY_AUTH_MODE"] == "token"


def test_pythonpath_lets_rays_processes_import_this_checkout(join):
    assert join()[2]["PYTHONPATH"] == ROOT
    assert join(PYTHONPATH="/mine")[2]["PYTHONPATH"] == f"{ROOT}{os.pathsep}/mine"


def test_importing_ray_leaves_no_escape_behind_a_terminals_table():
    """At exit, Ray's colorama writes an escape to the stdout of its import; a table shows it as text."""
    code = """
import logging, sys
from contextlib import redirect_stdout
from rich.console import Console
from rich.live import Live
from higgs_tune import cluster
with Live("a table", console=Console(), auto_refresh=False), redirect_stdout(sys.stderr):
    import ray.autoscaler.v2.utils
    logging.getLogger("ray").addHandler(logging.StreamHandler())
"""
    terminal, of_process = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "PYTHONPATH": ROOT}
    subprocess.run(
        [sys.executable, "-c", code],
        stdout=of_process,
        stderr=of_process,
        env=environment,
        check=True,
        timeout=120,
    )
    os.close(of_process)
    shown = os.read(terminal, 4096).decode()
    os.close(terminal)
    assert "a table" in shown
    assert "\033[1m[" not in shown
