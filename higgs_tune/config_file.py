"""Settings to and from YAML: reading, overriding, checking, writing."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

import higgs_tune
from higgs_tune.config import SweepConfig
from higgs_tune.config_space import TAGS
from higgs_tune.errors import ConfigError, did_you_mean


def _known_keys(model: type[BaseModel], location: Iterable[Any]) -> list[str]:
    """Field names of the settings at `location`; empty if it does not lead to settings."""
    for part in location:
        field = model.model_fields.get(str(part))
        section = None if field is None else _section(field.annotation)
        if section is None:
            return []
        model = section
    return list(model.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The settings class that a field holds, perhaps as one alternative of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for one in get_args(annotation) if (found := _section(one))), None)


ModelT = TypeVar("ModelT", bound=BaseModel)


def validate(model: type[ModelT], raw: Mapping[str, Any], where: str) -> ModelT:
    """Build `model` from plain data.

    Raises:
        ConfigError: lists every problem on its own line, with the setting's full name.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [_line(model, raw, problem) for problem in _distinct(error.errors())]
        raise ConfigError(f"{where}:\n  " + "\n  ".join(lines)) from None


def _distinct(problems: list[ErrorDetails]) -> list[ErrorDetails]:
    """Drop problems that only follow from others: without its invalid items, a list is too short."""
    return [
        problem
        for problem in problems
        if problem["type"] != "too_short"
        or not any(
            other is not problem and other["loc"][: len(problem["loc"])] == problem["loc"]
            for other in problems
        )
    ]


def _sections_with(model: type[BaseModel], name: str) -> list[str]:
    """The full names of the settings called `name` in the sections of `model`."""
    sections = {key: field.annotation for key, field in model.model_fields.items()}
    return [
        f"{key}.{name}"
        for key, section in sections.items()
        if isinstance(section, type)
        and issubclass(section, BaseModel)
        and name in section.model_fields
    ]


def _place(raw: Any, location: Iterable[str | int]) -> list[str | int]:
    """The path to a value as the user wrote it: without tags, and without the index of a lone value."""
    place: list[str | int] = []
    for part in location:
        is_list = isinstance(raw, list | tuple)
        if part in TAGS or (isinstance(part, int) and not is_list and not isinstance(raw, Mapping)):
            continue
        place.append(part)
        raw = raw[part] if is_list else raw.get(part) if isinstance(raw, Mapping) else None
    return place


def _line(model: type[BaseModel], raw: Mapping[str, Any], problem: ErrorDetails) -> str:
    """Describe one problem: the setting's full name, what was needed, what was found."""
    place = _place(raw, problem["loc"])
    location = ".".join(map(str, place))
    if problem["type"] == "extra_forbidden":
        known = _known_keys(model, place[:-1])
        elsewhere = _sections_with(model, str(place[-1]))
        if elsewhere:
            return f"{location}: unknown setting, did you mean {' or '.join(elsewhere)}?"
        near = did_you_mean(str(place[-1]), known)
        return f"{location}: unknown setting{near or f'; known here: {sorted(known)}'}"
    needed = problem["msg"].removeprefix("Value error, ")
    found = problem["input"]
    if problem["type"] == "tuple_type":
        needed = "Input should be a list" + ("" if isinstance(found, Mapping) else f": [{found}]")
    elif problem["type"] in ("model_type", "dict_type"):
        known = _known_keys(model, place)
        needed = "Input should be a section" + (f" with {', '.join(known)}" if known else "")
    elif problem["type"] == "string_type" and isinstance(found, int | float):
        needed += f": put it in quotes, with --set '{location}=\"…\"'"
    shown = "" if isinstance(found, Mapping | BaseModel) else f" (found {found!r})"
    return f"{location}: {needed}{shown}" if location else f"{needed}{shown}"


_MERGE = "tag:yaml.org,2002:merge"  # may appear several times in a mapping


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, made to refuse a duplicate key instead of silently using the last one.

    It reads dates as text: no setting is one, but a name may look like one.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:timestamp"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Check the mapping as written, before merge keys (`<<`) add keys that it may override."""
        node = super().compose_mapping_node(anchor)
        assert node is not None
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise ConfigError(
                    f"{self.name}, line {line}: {key.value!r} appears twice, first in line "
                    f"{lines[name]}, and only the last would count. Keep one of them."
                )
            lines[name] = line
        return node


def _parse(text: str, where: str) -> Any:
    """Parse a YAML text; a duplicate key raises ConfigError with `where` and the line."""
    loader = _Loader(text)
    loader.name = where
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping without duplicate keys.

    Raises:
        ConfigError: the file is missing or not one; names the file and, if known, the line.
    """
    try:
        raw = _parse(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file. Give an existing YAML file with --config."
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: found a {type(raw).__name__}, needed a mapping of settings.")
    return raw


def apply_overrides(raw: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `raw` with `a.b=value` assignments applied; values are YAML."""
    result = yaml.safe_load(yaml.safe_dump(raw))
    for text in overrides:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise ConfigError(f"--set {text}: found no '='. Write --set section.name=value.")
        node = result
        *parents, leaf = name.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--set {text}: {parent} is a value, not a section.")
        try:
            node[leaf] = _yaml_value(value, f"--set {text}")
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text}: the value is not YAML: {error}") from None
    return result


def _yaml_value(text: str, where: str) -> Any:
    value = _parse(text, where)
    if value == text.strip():  # an unquoted string; YAML 1.1 also reads 1e-4 as one
        try:
            return float(value)
        except ValueError:
            return value
    return value


def load_sweep(path: Path, overrides: Iterable[str] = ()) -> SweepConfig:
    """Read, override and check a sweep's YAML.

    Args:
        path: if there is no such file, `sweeps/NAME.yaml` means the one shipped with the package.

    Raises:
        ConfigError: unreadable file, unknown key (the nearest known one is named) or value out of bounds.
    """
    overrides = list(overrides)
    path = _shipped(path)
    written = read_yaml(path)
    if "trial" in written and "space" not in written:
        raise ConfigError(
            f"{path}: holds one configuration, like best_config.yaml, needed a sweep's YAML. Train it with "
            f"higgs-tune train --config {path}, or give a sweep's, such as the sweep.yaml beside it."
        )
    raw = apply_overrides(written, overrides)
    return validate(SweepConfig, raw, f"{path} with --set" if overrides else str(path))


def _shipped(path: Path) -> Path:
    """The file itself; else the package's or the checkout's file at the same relative path."""
    package = Path(higgs_tune.__file__).parent
    is_ours = path.parent == Path("sweeps")
    copies = (path, package / path, package.parent / path) if is_ours else ()
    return next((copy for copy in copies if copy.exists()), path)


def to_yaml(settings: BaseModel) -> str:
    """YAML that `validate` reads back to an equal object."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
