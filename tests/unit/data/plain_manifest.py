"""Random manifests, and a plain in-memory reference for what preparing them must give."""

import csv
import hashlib
import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MAX_CHARS = 40
FIELDS = ("id", "path", "text", "speaker", "language", "split", "ref_audio", "ref_text")


Fields = list[dict[str, str | None]]


def random_fields(rng: np.random.Generator) -> Fields:
    """Rows with repeated ids, references to earlier and later rows, and errors. "" is no value."""
    count, num_speakers = int(rng.integers(12, 120)), int(rng.integers(1, 14))
    num_texts, has_split = int(rng.integers(count // 3, 2 * count)), rng.random() < 0.3
    odd = float(rng.choice([0, 0.02, 0.1]))
    rows = []
    for n in range(count):
        row = dict.fromkeys(FIELDS, "") | {
            "id": f"r{n}",
            "path": f"{n}.wav",
            "text": rng.choice(["Satz", "صباح", "صَبـاح", "a\0b"])
            + f" {int(rng.integers(num_texts))}",
            "speaker": f"s{int(rng.integers(num_speakers))}",
        }
        if has_split:
            row["split"] = "dev" if rng.random() < 0.2 else "train"
        if rng.random() < 0.2:
            row["ref_audio"] = f"{int(rng.integers(count + 3))}.wav"
            row["ref_text"] = rng.choice([None, "its own"])
        if rng.random() < 2 * odd:
            row["id"] = f"r{int(rng.integers(count))}"
        if rng.random() < odd:
            row["path"] = f"{int(rng.integers(count))}.wav"
        if rng.random() < odd:
            row |= rng.choice(
                [
                    {"text": ""},
                    {"text": "x" * 50},
                    {"path": ""},
                    {"split": "test"},
                    {"id": ""},
                    {"text": "<|eot_id|>", "language": "de"},
                    {"ref_text": "y" * 41, "ref_audio": "0.wav"},
                ]
            )
        rows.append(row)
    if rng.random() < 0.1:
        rows[-1]["speaker"] = ""
    return rows


def write(path: Path, rows: Fields) -> None:
    """Write a manifest in the format that the path's suffix names."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps({"samples": rows}))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, dialect="excel")
            writer.writeheader()
            writer.writerows(rows)


def read(fields: Fields, first: int) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """The usable rows, as fields of a `ManifestRow`; why each other row is rejected, by its number.

    `first` is the number of the first row.
    """
    rows, reasons = [], {}
    for number, raw in enumerate(fields, start=first):
        if raw["split"] == "test":
            reasons[number] = "split 'test' is not used here: needed train or validation"
        elif not raw["path"]:
            reasons[number] = (
                "has no audio: needed one of the fields path, audio_file, audio_path, "
                "audio_filepath, audio, audio_url, file, file_name, wav, wav_filename, or messages"
            )
        else:
            rows.append(
                {
                    "number": number,
                    "id": raw["id"] or f"row{number:06d}",
                    "split": {"": None, "train": "train", "dev": "validation"}[raw["split"]],
                    "speaker": raw["speaker"],
                    "language": raw["language"] or None,
                    "kind": "clip",
                    "text": raw["text"],
                    "audio": [raw["path"], raw["ref_audio"]] if raw["ref_audio"] else [raw["path"]],
                    "ref_text": (raw["ref_text"] or None) if raw["ref_audio"] else None,
                    "turns": None,
                    "start_index": 0,
                }
            )
    texts = {row["audio"][0]: row["text"] for row in reversed(rows)}
    owners = {row["id"]: row["number"] for row in reversed(rows)}
    for row in rows:
        if len(row["audio"]) == 2 and row["ref_text"] is None:
            row["ref_text"] = texts.get(row["audio"][1])
        reason = _reason(row, owners[row["id"]])
        if reason:
            reasons[row["number"]] = reason
    return [row for row in rows if row["number"] not in reasons], reasons


def _reason(row: dict[str, Any], owner: int) -> str | None:
    if owner != row["number"]:
        return f"id '{row['id']}' is already used by row {owner}; ids must be unique"
    if len(row["audio"]) == 2 and row["ref_text"] is None:
        return (
            "has a reference recording without its text: add ref_transcript, or a separate row "
            "for that recording"
        )
    if len(row["audio"]) == 2 and row["audio"][0] == row["audio"][1]:
        return (
            "has its own recording as its reference, which teaches copying: name another recording of "
            "this speaker, or none to have one drawn"
        )
    for text in [row["text"], row["ref_text"]]:
        if text == "":
            return "text is empty"
        if text is not None and len(text) > MAX_CHARS:
            return f"text has {len(text)} characters, limit is {MAX_CHARS} (max_text_chars)"
        if text is not None and "<|eot_id|>" in text:
            return "text holds the control token <|eot_id|>: remove it"
    return None


def normal(text: str) -> str:
    kept = [
        " " if unicodedata.category(letter)[0] in "PZC" else letter
        for letter in unicodedata.normalize("NFKC", text).casefold()
        if not unicodedata.name(letter, "").startswith(("ARABIC FATHA", "ARABIC TATWEEL"))
    ]
    return "".join("".join(kept).split())


def kin(rows: list[dict[str, Any]], seed: int) -> list[str]:
    """For each row, the text first by hash among all rows that texts and recordings link it to."""
    texts = [normal(row["text"]) for row in rows]
    found = list(texts)
    while True:
        before = list(found)
        for names in (texts, [row["audio"][0] for row in rows]):
            lowest: dict[str, str] = {}
            for name, one in zip(names, found, strict=True):
                lowest[name] = min(lowest.get(name, one), one, key=lambda n: _order(n, seed))
            found = [lowest[name] for name in names]
        if found == before:
            return found


def split(rows: list[dict[str, Any]], fraction: float, seed: int) -> tuple[list[str | None], str]:
    """Each row's split (None: left out) and the rule; raises ValueError if it cannot be split."""
    given = [row["split"] for row in rows]
    if any(given):
        if not all(given):
            raise ValueError("has no split")
        return given, "given by the manifest's split column"
    if fraction == 0:
        return ["train"] * len(rows), "all rows train"
    texts = kin(rows, seed)
    voices = [row["speaker"] for row in rows]
    if len(set(texts)) < 3:
        raise ValueError("different texts of clips, needed at least 3")
    target = max(2, round(fraction * len(rows)))
    drawn = f"drawn with seed {seed} for {fraction:g} of the clips: "
    if "" not in voices and len(set(voices)) >= 5:
        held = _pick(voices, target, seed, at_least=0)
        held = held or {min(set(voices), key=lambda name: (voices.count(name), name))}
        trained = {text for text, voice in zip(texts, voices, strict=True) if voice not in held}
        splits = [
            "train" if voice not in held else None if text in trained else "validation"
            for text, voice in zip(texts, voices, strict=True)
        ]
        held_texts = {t for t, s in zip(texts, splits, strict=True) if s == "validation"}
        if len(held_texts) >= 2 and splits.count(None) <= 0.02 * len(rows):
            return splits, drawn + "no speaker and no text is shared"
    held = _pick(texts, target, seed, at_least=2)
    rule = drawn + "no text is shared, speakers are"
    return ["validation" if text in held else "train" for text in texts], rule


def _order(name: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}\0{name}".encode()).hexdigest()


def _pick(names: list[str], target: int, seed: int, at_least: int) -> set[str]:
    """Pick the names, in hash order, that bring the number of rows nearer to the target."""
    counts, picked, num_rows = Counter(names), set[str](), 0
    for name in sorted(counts, key=lambda n: _order(n, seed)):
        near = abs(num_rows + counts[name] - target) <= abs(num_rows - target) and num_rows < target
        spare = not at_least or len(picked) + 1 < len(counts)
        if spare and (near or len(picked) < at_least):
            picked.add(name)
            num_rows += counts[name]
    return picked


def digest(rows: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> str:
    """The fingerprint of a manifest's content in prepare.json."""
    lines = [json.dumps(one, sort_keys=True).encode() + b"\0" for one in [*rows, *rejected]]
    return hashlib.sha256(b"".join(lines)).hexdigest()


def shard_digest(rows: list[dict[str, Any]], root: Path) -> str:
    """The fingerprint in a shard's record."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row, sort_keys=True).encode())
        for name in row["audio"]:
            path = root / name
            stat = path.stat() if path.is_file() else None
            state = f"{stat.st_size} {stat.st_mtime_ns}" if stat else "unusable"
            found.update(f"\0{state}\0".encode())
    return found.hexdigest()
