"""An encoder without the words that a task does not have: their rows cost time in every update and are never read."""

from pathlib import Path

import numpy as np
import torch

from ..convert.checkpoint import EMBEDDINGS, LM_HEAD, load_checkpoint
from ..data.bpe import SPECIAL_SYMBOLS
from ..data.lines import located
from ..files import whole_file
from .rows import Source


def cut_checkpoint(checkpoint: Path, source: Source, target: Path) -> None:
    """Write ``target``: the checkpoint with the rows of the folder's words and of <mask>, which fairseq puts last.

    Raises `UsageError` where the embeddings are not those of the data's dictionary.
    """
    state = load_checkpoint(checkpoint)
    model, words = state["model"], source.words()
    size = len(SPECIAL_SYMBOLS) + len((source.folder / "input0" / "dict.txt").read_bytes().splitlines()) + 1
    if EMBEDDINGS not in model or len(model[EMBEDDINGS]) != size:
        there = len(model[EMBEDDINGS]) if EMBEDDINGS in model else "no"
        raise located(checkpoint, f"has {there} embeddings, and the dictionary of {source.folder} {size} symbols")
    rows = torch.from_numpy(np.append(words, size - 1))
    for name in (EMBEDDINGS, LM_HEAD, "encoder.lm_head.bias"):
        if name in model:
            model[name] = model[name][rows]
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as partial, open(partial, "wb") as file:  # which tells why it cannot be written
        torch.save(state, file)
