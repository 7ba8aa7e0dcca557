"""A Ray in this process, and commands in processes with a Ray of their own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray._private import ray_constants

from higgs_tune.cluster import ENVIRONMENT
from tests import forks

ROOT = Path(__file__).parents[2]
Start = Callable[..., subprocess.Popen[str]]


@contextmanager
def forked_workers(patch: pytest.MonkeyPatch, folder: str) -> Iterator[None]:
    """Let tests.forks start the workers of a Ray that this process starts."""
    path = os.path.join(folder, "forks")
    patch.setenv(forks.SOCKET, path)
    patch.setattr(ray_constants, "SETUP_WORKER_FILENAME", forks.__file__)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        fd = server.fileno()
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks", "serve", str(fd)],
            cwd=ROOT,
            pass_fds=[fd],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
    with process:
        yield


@pytest.fixture(scope="package")
def local_ray() -> Iterator[None]:
    temp_dir = tempfile.mkdtemp(prefix="ht", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch, forked_workers(patch, temp_dir):
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("FAKE_ROUND_S", "0.03")  # of tests.fake_loop
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=temp_dir,
        )
        yield
        ray.shutdown()
    shutil.rmtree(temp_dir, ignore_errors=True)


@pytest.fixture
def start_process() -> Iterator[Start]:
    """Starts commands; when the test ends, kills those that still run and their children."""
    temp_dir = tempfile.mkdtemp(prefix="ht", dir="/tmp")
    ours = {"RAY_ADDRESS": "local", "RAY_TMPDIR": temp_dir, "PYTHONPATH": str(ROOT)}
    started = []

    def start(*command: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **ours, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # A shell that runs the suite in the background makes its children ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    shutil.rmtree(temp_dir, ignore_errors=True)
