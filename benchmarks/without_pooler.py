"""The demo's encoder without its pooler, which was never trained: a head then starts anew, as RoBERTa's does.

python benchmarks/without_pooler.py .demo/encoder/fairseq .cache/encoder-without-pooler
"""

import argparse
import shutil
from pathlib import Path

import torch


def without_pooler(imported: Path, target: Path) -> Path:
    """Copy what `import-hf` wrote, all but the pooler; the copy's folder."""
    shutil.copytree(imported, target)
    checkpoint = torch.load(target / "model.pt", weights_only=True)
    for name in ("pooler.weight", "pooler.bias"):
        del checkpoint["model"][name]
    torch.save(checkpoint, target / "model.pt")
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("imported", type=Path)
    parser.add_argument("target", type=Path)
    without_pooler(**vars(parser.parse_args()))
