"""fairseq-train's flags for a short fine-tuning of an imported encoder, plain or with SMART + MBPP."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

import smart_fairseq

from ..commands.preprocess import training_flags
from ..data.tasks import Task

__all__ = ["BATCH", "METHODS", "SMART", "flags"]

BATCH = 16

# The paper's radius, 1e-5, moves nothing that could be seen on this encoder: smart_loss stays near 1e-6. At 3e-3 it
# went from 0.0003 to 0.02 beside a task loss of 0.3, at 1e-2 to 0.08. The paper's teacher
# remembers 1 / (1 - 0.999) = 1000 updates, more than these short runs have, and would hold the model where it began.
SMART = (
    *("--smart-weight", "1", "--smart-epsilon", "3e-3", "--smart-step-size", "3e-3", "--smart-noise-std", "3e-4"),
    *("--mbpp-momentum", "0.9", "--mbpp-warmup-momentum", "0.9"),
)
METHODS = {
    "plain": ("--criterion", "sentence_prediction", "--optimizer", "adam"),
    "smart": ("--criterion", "smart_sentence_prediction", "--optimizer", "mbpp", *SMART),
}


def flags(task: Task, data: Path, imported: Path, method: str, seed: int, updates: int) -> list[str]:
    """Every flag; the methods differ in criterion and optimizer alone.

    Args:
        data: the folder that `commands.preprocess` wrote.
        imported: the encoder, as `import_hf` wrote it.
    """
    facts: dict[str, Any] = json.loads((imported / "import.json").read_text(encoding="utf-8"))
    bpe = json.loads((imported / "bpe.json").read_text(encoding="utf-8"))["bpe"]
    # from `fairseq-train DATA --task ...`, what follows from the data
    task_flags = shlex.split(training_flags(task, bpe, {}, data))[2:]
    return [
        *(os.path.relpath(data), "--user-dir", os.path.relpath(Path(smart_fairseq.__file__).parent), *task_flags),
        *("--restore-file", os.path.relpath(imported / "model.pt")),
        *("--reset-optimizer", "--reset-dataloader", "--reset-meters", *facts["flags"], *METHODS[method]),
        *("--lr", "1e-4", "--adam-betas", "(0.9, 0.98)", "--adam-eps", "1e-6", "--weight-decay", "0.1"),
        *("--lr-scheduler", "polynomial_decay", "--warmup-updates", str(updates // 10)),
        *("--total-num-update", str(updates), "--max-update", str(updates), "--clip-norm", "1"),
        *("--dropout", "0.1", "--attention-dropout", "0.1", "--pooler-dropout", "0.1"),
        *("--batch-size", str(BATCH), "--seed", str(seed), "--num-workers", "0"),
        *("--no-epoch-checkpoints", "--no-last-checkpoints", "--no-save-optimizer-state"),
        *("--log-format", "json", "--log-interval", "1", "--cpu"),
    ]
