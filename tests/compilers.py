"""A marker for tests that need a C++ compiler, as torch.compile does on a CPU."""

import os
import shlex
import shutil

import pytest

needs_compiler = pytest.mark.skipif(
    shutil.which(shlex.split(os.environ.get("CXX", "g++"))[0]) is None,
    reason="needs a C++ compiler (CXX, or g++)",
)
