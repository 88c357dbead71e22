"""`python -m smart_fairseq.export CHECKPOINT OUT.pt`: smart_fairseq/convert/exporting.py."""

import sys

from smart_fairseq.convert.exporting import export, main

__all__ = ["export", "main"]

if __name__ == "__main__":
    sys.exit(main())
