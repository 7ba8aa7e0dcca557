"""Helpers for manifest tests: small manifests, read whole into memory."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from higgs_tune.data.manifest import open_manifest
from higgs_tune.data.rows import ManifestRow, Rejection


@dataclass
class Manifest:
    """All rows and rejections of a manifest, in memory."""

    rows: tuple[ManifestRow, ...]
    rejected: tuple[Rejection, ...]


def read_manifest(
    path: Path, data_root: Path, max_text_chars: int, clips_from_chat: bool = False
) -> Manifest:
    with open_manifest(path, data_root, max_text_chars, clips_from_chat) as table:
        found = Manifest(tuple(table.rows()), tuple(table.rejected()))
        assert (table.num_rows, table.num_rejected()) == (len(found.rows), len(found.rejected))
    return found


def read(path: Path, content: str | bytes, max_text_chars: int = 2000) -> Manifest:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_manifest(path, path.parent, max_text_chars)


def jsonl(tmp_path: Path, *rows: Any) -> Manifest:
    return read(tmp_path / "m.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def reason(manifest: Manifest) -> str:
    assert not manifest.rows
    (rejection,) = manifest.rejected
    return rejection.reason


def chat(*messages: tuple[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]} | fields


SPOKEN = ("assistant", {"type": "audio", "audio_url": "a.wav"})
SPOKEN_BEFORE = ("assistant", {"type": "audio", "audio_url": "b.wav"})
