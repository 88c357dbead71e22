"""The command import-hf: `python -m smart_fairseq.import_hf MODEL_DIR OUT_DIR`.

It turns a Hugging Face folder (BERT, RoBERTa) into a checkpoint for fairseq: convert/importing.py.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smart_fairseq.commands.run import run
from smart_fairseq.convert.config import MODEL_DIR_HOLDS, read_config
from smart_fairseq.errors import refuse
from smart_fairseq.files import check_place


def import_hf(model_dir: Path, out_dir: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Convert ``model_dir`` and write ``out_dir``, completely or not at all.

    Returns what import.json holds, and under "notes" the lines for the user. Raises `UsageError` for a folder that is
    not of the two families, is incomplete or contradicts itself, and for an ``out_dir`` that holds a model.pt already.
    """
    if not model_dir.is_dir():
        refuse(model_dir, "no such folder", MODEL_DIR_HOLDS)
    if out_dir.exists():
        if not out_dir.is_dir():
            refuse(out_dir, "is not a folder", "OUT_DIR must be a folder or not exist")
        if out_dir.samefile(model_dir):
            refuse(out_dir, "is MODEL_DIR itself", "OUT_DIR must be another folder")
        if (out_dir / "model.pt").exists() and not overwrite:
            refuse(out_dir / "model.pt", "exists already", "choose another OUT_DIR or give --overwrite")
    config = read_config(model_dir)
    check_place(out_dir)

    from smart_fairseq.convert.importing import convert_folder  # takes seconds to load

    return convert_folder(model_dir, config, out_dir)


def _main(argv: Sequence[str] | None, prog: str) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description="turn a Hugging Face folder (BERT, RoBERTa) into a checkpoint for fairseq"
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR", type=Path, help="config.json, model.safetensors, vocabulary")
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="folder for model.pt, dict.txt and the BPE files")
    parser.add_argument("--overwrite", action="store_true", help="replace an import that is in OUT_DIR")
    args = parser.parse_args(argv)
    report = import_hf(args.model_dir, args.out_dir, overwrite=args.overwrite)
    for note in (*report["notes"], f"wrote {args.out_dir}; train with"):
        print(f"import_hf: {note}")
    print(" ".join(report["flags"]))
    print("import_hf: or with fairseq-hydra-train and a recipe of examples/")
    print(" ".join(report["overrides"]))


def main(argv: Sequence[str] | None = None, prog: str = "import_hf") -> int:
    """The command; its exit status."""
    return run("import_hf", _main, argv, prog)


if __name__ == "__main__":
    sys.exit(main())
