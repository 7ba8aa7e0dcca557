"""`python -m higgs_tune` is `higgs-tune`."""

import sys

from higgs_tune.cli import main

if __name__ == "__main__":
    sys.exit(main())
