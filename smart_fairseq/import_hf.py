"""`python -m smart_fairseq.import_hf MODEL_DIR OUT_DIR`: smart_fairseq/convert/importing.py."""

import sys

from smart_fairseq.convert.importing import import_hf, main

__all__ = ["import_hf", "main"]

if __name__ == "__main__":
    sys.exit(main())
