"""Which base is listened to, after which system text: what is given, else what the adapters name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from higgs_tune.base_source import local_folder
from higgs_tune.config import BaseSettings
from higgs_tune.config_file import validate
from higgs_tune.errors import ConfigError, ModelError


def base_for(adapters: Sequence[Path], given: Mapping[str, Any], where: str) -> BaseSettings:
    """The settings that were given, and for the rest those of the adapters' base.

    Without adapters the base is the embedded one by default.

    Args:
        given: fields of `BaseSettings`; a `path` among them is another copy of the adapters' base.
        where: what an error about the settings names.

    Raises:
        ConfigError: the adapters name different bases, or a setting is wrong.
        ModelError: not an adapter of ours, or the base that it names is not here.
    """
    if not adapters:
        return validate(BaseSettings, given, where)
    from higgs_tune.train.checkpoint import read_trial  # torch: seconds to import
    from higgs_tune.train.export import adapter_base

    found: dict[tuple[str, str | None], tuple[Path, BaseSettings]] = {}
    for adapter in adapters:
        read_trial(adapter)  # first: PEFT takes a folder that is not there for a Hub id
        named = adapter_base(adapter, given.get("path"), given.get("revision"), "auto")
        settings = validate(BaseSettings, named.model_dump() | dict(given), where)
        found.setdefault(_place(adapter, settings, is_given="path" in given), (adapter, settings))
    if len(found) > 1:
        names = "; ".join(
            f"{adapter}: {' at '.join(filter(None, place))}"
            for place, (adapter, _) in found.items()
        )
        raise ConfigError(
            f"--adapter: they belong to different bases ({names}). Listen to those of one base at a time, "
            "or say with --base which one they share."
        )
    return next(iter(found.values()))[1]


def system_text_for(adapters: Sequence[Path], given: str | None, base: BaseSettings) -> str | None:
    """What stands before each clip; an empty one that is given is none.

    Without adapters it is that of the adapter that was merged into the base, if one was.

    Raises:
        ConfigError: the adapters were trained after different ones.
        ModelError: not an adapter of ours, or no such base.
    """
    if given is not None:
        return given or None
    from higgs_tune.model.load import locate  # torch: seconds to import
    from higgs_tune.train.checkpoint import read_system_text, read_trial

    if not adapters:
        return read_system_text(locate(base)[1])
    found: dict[str | None, Path] = {}
    for adapter in adapters:
        read_trial(adapter)
        found.setdefault(read_system_text(adapter), adapter)
    if len(found) > 1:
        names = "; ".join(f"{adapter}: {text!r}" for text, adapter in found.items())
        raise ConfigError(
            f"--adapter: they were trained after different system texts ({names}). Say with --system-text "
            "which one all are to be heard after."
        )
    return next(iter(found))


def _place(adapter: Path, settings: BaseSettings, *, is_given: bool) -> tuple[str, str | None]:
    """The base's folder, or Hub id and commit."""
    try:
        folder = local_folder(settings)
    except ModelError as error:
        if is_given:
            raise
        raise ModelError(
            f"{adapter}: the base that it names is not here: {error} Say with --base where it is."
        ) from None
    return (settings.path, settings.revision) if folder is None else (str(folder.resolve()), None)
