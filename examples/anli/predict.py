"""Predictions of checkpoints, as files for submission or by id; --help lists the options, README.md says more."""

import sys
from pathlib import Path

# so that it runs from a checkout without installation
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from smart_fairseq.commands.predict import main

if __name__ == "__main__":
    sys.exit(main())
