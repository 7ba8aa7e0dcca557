"""Set up torch.compile: check for a compiler, and use one cache for all workers and sweeps."""

import os
from pathlib import Path

import torch

from higgs_tune.errors import ConfigError

_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
_MOST_RECOMPILES = 64  # per kind of pack; torch's default is 8


def prepare_compile(device: torch.device) -> None:
    """Check for a compiler, and keep compiled code in a folder of the user's cache.

    `TORCHINDUCTOR_CACHE_DIR` names another folder. Several processes may share one.

    Raises:
        ConfigError: this machine cannot compile for the device.
    """
    from torch._functorch import config as functorch
    from torch._inductor.cpp_builder import get_cpp_compiler  # import takes seconds
    from torch._inductor.exc import InvalidCxxCompiler
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir
    from torch.utils._triton import has_triton

    if device.type == "cuda" and not has_triton():
        raise ConfigError(
            "base.compile: found true, but Triton does not work here, which torch.compile needs on "
            "a GPU. Install triton, use a GPU that it supports, or set base.compile to false."
        )
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ConfigError(
            "base.compile: found true, but no C++ compiler, which torch.compile needs. Install g++, "
            "name one in the environment variable CXX, or set base.compile to false."
        ) from None
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if os.environ.get(_FOLDER, default_cache_dir()) == default_cache_dir():  # torch may have set it
        os.environ[_FOLDER] = str(caches / "higgs-tune" / "inductor")
    # our own autograd Functions are pure; without this, AOTAutograd would not cache graphs that use them
    functorch.autograd_cache_allow_custom_autograd_functions = True
    torch._dynamo.config.recompile_limit = _MOST_RECOMPILES
