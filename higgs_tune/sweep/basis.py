"""Whether two workers, or two runs of a sweep, measure with the same base and the same data."""

from collections.abc import Mapping
from typing import Any

from higgs_tune.metrics import base_difference


def difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """What differs, in words; None when nothing does."""
    name = "content_hash"
    if expected[name] != found[name]:
        return f"its dataset has {name} {found[name]}, needed is {expected[name]}"
    return base_difference(expected["metrics"], found["metrics"])
