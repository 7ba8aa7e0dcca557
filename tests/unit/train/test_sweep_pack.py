"""The training loop of a sweep's worker."""

import numpy as np
import pytest

from higgs_tune.config import SweepConfig
from higgs_tune.data.dataset import Dataset
from higgs_tune.data.shards import Row, write_dataset
from higgs_tune.errors import DataError
from higgs_tune.train.loop import PackLoop
from higgs_tune.train.sweep_pack import sweep_loop
from tests.models import CODEC, random_codes, random_text, tiny_base


def test_data_without_a_row_to_train_on_is_refused_before_any_trial(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    rows = [
        Row(
            id=f"r{n}",
            split="validation" if n % 2 else "train",
            kind="clip",
            speaker=f"s{n // 2 % 2}",
            text=random_text(rng, 4),
            codes=(random_codes(rng, 5 if n % 2 else 30),),
        )
        for n in range(16)
    ]
    write_dataset(tmp_path / "set", rows, CODEC)
    dataset = Dataset.open(str(tmp_path / "set"))

    def load(base, data, limits):
        return PackLoop(tiny_base(), dataset, data, limits)

    monkeypatch.setattr(PackLoop, "load", load)
    for max_frames, skips in ((40, False), (10, True)):
        data = {"path": str(tmp_path / "set"), "num_val_clips": 4, "max_frames": max_frames}
        config = SweepConfig.model_validate({"data": data})
        if skips:
            with pytest.raises(DataError, match="all 8 rows of the train split are skipped"):
                sweep_loop(config, num_slots=1, device="cpu")
        else:
            assert sweep_loop(config, num_slots=1, device="cpu").preflight
