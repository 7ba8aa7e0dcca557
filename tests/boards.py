"""Reads TensorBoard's event files."""

import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog


def _read(directory: Path) -> Iterator[Event]:
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def events(directory: Path) -> dict[str, dict[int, float]]:
    """Tag → step → value of the event files, as TensorBoard reads them."""
    found: dict[str, dict[int, float]] = {}
    for event in _read(directory):
        if event.session_log.status == SessionLog.START:  # hides earlier events from its step on
            for tag, steps in found.items():
                found[tag] = {step: value for step, value in steps.items() if step < event.step}
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def count(directory: Path, tag: str) -> int:
    """How many values were written with a tag."""
    return sum(value.tag == tag for event in _read(directory) for value in event.summary.value)


def texts(directory: Path) -> dict[str, str]:
    """Tag → the last text written with it."""
    values = [value for event in _read(directory) for value in event.summary.value]
    return {v.tag: v.tensor.string_val[0].decode() for v in values if v.tensor.string_val}


def plugin_data(directory: Path, plugin: str) -> dict[str, bytes]:
    """Tag → content written for a plugin."""
    values = [value for event in _read(directory) for value in event.summary.value]
    plugins = [(value.tag, value.metadata.plugin_data) for value in values]
    return {tag: data.content for tag, data in plugins if data.plugin_name == plugin}
