"""Where base and data lie: here, or only where the workers are, whose current folder is another."""

from pathlib import Path

from higgs_tune.base_source import local_folder
from higgs_tune.config import SweepConfig
from higgs_tune.data.dataset import dataset_folder
from higgs_tune.data.shards import read_info


def refuse_absent(config: SweepConfig) -> None:
    """Refuse a base or data that is not on this machine; a Hub id is not looked up.

    Raises:
        HiggsTuneError: it is not there, or damaged.
    """
    local_folder(config.base)
    read_info(dataset_folder(config.data.path))


def whole_paths(config: SweepConfig) -> SweepConfig:
    """The configuration with whole paths for a base and data that lie here, where the command was typed."""
    base, data = config.base, config.data.model_copy(update={"path": _whole(config.data.path)})
    if base.path != "embedded":  # a name, whatever lies here
        base = base.model_copy(update={"path": _whole(base.path)})
    return config.model_copy(update={"base": base, "data": data})


def _whole(path: str) -> str:
    return str(Path.cwd() / path) if Path(path).exists() else path
