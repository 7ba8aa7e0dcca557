"""Edits adapters on disk, for runs that start from them."""

import json

from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"


def edit_config(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(adapter, change):
    weights = load_file(adapter / WEIGHTS)
    change(weights)
    save_file(weights, adapter / WEIGHTS, metadata={"format": "pt"})
