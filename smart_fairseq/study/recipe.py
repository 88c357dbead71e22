"""fairseq-train's flags for a short fine-tuning of an imported encoder, plain or with SMART + MBPP."""

import argparse
import contextlib
import io
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from ..commands.options import import_report, plugin_flags
from ..commands.preprocess import Data, process, training_flags
from ..data.bpe import find_bpe
from ..data.tasks import Task

Flag = str | int | float | bool | None

BATCH = 16
# what all methods share; a value of None or False leaves a flag out, True stands for a flag without a value
COMMON: dict[str, Flag] = {
    "batch-size": BATCH,
    "required-batch-size-multiple": 1,
    "lr": 1e-4,
    "lr-scheduler": "polynomial_decay",
    "adam-betas": "(0.9, 0.98)",
    "adam-eps": 1e-6,
    "weight-decay": 0.1,
    "clip-norm": 1,
    "dropout": 0.1,
    "attention-dropout": 0.1,
    "pooler-dropout": 0.1,
    "num-workers": 0,
    "cpu": None,  # a GPU where there is one
}
WARMUP = 0.1  # share of the updates
LOG = ("--log-format", "json", "--log-interval", "1")
# where there are several GPUs fairseq would take them all for one run, and a batch from each
ONE_DEVICE = ("--distributed-world-size", "1")

METHODS = {
    "plain": ("--criterion", "sentence_prediction", "--optimizer", "adam"),
    "smart": ("--criterion", "smart_sentence_prediction", "--optimizer", "mbpp"),
}


def as_flags(settings: Mapping[str, Flag]) -> list[str]:
    """The command line of some settings, as fairseq-train names them without the dashes."""
    line: list[str] = []
    for name, value in settings.items():
        if value is not None and value is not False:
            line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line


def length_flags(updates: int, warmup: float = WARMUP, scheduler: Flag = COMMON["lr-scheduler"]) -> list[str]:
    """Updates, and the learning rate's schedule over them."""
    flags = ["--max-update", str(updates), "--warmup-updates", str(int(warmup * updates))]
    return [*flags, "--total-num-update", str(updates)] if scheduler == "polynomial_decay" else flags


def encoder_flags(checkpoint: Path) -> list[str]:
    """Begin with these weights, and nothing else of the checkpoint."""
    start = ["--restore-file", os.path.relpath(checkpoint)]
    return [*start, "--reset-optimizer", "--reset-dataloader", "--reset-meters"]


def prepare(data: Data, target: Path, imported: Path, max_tokens: int) -> None:
    """Write a data folder for an encoder from `import_hf`, and print nothing.

    What preprocess says at its end is a command without the encoder and the plugin.
    """
    settings = argparse.Namespace(workers=1, max_tokens=max_tokens, subsample=None, seed=1)
    with contextlib.redirect_stdout(io.StringIO()):
        process(data, target, find_bpe(None, imported), settings)


def flags(task: Task, data: Path, imported: Path, method: str, seed: int, updates: int) -> list[str]:
    """Every flag; the methods differ in criterion and optimizer alone. ``imported``: the encoder, from `import_hf`."""
    # from `fairseq-train DATA --task ...`, what follows from the data
    task_flags = shlex.split(training_flags(task, find_bpe(None, imported).kind, {}, data))[2:]
    return [
        *(os.path.relpath(data), *plugin_flags(), *task_flags),
        *(*encoder_flags(imported / "model.pt"), *import_report(imported)["flags"], *METHODS[method]),
        *(*as_flags(COMMON), *length_flags(updates), "--seed", str(seed)),
        *("--no-epoch-checkpoints", "--no-save-optimizer-state", *ONE_DEVICE, *LOG),
    ]
