"""Where base and data lie for a worker, whose current folder is not the command's."""

from pathlib import Path

from higgs_tune.config import SweepConfig


def whole_paths(config: SweepConfig) -> SweepConfig:
    """The configuration with whole paths for a base and data that lie here, where the command was typed."""
    base, data = (
        part.model_copy(update={"path": _whole(part.path)}) for part in (config.base, config.data)
    )
    return config.model_copy(update={"base": base, "data": data})


def _whole(path: str) -> str:
    """`embedded` is a base's name, whatever lies here."""
    is_here = path != "embedded" and Path(path).exists()
    return str(Path.cwd() / path) if is_here else path
