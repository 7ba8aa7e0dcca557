"""Recordings of noise with their manifests, and helpers that read what preparing them wrote."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from higgs_tune.data import clips

RATE_HZ = 24000


def speech(seed: int, seconds: float = 0.4, rate_hz: int = RATE_HZ) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * rate_hz)).astype(np.float32)


def make_root(folder: Path, count: int) -> list[dict[str, Any]]:
    """`count` recordings and a row for each."""
    folder.mkdir(exist_ok=True)
    rows = []
    for n in range(count):
        soundfile.write(folder / f"{n}.wav", speech(n), RATE_HZ)
        rows.append({"id": f"c{n}", "path": f"{n}.wav", "text": f"text {n}", "speaker": "s"})
    return rows


def write_manifest(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rejected(out: Path) -> dict[str, str]:
    lines = (out / "rejected.jsonl").read_text().splitlines()
    return {line["id"]: line["reason"] for line in map(json.loads, lines)}


def content(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def spy(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """Collect the lengths of the clips that are encoded; interrupt after `stop_after` of them."""
    seen: list[int] = []
    real = clips.encode_clip

    def watched(codec: Any, wave: np.ndarray, rate_hz: int) -> np.ndarray:
        if len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(len(wave))
        return real(codec, wave, rate_hz)

    monkeypatch.setattr(clips, "encode_clip", watched)
    return seen
