"""Apply PyTorch's rules for a GPU on a machine without one, to fake tensors (shapes without values).

PyTorch's CUDA build decides which attention kernel is used, what is one operation and what several, and what
is on which device before it runs a kernel; for fake tensors no kernel runs. Meanwhile a preloaded library,
stand_in_gpu.cpp, answers instead of the driver. Nothing here measures how long anything takes.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import triton

_LIBRARY = "libcuda.so.1"
_SOURCE = Path(__file__).with_suffix(".cpp")
_HEADERS = Path(triton.__file__).parent / "backends" / "nvidia" / "include"


def preload(folder: Path) -> dict[str, str]:
    """Build the library in `folder`; returns the environment for a process that preloads it.

    Raises:
        OSError, subprocess.CalledProcessError: no C++ compiler (CXX, or g++), or it failed and printed why.
    """
    library = folder / _LIBRARY
    shared = ["-shared", "-fPIC", f"-Wl,-soname,{_LIBRARY}", f"-I{_HEADERS}"]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    subprocess.run([*compiler, *shared, "-o", str(library), str(_SOURCE)], check=True)
    others = filter(None, [os.environ.get("LD_PRELOAD")])
    return os.environ | {"LD_PRELOAD": ":".join([str(library), *others])}


def enable_fake_cuda() -> None:
    """Let fake tensors be on "cuda", set up as by `resolve_device`; needs the library preloaded."""
    torch.cuda.is_available = lambda: False  # else fake tensors call more of the driver
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]  # fake tensors cannot
    torch.backends.cuda.enable_cudnn_sdp(False)


def ensure_preloaded() -> None:
    """Ensure the library: without it, run this script again with it, and exit with its exit code."""
    if _LIBRARY not in os.environ.get("LD_PRELOAD", ""):
        with TemporaryDirectory() as folder:
            again = [sys.executable, *sys.argv]
            try:
                environment = preload(Path(folder))
            except (OSError, subprocess.CalledProcessError) as error:
                raise SystemExit(f"error: needs a C++ compiler (CXX, or g++): {error}") from None
            sys.exit(subprocess.run(again, env=environment).returncode)
    enable_fake_cuda()
