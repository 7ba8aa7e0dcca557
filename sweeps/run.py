"""Run a sweep: `python sweeps/run.py --config sweeps/quick.yaml` is `higgs-tune sweep` with it."""

import sys

from higgs_tune.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
