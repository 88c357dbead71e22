"""Accuracy and cross entropy by the annotators' agreement (figure 2 of the paper); --help lists the options."""

import sys
from pathlib import Path

# so that it runs from a checkout without installation
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from smart_fairseq.commands.agreement import main

if __name__ == "__main__":
    sys.exit(main())
