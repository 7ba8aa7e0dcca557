"""The systems that are evaluated: a base, and adapters that are put onto it in turn."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from higgs_tune.data.codec import Codec, weights_digest
from higgs_tune.data.dataset import Dataset
from higgs_tune.errors import DataError
from higgs_tune.model.load import Base
from higgs_tune.report.listening import WEIGHTS

BASE = "base"
RECORDING, REFERENCE = "recording", "reference"  # count as systems in an evaluation's files


@dataclass(frozen=True)
class System:
    """The untouched base, or the base with an adapter."""

    name: str
    adapter: Path | None = None

    def fingerprint(self) -> str | None:
        """SHA-256 of the adapter's weights; None for the base."""
        if self.adapter is None:
            return None
        with (self.adapter / WEIGHTS).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def name_systems(adapters: Sequence[Path]) -> list[System]:
    """The base, then each adapter, named after its folder (or the parent of a folder named `adapter`)."""
    systems = [System(BASE)]
    for adapter in adapters:
        folder = adapter.resolve()
        name = folder.parent.name if folder.name == "adapter" else folder.name
        name = re.sub(r"[^\w.-]+", "-", name) or "adapter"
        taken = {RECORDING, REFERENCE, *(system.name for system in systems)}
        numbered = (name if n == 1 else f"{name}-{n}" for n in count(1))
        systems.append(System(next(one for one in numbered if one not in taken), adapter))
    return systems


def check_codec(codec: Codec, name: str, base: Base) -> None:
    """Refuse a codec whose codes do not fit the base.

    Raises:
        DataError: the number of codebooks, or of codes in each, differs.
    """
    found = (codec.config.num_quantizers, codec.config.codebook_size)
    voc = base.vocabulary
    needed = (voc.num_codebooks, min(voc.stream_bos, voc.stream_eos))
    if found != needed:
        raise DataError(
            f"codec {name}: found {found[0]} codebooks of {found[1]} codes, the base {base.source} needs "
            f"{needed[0]} of {needed[1]}. Give the codec that belongs to the base with --codec."
        )


def check_data_codec(codec: Codec, name: str, dataset: Dataset) -> None:
    """Refuse a codec other than the dataset's; if the dataset does not record one, accept any.

    Raises:
        DataError: the weights differ, so that the same codes sound different.
    """
    recorded, found = dataset.info.codec, weights_digest(codec)
    if recorded.weights_sha256 not in (None, found):
        raise DataError(
            f"codec {name}: its weights are {found[:12]}…, but {dataset.directory} was encoded with "
            f"{recorded.id}, weights {recorded.weights_sha256[:12]}…. Give that codec with --codec, or "
            "prepare the data again with this one."
        )
