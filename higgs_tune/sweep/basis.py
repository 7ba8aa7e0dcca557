"""Whether two workers, or two runs of a sweep, measure with the same base and the same data."""

import math
from collections.abc import Mapping
from typing import Any

# Another kind of GPU rounds otherwise in bfloat16; another base or other clips differ by far more.
TOLERANCE = 0.01  # relative, and in nats


def difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """What differs, in words; None when nothing does."""
    name = "content_hash"
    if expected[name] != found[name]:
        return f"its dataset has {name} {found[name]}, needed is {expected[name]}"
    for metric, value in expected["metrics"].items():
        now = found["metrics"].get(metric, math.nan)
        if not math.isclose(now, value, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            return f"its base has {metric} {now:.4f}, needed is {value:.4f}"
    return None
