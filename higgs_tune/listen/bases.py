"""Choose the base and the system text of an evaluation: those given, else those the adapters name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from higgs_tune.base_source import local_folder
from higgs_tune.config import BaseSettings
from higgs_tune.config_file import validate
from higgs_tune.errors import ConfigError, ModelError


def base_for(adapters: Sequence[Path], given: Mapping[str, Any], where: str) -> BaseSettings:
    """The base settings: those given, and for the rest those of the adapters' base.

    Without adapters, the default base is the embedded one.

    Args:
        given: fields of `BaseSettings`; a `path` among them names another copy of the adapters' base.
        where: what errors about the settings start with.

    Raises:
        ConfigError: the adapters name different bases, or a setting is wrong.
        ModelError: a folder is not an adapter of higgs-tune, or the base it names is not on this machine.
    """
    if not adapters:
        return validate(BaseSettings, given, where)
    from higgs_tune.train.checkpoint import read_trial  # torch: seconds to import
    from higgs_tune.train.export import adapter_base

    found: dict[tuple[str, str | None], tuple[Path, BaseSettings]] = {}
    for adapter in adapters:
        read_trial(adapter)  # first, because PEFT takes a missing folder for a Hub id
        named = adapter_base(adapter, given.get("path"), given.get("revision"), "auto")
        settings = validate(BaseSettings, named.model_dump() | dict(given), where)
        found.setdefault(_place(adapter, settings, is_given="path" in given), (adapter, settings))
    if len(found) > 1:
        names = "; ".join(
            f"{adapter}: {' at '.join(filter(None, place))}"
            for place, (adapter, _) in found.items()
        )
        raise ConfigError(
            f"--adapter: the adapters belong to different bases ({names}). Evaluate those of one base at a "
            "time, or give the base that they share with --base."
        )
    return next(iter(found.values()))[1]


def system_text_for(adapters: Sequence[Path], given: str | None, base: BaseSettings) -> str | None:
    """Text of the system turn before each clip: the given one (empty: none), else the adapters'.

    Without adapters, it is that of the adapter that was merged into the base, if any.

    Raises:
        ConfigError: the adapters were trained with different ones.
        ModelError: a folder is not an adapter of higgs-tune, or the base does not exist.
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
            f"--adapter: the adapters were trained with different system texts ({names}). Choose one for "
            "all with --system-text."
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
            f"{adapter}: the base that it names is not on this machine: {error} Give its location with "
            "--base."
        ) from None
    return (settings.path, settings.revision) if folder is None else (str(folder.resolve()), None)
