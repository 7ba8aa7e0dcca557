"""Fill a page's template; every page of the package has the same style."""

import html
from collections.abc import Mapping
from importlib import resources
from typing import Any


def fill(package: str, parts: Mapping[str, str]) -> str:
    """The package's `page.html` with `<!--key-->` replaced by each part, and the style inside."""
    style = resources.files("higgs_tune.report").joinpath("style.css").read_text("utf-8")
    page = resources.files(package).joinpath("page.html").read_text("utf-8")
    for key, value in {"style": style, **parts}.items():
        page = page.replace(f"<!--{key}-->", value)
    return page


def escape(value: Any) -> str:
    """Text for HTML, attributes included."""
    return html.escape(str(value), quote=True)
