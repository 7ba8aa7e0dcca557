"""Resolves the device that a setting names, and reads its peak memory."""

import os
import resource

import torch

from higgs_tune.errors import ConfigError

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is its former name


def resolve_device(name: str, setting: str) -> torch.device:
    """Resolve a device's name ("auto": the GPU if there is one), and set this process up for it.

    Args:
        setting: the setting's name, for errors.

    Raises:
        ConfigError: no supported device has this name, or it is a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"{setting}: found {name!r}, which names no device that is supported. "
            "Use auto, cpu, cuda or cuda:N."
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{setting}: found {name!r}, but torch sees no GPU. Use auto or cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"{setting}: found {name!r}, but torch sees {torch.cuda.device_count()} GPUs, "
            "counted from 0."
        )
    if device.type == "cuda":
        # Shapes differ by batch, which would fragment memory. torch reads this when the GPU is first used.
        if not any(os.environ.get(name) for name in _ALLOCATOR):
            os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
        # PyTorch prefers cuDNN's SDPA on newer GPUs, but cuDNN plans again for every new shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process so far, in MiB: the GPU's, or else the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB on Linux
