"""PyTorch's own rules for a GPU on a machine without one, for shapes without values.

Which attention kernel is chosen, what is one operation and what several, what lies on which device:
PyTorch's CUDA build decides it before it would run a kernel, and for fakes no kernel runs. A preloaded
library, stand_in_gpu.cpp, answers for the driver meanwhile. Nothing here says how long anything takes.
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
    """Build the library in `folder`; returns the environment of a process that is to have it.

    Raises:
        OSError, subprocess.CalledProcessError: no C++ compiler (CXX, or g++), or it failed and has said why.
    """
    library = folder / _LIBRARY
    shared = ["-shared", "-fPIC", f"-Wl,-soname,{_LIBRARY}", f"-I{_HEADERS}"]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    subprocess.run([*compiler, *shared, "-o", str(library), str(_SOURCE)], check=True)
    others = filter(None, [os.environ.get("LD_PRELOAD")])
    return os.environ | {"LD_PRELOAD": ":".join([str(library), *others])}


def take_for_real() -> None:
    """In a process that has the library: let fakes live on "cuda", as `resolve_device` sets it up."""
    torch.cuda.is_available = lambda: False  # else fakes ask the driver for more
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]  # fakes cannot
    torch.backends.cuda.enable_cudnn_sdp(False)


def have_it() -> None:
    """Start this script again with the library if it runs without, and end with its exit code."""
    if _LIBRARY not in os.environ.get("LD_PRELOAD", ""):
        with TemporaryDirectory() as folder:
            again = [sys.executable, *sys.argv]
            try:
                environment = preload(Path(folder))
            except (OSError, subprocess.CalledProcessError) as error:
                raise SystemExit(f"error: needs a C++ compiler (CXX, or g++): {error}") from None
            sys.exit(subprocess.run(again, env=environment).returncode)
    take_for_real()
