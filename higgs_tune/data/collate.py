"""Lay out the examples of a pack of adapters for one forward pass; all indices are made on the host.

Rows are stored in slots (K, T + A): adapter by adapter, text rows before audio rows. Linear layers, norms
and heads read slots directly. Only attention needs sequences, so it gets indices for both directions.
Padding slots and positions map to a row of the same adapter, so that nothing, not even a NaN, crosses from
one adapter to another.

Shape letters: K adapters of this batch, T text slots, A audio slots, N = T + A, R sequences,
L longest sequence, C codebooks, M labelled rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from higgs_tune.data.tokens import IGNORE, Encoded


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to `device`; the host does not wait for the copy."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # copying pageable memory may block until the stream is idle
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class CrossIndex:
    """Indices of the text and audio rows of the adapters that share one cross_attention mode.

    Sequences here are compact: only the audio rows, or only the text rows, of one conversation. Indices
    are local to the J adapters of the mode, which have S conversations in all.
    """

    adapters: tuple[int, ...]  # positions among the K adapters
    adapters_J: Tensor  # the same as a tensor
    audio_from_slot_SA: Tensor  # compact audio sequences ← flat (J, A) slots
    audio_slot_from_seq_JA: Tensor  # (J, A) slots ← flat compact audio sequences
    audio_position_SA: Tensor  # original positions, for RoPE
    text_from_slot_ST: Tensor
    text_slot_from_seq_JT: Tensor
    text_position_ST: Tensor
    sees_audio_ST1A: Tensor  # bool: text row (S, T) may attend to [nothing, audio row ...]


@dataclass(frozen=True, eq=False)
class PackBatch:
    """The rows of K adapters for one forward pass."""

    slots: tuple[int, ...]  # bank rows of the K adapters, ascending
    text_ids_KT: Tensor
    audio_codes_KAC: Tensor
    seq_from_slot_RL: Tensor  # sequences ← flat (K, N) slots
    slot_from_seq_KN: Tensor  # (K, N) slots ← flat (R, L) sequences
    text_rows_KM: Tensor  # labelled text slots, index into T
    text_labels_KM: Tensor  # IGNORE where an adapter has fewer
    audio_rows_KM: Tensor  # labelled audio slots, index into A
    audio_labels_KMC: Tensor
    # each adapter's own counts, without the padding of T, A and M
    num_text_K: tuple[int, ...]
    num_audio_K: tuple[int, ...]
    num_text_labelled_K: tuple[int, ...]
    num_audio_labelled_K: tuple[int, ...]
    cross: dict[str, CrossIndex]  # cross_attention mode → its adapters; no entry for "off"

    def to(self, device: torch.device) -> "PackBatch":
        """Return the batch on `device`; the host does not wait for the copies."""
        if device.type == "cpu":
            return self

        def moved(item: Any) -> Any:
            tensors = {
                field.name: to_device(value, device)
                for field in fields(item)
                if isinstance(value := getattr(item, field.name), Tensor)
            }
            return replace(item, **tensors)

        return replace(moved(self), cross={mode: moved(c) for mode, c in self.cross.items()})


@dataclass(frozen=True)
class TargetCounts:
    """Number of targets of one adapter in a whole optimizer step."""

    text: int
    audio_C: np.ndarray


def count_targets(examples: Sequence[Encoded], num_codebooks: int) -> TargetCounts:
    """Count the targets: text tokens, and audio codes per codebook."""
    audio_C = np.zeros(num_codebooks, dtype=np.int64)
    for example in examples:
        audio_C += (example.audio_labels_AC != IGNORE).sum(axis=0)
    return TargetCounts(sum(int((e.text_labels_L != IGNORE).sum()) for e in examples), audio_C)


def split_micro_batches(examples: Sequence[Encoded], token_budget: int) -> list[list[Encoded]]:
    """Split one step's examples, in order, into micro-batches of at most `token_budget` padded rows.

    A single example over the budget gets a micro-batch of its own.
    """
    batches: list[list[Encoded]] = []
    current: list[Encoded] = []
    for example in examples:
        longest = max([example.num_rows, *(e.num_rows for e in current)])
        if current and longest * (len(current) + 1) > token_budget:
            batches.append(current)
            current = []
        current.append(example)
    if current:
        batches.append(current)
    return batches


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of one adapter: its examples concatenated, text and audio separately."""

    ids: np.ndarray
    codes: np.ndarray
    text_labels: np.ndarray
    audio_labels: np.ndarray
    text_rows: list[np.ndarray]  # positions within each example
    audio_rows: list[np.ndarray]


def _rows(examples: Sequence[Encoded]) -> _Rows:
    text_rows = []
    for example in examples:
        is_text = np.ones(example.num_rows, dtype=bool)
        is_text[example.audio_rows_A] = False
        text_rows.append(np.flatnonzero(is_text))
        if (example.text_labels_L[example.audio_rows_A] != IGNORE).any():
            raise AssertionError(f"{example.key}: a text label is at an audio row")
    return _Rows(
        ids=np.concatenate([e.ids_L[t] for e, t in zip(examples, text_rows, strict=True)]),
        codes=np.concatenate([e.codes_AC for e in examples]),
        text_labels=np.concatenate(
            [e.text_labels_L[t] for e, t in zip(examples, text_rows, strict=True)]
        ),
        audio_labels=np.concatenate([e.audio_labels_AC for e in examples]),
        text_rows=text_rows,
        audio_rows=[e.audio_rows_A for e in examples],
    )


def _stack(arrays: Sequence[np.ndarray], width: int, fill: int | None = None) -> np.ndarray:
    """Stack arrays, padded to `width` with `fill`, or with each one's last element (0 if empty)."""
    out = np.zeros((len(arrays), width, *arrays[0].shape[1:]), dtype=np.int64)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
        row[len(array) :] = fill if fill is not None else (array[-1] if len(array) else 0)
    return out


def collate(
    examples: Mapping[int, Sequence[Encoded]],
    modes: Mapping[int, str] | None = None,
    multiple: int = 1,
) -> PackBatch:
    """Build the batch of one forward pass.

    Args:
        examples: bank slot → the adapter's examples of this micro-batch, at least one each.
        modes: bank slot → cross_attention; absent means "off".
        multiple: T, A and M are padded to a multiple of this, so that fewer shapes occur.
    """
    slots, modes = tuple(sorted(examples)), modes or {}
    rows = [_rows(examples[slot]) for slot in slots]

    def width(arrays: Iterable[np.ndarray]) -> int:
        return -(-max(len(a) for a in arrays) // multiple) * multiple

    num_text, num_audio = width(r.ids for r in rows), width(r.codes for r in rows)
    num_slots = num_text + num_audio
    longest = max(e.num_rows for slot in slots for e in examples[slot])

    seq_from_slot, slot_from_seq = [], []
    sequence = 0
    for k, (slot, row) in enumerate(zip(slots, rows, strict=True)):
        base = k * num_slots
        to_seq = np.full(num_slots, sequence * longest, dtype=np.int64)
        text_at, audio_at = 0, num_text
        for example, text_rows, audio_rows in zip(
            examples[slot], row.text_rows, row.audio_rows, strict=True
        ):
            from_slot = np.empty(example.num_rows, dtype=np.int64)
            from_slot[text_rows] = base + text_at + np.arange(len(text_rows))
            from_slot[audio_rows] = base + audio_at + np.arange(len(audio_rows))
            to_seq[text_at : text_at + len(text_rows)] = sequence * longest + text_rows
            to_seq[audio_at : audio_at + len(audio_rows)] = sequence * longest + audio_rows
            text_at += len(text_rows)
            audio_at += len(audio_rows)
            seq_from_slot.append(np.pad(from_slot, (0, longest - example.num_rows), mode="edge"))
            sequence += 1
        slot_from_seq.append(to_seq)

    text_rows = [np.flatnonzero(r.text_labels != IGNORE) for r in rows]
    audio_rows = [np.flatnonzero((r.audio_labels != IGNORE).any(axis=1)) for r in rows]
    text_labels = [r.text_labels[m] for r, m in zip(rows, text_rows, strict=True)]
    audio_labels = [r.audio_labels[m] for r, m in zip(rows, audio_rows, strict=True)]
    num_text_labelled, num_audio_labelled = width(text_rows), width(audio_rows)
    as_tensor = torch.from_numpy
    return PackBatch(
        slots=slots,
        text_ids_KT=as_tensor(_stack([r.ids for r in rows], num_text)),
        audio_codes_KAC=as_tensor(_stack([r.codes for r in rows], num_audio, fill=0)),
        seq_from_slot_RL=as_tensor(np.stack(seq_from_slot)),
        slot_from_seq_KN=as_tensor(np.stack(slot_from_seq)),
        text_rows_KM=as_tensor(_stack(text_rows, num_text_labelled)),
        text_labels_KM=as_tensor(_stack(text_labels, num_text_labelled, fill=IGNORE)),
        audio_rows_KM=as_tensor(_stack(audio_rows, num_audio_labelled)),
        audio_labels_KMC=as_tensor(_stack(audio_labels, num_audio_labelled, fill=IGNORE)),
        num_text_K=tuple(len(r.ids) for r in rows),
        num_audio_K=tuple(len(r.codes) for r in rows),
        num_text_labelled_K=tuple(map(len, text_rows)),
        num_audio_labelled_K=tuple(map(len, audio_rows)),
        cross={
            mode: _cross_index(
                [k for k, s in enumerate(slots) if modes.get(s, "off") == mode],
                rows,
                num_text,
                num_audio,
            )
            for mode in sorted({modes.get(s, "off") for s in slots} - {"off"})
        },
    )


def _compact(
    adapters: Sequence[int], rows: Sequence[_Rows], name: str, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Compact sequences of one modality: sequence ← slots, slots ← sequences, positions, lengths."""
    parts = [(j, p) for j, k in enumerate(adapters) for p in getattr(rows[k], name)]
    longest = max(1, *(len(p) for _, p in parts))
    from_slot = np.zeros((len(parts), longest), dtype=np.int64)
    position = np.zeros((len(parts), longest), dtype=np.int64)
    to_seq = np.zeros((len(adapters), width), dtype=np.int64)
    at = [0] * len(adapters)
    for s, (j, positions) in enumerate(parts):
        count = len(positions)
        if at[j] == 0:
            to_seq[j, :] = s * longest
        # a sequence without such rows reads some slot of its adapter; at most padding reads it
        first = j * width + min(at[j], width - 1)
        from_slot[s] = first + np.minimum(np.arange(longest), max(count - 1, 0))
        position[s, :count] = positions
        to_seq[j, at[j] : at[j] + count] = s * longest + np.arange(count)
        at[j] += count
    return from_slot, to_seq, position, np.asarray([len(p) for _, p in parts])


def _cross_index(
    adapters: Sequence[int], rows: Sequence[_Rows], num_text: int, num_audio: int
) -> CrossIndex:
    audio = _compact(adapters, rows, "audio_rows", num_audio)
    text = _compact(adapters, rows, "text_rows", num_text)
    is_audio = np.arange(audio[2].shape[1])[None, :] < audio[3][:, None]
    earlier = audio[2][:, None, :] < text[2][:, :, None]
    sees = np.concatenate(
        [np.ones((*text[2].shape, 1), dtype=bool), earlier & is_audio[:, None, :]], axis=2
    )
    as_tensor = torch.from_numpy
    return CrossIndex(
        adapters=tuple(adapters),
        adapters_J=torch.tensor(adapters),
        audio_from_slot_SA=as_tensor(audio[0]),
        audio_slot_from_seq_JA=as_tensor(audio[1]),
        audio_position_SA=as_tensor(audio[2]),
        text_from_slot_ST=as_tensor(text[0]),
        text_slot_from_seq_JT=as_tensor(text[1]),
        text_position_ST=as_tensor(text[2]),
        sees_audio_ST1A=as_tensor(sees),
    )
