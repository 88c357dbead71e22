"""Arguments that runs of `--task smart_multitask` share."""

from collections.abc import Sequence
from pathlib import Path

import torch
from toolkit import TINY_MODEL, USER_DIR, saving, train

WHOLE = ["--required-batch-size-multiple", "1"]


def around(criterion: str, max_update: int, validate: bool = False) -> list[str]:
    """What a run on one task and one on several have in common."""
    return [
        *("--init-token", "0", "--separator-token", "2", *TINY_MODEL, "--max-positions", "256"),
        *("--criterion", criterion, "--optimizer", "mbpp", "--lr", "1e-3", "--lr-scheduler", "fixed"),
        *("--batch-size", "4", "--seed", "7", "--cpu", "--max-update", str(max_update), "--num-workers", "0"),
        *("--log-format", "json", "--log-interval", "1", *WHOLE, *(() if validate else ("--disable-validation",))),
    ]


def command(
    data: Path,
    tasks: Sequence[str] | None,
    *flags: str,
    save_dir: Path | None = None,
    max_update: int = 8,
    criterion: str = "smart_sentence_prediction",
    validate: bool = False,
) -> list[str]:
    """Arguments for fairseq-train on a tiny RoBERTa; later flags win over these."""
    chosen = ["--multitask-tasks", ",".join(f"{task}-bin" for task in tasks)] if tasks is not None else []
    return [
        *(str(data), "--user-dir", USER_DIR, "--task", "smart_multitask", *chosen),
        *around(criterion, max_update, validate),
        *saving(save_dir),
        *flags,
    ]


def second_stage(run: Path, data: Path, save_dir: Path, head: str) -> dict[str, torch.Tensor]:
    """The weights after an update of a run on one task that starts from a run on several; it is too small to see."""
    arguments = [
        *(str(data), "--user-dir", USER_DIR, "--task", "sentence_prediction", "--num-classes", "2"),
        *(*around("smart_sentence_prediction", 1), "--lr", "1e-9", "--save-dir", str(save_dir)),
        *("--finetune-from-model", str(run / "checkpoint_last.pt"), "--classification-head-name", head),
    ]
    train(arguments)
    weights: dict[str, torch.Tensor] = torch.load(save_dir / "checkpoint_last.pt")["model"]
    return weights
