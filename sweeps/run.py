"""Run a sweep: `python sweeps/run.py --config sweeps/quick.yaml` is the same as `higgs-tune sweep`."""

import sys

from higgs_tune.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
