"""Where base and data lie for a worker, whose current folder is not the command's."""

from pathlib import Path

from higgs_tune.config import SweepConfig


def whole_paths(config: SweepConfig) -> SweepConfig:
    """The configuration with whole paths for a base and data that lie here, where the command was typed."""
    base, data = config.base, config.data.model_copy(update={"path": _whole(config.data.path)})
    if base.path != "embedded":  # a name, whatever lies here
        base = base.model_copy(update={"path": _whole(base.path)})
    return config.model_copy(update={"base": base, "data": data})


def _whole(path: str) -> str:
    return str(Path.cwd() / path) if Path(path).exists() else path
