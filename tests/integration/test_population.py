"""A population on the embedded base, in a real worker, compared with separate runs."""

import shutil
from pathlib import Path

import pytest
import torch

from higgs_tune.config import SweepConfig, TrialConfig
from higgs_tune.config_file import validate
from higgs_tune.sweep.driver import run_sweep
from higgs_tune.sweep.records import ADAPTER, TrialFiles
from higgs_tune.train.checkpoint import load_state
from higgs_tune.train.sweep_pack import sweep_loop

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.usefixtures("local_ray"),
]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_state(folder).weights


def test_a_copy_equals_its_donor_trained_on_at_the_new_rate(tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    original = TrialFiles.copied

    def copied(self, record, donor_id):
        shutil.copytree(self.folder(donor_id) / ADAPTER, kept)
        original(self, record, donor_id)
        now = weights_of(self.folder(record.trial_id) / ADAPTER)
        assert all(torch.equal(now[name], value) for name, value in weights_of(kept).items())

    monkeypatch.setattr(TrialFiles, "copied", copied)
    config = validate(
        SweepConfig,
        {
            "name": "s",
            "results_dir": str(tmp_path),
            "space": {"rank": [4, 8], "batch_clips": [1]},
            "data": {"num_val_clips": 2},
            "train": {"num_steps": 4, "report_every_steps": 2},
            "tune": {"num_trials": 4, "seed": 3, "scheduler": {"name": "pbt"}},
            "confirm": {"num_configs": 0},
        },
        "test",
    )
    outcome = run_sweep(config, resume=False, command=["test"])
    files = TrialFiles(outcome.results)
    trials = {record.trial_id: record.config for record in files.records("t")}
    (copier,) = (name for name, trial in trials.items() if trial.schedule)
    (change,) = trials[copier].schedule
    donor = trials[change.copied_from]
    assert (trials[copier].rank, trials[copier].targets) == (donor.rank, donor.targets)
    assert change.learning_rate not in (donor.learning_rate, trials[copier].learning_rate)

    # One after the other in a separate pack: the copy from its donor's checkpoint of that time, with
    # the new rate and no schedule; all others from the start.
    rates = {"learning_rate": change.learning_rate, "schedule": ()}
    references: dict[str, tuple[TrialConfig, Path | None]] = {
        name: (trial, None) for name, trial in trials.items()
    }
    references[copier] = (trials[copier].model_copy(update=rates), kept)
    loop = sweep_loop(config, num_slots=1, device="cpu")
    for name, (trial, start) in references.items():
        loop.join(name, trial, start)
        while loop.position(name)[0] < trial.num_steps:
            loop.advance()
        alone = tmp_path / f"{name}-alone"
        alone.mkdir()
        loop.snapshot(name)(alone)
        loop.leave(name)
        ours, expected = weights_of(files.folder(name) / ADAPTER), weights_of(alone)
        largest = max(
            float(value.abs().max()) for key, value in expected.items() if "lora_B" in key
        )
        for key, value in expected.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-2, atol=1e-2 * largest)
