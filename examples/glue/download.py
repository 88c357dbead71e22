"""Fetches the official files, checked and resumable; --help lists the options, README.md says more."""

import sys
from pathlib import Path

# so that it runs from a checkout without installation
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from smart_fairseq.commands.download import glue_main

if __name__ == "__main__":
    sys.exit(glue_main())
