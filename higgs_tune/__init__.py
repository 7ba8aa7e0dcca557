"""Find LoRA configurations of Higgs Audio V2 that make text use audio."""

import os

# OpenMP threads that wait for each other must soon release a busy core: beside one busy process, a 0.13 s
# step took 0.47 s (median) and 4.9 s (worst) by default, 0.17 and 0.83 s with this. Read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
