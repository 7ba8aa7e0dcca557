import pytest

from higgs_tune.data.progress import duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.4, "4 s"), (61, "1 min 01 s"), (3 * 3600 + 120, "3 h 02 min")]
)
def test_durations_are_printed_in_readable_units(seconds, text):
    assert duration(seconds) == text
