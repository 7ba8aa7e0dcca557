"""Starts Ray's workers as forks of one process that has imported what Ray and Tune import.

It does not import Ray itself: once loaded, Ray's core draws the ids of tasks and objects from a state, and
forks that shared this state would take each other's objects. Ray runs this file in place of its own
setup_worker.py; it only passes its arguments on to the server.
"""

import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from collections.abc import Sequence

SOCKET = "FORKS_SOCKET"  # environment variable: the socket on which `serve` listens
PRELOADED = (
    "asyncio",
    "fsspec",
    "google.protobuf.json_format",
    "google.protobuf.struct_pb2",
    "higgs_tune.config",
    "jsonschema",
    "msgpack",
    "pandas",
    "psutil",
    "pyarrow.fs",
    "pyarrow.parquet",
    "pydantic.dataclasses",
    "requests",
    "rich.live",
    "tqdm.auto",
    "yaml",
)


def serve(server: socket.socket) -> None:
    """Fork a worker for each request, until standard input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # reaps the workers: nothing waits for them
    while server in select.select([server, sys.stdin], [], [])[0]:
        with server.accept()[0] as connection:
            modules, arguments, environment, folder = json.load(connection.makefile())
        for module in (*PRELOADED, *modules):
            importlib.import_module(module)
        assert "ray" not in sys.modules
        if arguments and os.fork() == 0:
            os.environ.clear()
            os.environ.update(environment)
            os.setpgid(0, 0)  # Ray kills a worker's whole process group
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            server.close()
            work(arguments, folder)


def work(arguments: list[str], folder: str) -> None:
    """Become the worker that setup_worker.py would become."""
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.utils import update_envs
    from ray._private.workers import setup_worker

    os.chdir(folder)
    known, sys.argv = setup_worker.parser.parse_known_args(arguments)
    update_envs(
        RuntimeEnvContext.deserialize(known.serialized_runtime_env_context or "{}").env_vars
    )
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()


def ask(modules: Sequence[str] = (), arguments: Sequence[str] = ()) -> None:
    """Ask the server to import modules, and to fork a worker if there are arguments."""
    with socket.socket(socket.AF_UNIX) as to_server:
        to_server.connect(os.environ[SOCKET])
        request = modules, arguments, dict(os.environ), os.getcwd()
        to_server.sendall(json.dumps(request).encode())


def main() -> None:
    if sys.argv[1] == "serve":
        serve(socket.socket(fileno=int(sys.argv[2])))
        return
    ask(arguments=sys.argv[1:])


if __name__ == "__main__":
    main()
