"""Ray: joins the cluster that is there, or starts a private one on this machine, quietly."""

import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

import higgs_tune
from higgs_tune.errors import ConfigError

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # half-on tokens break `ray start`; the dashboard is on loopback
    "RAY_worker_niceness": "0",  # by default a pack yields to each process that starts: seconds
}


@dataclass(frozen=True)
class Cluster:
    """What Ray runs on."""

    dashboard: str | None
    is_own: bool  # started by this process, so nothing will ever be added to it


@contextmanager
def join_cluster(
    environment: Mapping[str, str] = ENVIRONMENT, *, with_dashboard: bool = True
) -> Iterator[Cluster]:
    """Join the cluster of RAY_ADDRESS or of this host's head, or else start a local one.

    Args:
        environment: variables that Ray's processes get, unless the user has set them.
        with_dashboard: of a cluster started here; it costs a processor ten seconds.
    """
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        yield Cluster(None, is_own=False)
        return
    address = _address()
    try:
        context = _connect(address, with_dashboard)
    except ConnectionError:
        raise ConfigError(
            f"No Ray cluster answers at {address}. Start it, or set RAY_ADDRESS=local to run on "
            "this machine alone."
        ) from None
    try:
        yield Cluster(context.dashboard_url or None, is_own=address == "local")
    finally:
        ray.shutdown()


def starts_own() -> bool:
    """Whether `join_cluster` would start a cluster of this machine alone."""
    return not ray.is_initialized() and _address() == "local"


def _address() -> str:
    return os.environ.get("RAY_ADDRESS") or head_address() or "local"


def head_address() -> str | None:
    """Where `ray start` put a cluster on this host.

    Not Ray's own "auto": that also joins the private cluster of any other process it can find.
    """
    noted = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    return noted.read_text().strip() if noted.exists() else None


def _connect(address: str, with_dashboard: bool) -> Any:
    # Local processes must import this package even from a checkout that is not installed.
    package_root = str(Path(higgs_tune.__file__).parents[1])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    local = {"include_dashboard": with_dashboard, "dashboard_host": "127.0.0.1"}
    return ray.init(
        address=address,
        namespace=f"higgs-tune-{uuid.uuid4().hex[:8]}",
        log_to_driver=False,
        logging_level=logging.ERROR,
        **(local if address == "local" else {}),
    )
