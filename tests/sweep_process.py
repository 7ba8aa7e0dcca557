"""`python -m tests.sweep_process CONFIG.yaml [--resume]`: a sweep with the fake loop."""

import sys
from pathlib import Path

from higgs_tune.config_file import load_sweep
from higgs_tune.sweep.driver import run_sweep

if __name__ == "__main__":
    outcome = run_sweep(
        load_sweep(Path(sys.argv[1])),
        resume="--resume" in sys.argv,
        command=sys.argv,
        loop_path="tests.fake_loop:FakeLoop",
    )
    sys.exit(outcome.exit_code)
