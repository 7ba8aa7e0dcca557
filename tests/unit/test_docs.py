"""The documentation keeps up with the code: settings, metric names, links."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from higgs_tune import metrics
from higgs_tune.config import RunSettings, SweepConfig
from higgs_tune.data import rows

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def defaults(settings: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(full name, default) of every setting that is not a section."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            yield from defaults(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def plain(value: Any) -> Any:
    """Tuples as lists, as YAML has them."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def test_settings_page_has_every_setting_with_its_default() -> None:
    page = (ROOT / "docs/reference/settings.md").read_text(encoding="utf-8")
    cells = dict(re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", page, re.MULTILINE))
    # YAML 1.1 reads `off` as false, as the settings do.
    shown = {name: yaml.safe_load(text) for name, text in cells.items()}
    shown["space.cross_attention"] = [
        "off" if v is False else v for v in shown["space.cross_attention"]
    ]
    settings = [*defaults(SweepConfig()), *defaults(RunSettings(), "run.")]
    assert shown == {name: plain(value) for name, value in settings}


def test_results_page_has_every_metric() -> None:
    page = (ROOT / "docs/reference/results.md").read_text(encoding="utf-8")
    constants = [value for name, value in vars(metrics).items() if name.isupper()]
    names = [value for value in constants if isinstance(value, str)]
    assert metrics.VAL_TEXT_NLL in names
    assert [name for name in names if f"`{name}`" not in page] == []
    assert [status for status in metrics.STATUSES if f"`{status}`" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_existing_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!\w+:)([^)#]+)", text)
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_data_page_has_every_column_name() -> None:
    page = (ROOT / "docs/howto/data.md").read_text(encoding="utf-8")
    columns = [
        rows.ID,
        rows.PATH,
        rows.TEXT,
        rows.TEXT_FILE,
        rows.SPEAKER,
        rows.LANGUAGE,
        rows.SPLIT,
    ]
    columns += [rows.REF_AUDIO, rows.REF_TEXT, rows.REF_TEXT_FILE]
    assert [name for names in columns for name in names if f"`{name}`" not in page] == []
