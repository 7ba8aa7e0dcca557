"""What counts as the same base and the same data."""

import math

import pytest

from higgs_tune.sweep.basis import difference

KNOWN = {"content_hash": "aa", "metrics": {"val/text/nll": 9.0, "val/text/audio_gain": 0.001}}


def found(content_hash: str = "aa", **metrics: float) -> dict[str, object]:
    changed = {f"val/text/{name}": value for name, value in metrics.items()}
    return {"content_hash": content_hash, "metrics": KNOWN["metrics"] | changed}


def test_what_another_device_rounds_is_the_same():
    assert difference(KNOWN, found()) is None
    assert difference(KNOWN, found(nll=9.08, audio_gain=-0.008)) is None


def test_only_losses_that_were_finite_tell_one_base_from_another():
    beside = {"val/audio/nll_per_code": None, "tokens_per_s": 100.0}  # null in base.json
    known = KNOWN | {"metrics": KNOWN["metrics"] | beside}
    assert difference(known, found()) is None


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (found("bb"), "its dataset has content_hash bb, needed is aa"),
        (found(nll=9.2), "its base has val/text/nll 9.2000, needed is 9.0000"),
        (found(nll=math.nan), "its base has val/text/nll nan, needed is 9.0000"),
        (found(audio_gain=0.02), "its base has val/text/audio_gain 0.0200, needed is 0.0010"),
        ({"content_hash": "aa", "metrics": {}}, "its base has val/text/nll nan, needed is 9.0000"),
    ],
)
def test_what_differs_is_said(other, words):
    assert difference(KNOWN, other) == words
