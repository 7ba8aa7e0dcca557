"""Where base and data are: here, or only on the workers' machines. Workers run in another folder."""

from pathlib import Path

from higgs_tune.base_source import local_folder
from higgs_tune.config import SweepConfig
from higgs_tune.data.dataset import dataset_folder
from higgs_tune.data.shards import read_info
from higgs_tune.errors import ConfigError
from higgs_tune.sweep.folder import BASE
from higgs_tune.sweep.records import read_json


def require_local(config: SweepConfig) -> None:
    """Refuse base or data that are not on this machine; a Hub id is not looked up.

    Raises:
        HiggsTuneError: base or data are missing or damaged.
    """
    local_folder(config.base)
    read_info(dataset_folder(config.data.path))


def refuse_other_data(config: SweepConfig) -> None:
    """Refuse to resume with other data than the sweep began with, before sweep.yaml names them.

    Raises:
        ConfigError: the content differs.
    """
    folder = config.results_root.absolute() / config.name
    base = read_json(folder / BASE)
    if base is None:
        return  # no worker has loaded the data yet
    expected = base["content_hash"]
    found = read_info(dataset_folder(config.data.path)).content_hash
    if found != expected:
        raise ConfigError(
            f"{folder}: --resume with other data: {config.data.path} has the content hash {found[:12]}, "
            f"the sweep began with {expected[:12]}. Put that data back, or give --name NAME for a new "
            "sweep."
        )


def absolute_paths(config: SweepConfig) -> SweepConfig:
    """The configuration with absolute paths for base and data if they exist on this machine."""
    base, data = config.base, config.data.model_copy(update={"path": _whole(config.data.path)})
    if base.path != "embedded":  # a name, even if there is a file called so
        base = base.model_copy(update={"path": _whole(base.path)})
    return config.model_copy(update={"base": base, "data": data})


def _whole(path: str) -> str:
    return str(Path.cwd() / path) if Path(path).exists() else path
