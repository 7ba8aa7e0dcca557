"""A small codec, and a dataset prepared with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from higgs_tune.data import encode
from higgs_tune.data.mel_codec import MelRvqCodec, MelRvqCodecConfig
from higgs_tune.data.options import PrepareOptions
from higgs_tune.data.shards import DatasetInfo
from tests.unit.data.recordings import write_manifest


@pytest.fixture(scope="module")
def codec_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small codec of the embedded one's structure, with random weights so that codes vary."""
    folder = tmp_path_factory.mktemp("codec")
    config = MelRvqCodecConfig(num_quantizers=2, codebook_size=16, num_features=8, num_mels=20)
    codec = MelRvqCodec(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        codec.set_filters()
        for name, weight in codec.named_parameters():
            if name in ("projection", "codebooks"):
                weight.normal_(generator=generator)
    codec.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, codec_folder: Path) -> Callable[..., DatasetInfo]:
    """Write a manifest of rows into tmp_path/root and prepare it."""

    def prepare(rows: list[dict[str, Any]], out: str = "out", **options: Any) -> DatasetInfo:
        return encode.prepare(
            write_manifest(tmp_path / "root", rows),
            tmp_path / out,
            codec=str(codec_folder),
            options=PrepareOptions(**({"rows_per_shard": 4} | options)),
        )

    return prepare
