"""A trial's status after a validation."""

import math
from typing import Any, cast

import pytest

from higgs_tune.train.progress import Run
from higgs_tune.train.residents import Resident
from tests.models import trial


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_ends_a_trial(loss: float):
    run = Run(Resident("t002", 0, trial(num_steps=20), {}, step=5), order=cast(Any, None))
    finite = {"val/text/nll": 2.0, "train/text/nll": math.nan}  # no text target in its interval
    assert run.outcome(finite, True) == {"status": "running", "reason": ""}
    reason = "val/audio/nll_per_code is not finite"
    found = run.outcome({**finite, "val/audio/nll_per_code": loss}, True)
    assert found == {"status": "diverged", "reason": reason}
