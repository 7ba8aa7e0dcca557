"""Find LoRA configurations of Higgs Audio V2 that make text use audio."""

import os

# Threads that wait for each other must let go of a busy core: beside one busy process, OpenMP's default
# made a 0.13 s step 0.47 s in the median and 4.9 s at worst, this 0.17 and 0.83 s. Read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
