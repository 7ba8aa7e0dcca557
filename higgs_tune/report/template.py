"""Fill the templates of the package's HTML pages, which share one style."""

import html
from collections.abc import Mapping
from importlib import resources
from typing import Any


def fill(package: str, parts: Mapping[str, str]) -> str:
    """The package's `page.html` with each `<!--key-->` replaced by its part, and `<!--style-->` filled."""
    style = resources.files("higgs_tune.report").joinpath("style.css").read_text("utf-8")
    page = resources.files(package).joinpath("page.html").read_text("utf-8")
    for key, value in {"style": style, **parts}.items():
        page = page.replace(f"<!--{key}-->", value)
    return page


def escape(value: Any) -> str:
    """A value as HTML text, safe in attributes too."""
    return html.escape(str(value), quote=True)
