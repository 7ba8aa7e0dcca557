"""What `base.path` names: the embedded base, a local folder or a Hub id. Imports no torch."""

from pathlib import Path

from higgs_tune.config import BaseSettings
from higgs_tune.errors import ConfigError, ModelError

EMBEDDED_BASE = Path(__file__).parent / "embedded" / "base"


def local_folder(settings: BaseSettings) -> Path | None:
    """The checkpoint's folder on this machine, or None for a Hub id.

    Raises:
        ConfigError: a Hub id without a revision.
        ModelError: neither a folder with a config.json nor a Hub id.
    """
    if settings.path == "embedded":
        return EMBEDDED_BASE
    folder = Path(settings.path).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ModelError(f"base.path: {folder} holds no config.json; give a checkpoint folder.")
        return folder
    check_pinned(settings)
    if not could_be_hub_id(settings.path):
        raise ModelError(
            f"base.path: {settings.path} does not exist. Give a local checkpoint folder, "
            "a Hub id (owner/name) with base.revision, or embedded."
        )
    return None


def named_here(path: str) -> str:
    """The given path of an adapter's base, or "embedded" if it is another machine's embedded base."""
    return "embedded" if is_embedded(path) and not Path(path).exists() else path


def is_embedded(path: str) -> bool:
    """Whether a path ends like the embedded base's folder, whose parents differ between machines."""
    return Path(path).parts[-3:] == EMBEDDED_BASE.parts[-3:]


def check_pinned(settings: BaseSettings) -> None:
    """Refuse a Hub id without a revision; accepts any other path, even if only other machines have it.

    Raises:
        ConfigError: the Hub id is not pinned.
    """
    path, here = settings.path, Path(settings.path).expanduser().exists()
    if settings.revision is None and could_be_hub_id(path) and not here:
        raise ConfigError(
            f"base.revision: not set for Hub id {path} (there is no such folder here). Its files were "
            "rewritten in place once; pin the commit that you want."
        )


def could_be_hub_id(path: str) -> bool:
    """Whether a path looks like owner/name."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))
