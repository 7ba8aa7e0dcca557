"""Where base and data lie for a worker, whose current folder is not the command's."""

from pathlib import Path

from higgs_tune.base_source import could_be_hub_id
from higgs_tune.config import SweepConfig


def whole_paths(config: SweepConfig) -> SweepConfig:
    """The configuration with base and data by whole paths, seen from where the command was typed."""
    base, data = config.base.path, config.data.path
    is_here = Path(base).exists() or not could_be_hub_id(base)
    return config.model_copy(
        update={
            "base": config.base.model_copy(update={"path": _whole(base) if is_here else base}),
            "data": config.data.model_copy(update={"path": _whole(data)}),
        }
    )


def _whole(path: str) -> str:
    """A home folder is each machine's own, and what is embedded has a name."""
    is_name = path.partition(":")[0] == "embedded" or path.startswith("~")
    return path if is_name else str(Path.cwd() / path)
