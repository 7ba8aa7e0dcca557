"""Manifests read whole, for the tests of what is in them."""

from dataclasses import dataclass
from pathlib import Path

from higgs_tune.data.manifest import open_manifest
from higgs_tune.data.rows import ManifestRow, Rejection


@dataclass
class Manifest:
    """What a manifest holds, in memory."""

    rows: tuple[ManifestRow, ...]
    rejected: tuple[Rejection, ...]


def read_manifest(
    path: Path, data_root: Path, max_text_chars: int, clips_from_chat: bool = False
) -> Manifest:
    with open_manifest(path, data_root, max_text_chars, clips_from_chat) as table:
        found = Manifest(tuple(table.rows()), tuple(table.rejected()))
        assert (table.num_rows, table.num_rejected()) == (len(found.rows), len(found.rejected))
    return found
