"""Checks of what exists only once training is about to begin: files, data, the model.

Each raises `UsageError` with one line, or returns.
"""

import logging
import os
from typing import Any

import torch
from torch import nn

from .errors import UsageError, require
from .perturb import embedding_weight

__all__ = ["check_best_metric", "check_labels", "check_model", "check_restore_file", "resolution"]

logger = logging.getLogger(__name__)

DEFAULT_RESTORE_FILE = "checkpoint_last.pt"


def check_restore_file(path: str, save_dir: str) -> None:
    """A checkpoint that is named must exist: fairseq trains from scratch without a word when it does not.

    And it is loaded at every start, so that the same command begins anew where a killed run could go on: warn of that.
    """
    if path != DEFAULT_RESTORE_FILE and not os.path.isfile(path):
        raise UsageError(
            f"--restore-file {path}: no such file; training would have started from random weights. "
            "Name an existing checkpoint, or leave the flag out to train from scratch"
        )
    last = os.path.join(save_dir, DEFAULT_RESTORE_FILE)
    if path != DEFAULT_RESTORE_FILE and os.path.isfile(last) and not os.path.samefile(last, path):
        logger.warning(
            f"--restore-file {path}: this run begins anew and will overwrite {last}; to go on from there instead, give "
            f"--finetune-from-model {path} in the place of --restore-file and the --reset flags"
        )


def check_best_metric(cfg: Any, metric: str) -> None:
    """fairseq looks the metric up after the first epoch, and dies of a bare KeyError."""
    known = ["loss", "nll_loss"]
    if not cfg.regression_target:
        known += ["accuracy"]
    for flag, names in (
        ("report_mcc", ["mcc"]),
        ("report_acc_and_f1", ["acc_and_f1", "f1"]),
        ("report_pearson_and_spearman", ["pearson_and_spearman", "pearson", "spearman"]),
    ):
        if getattr(cfg, flag):
            known += names
        elif metric in names:
            raise UsageError(f"--best-checkpoint-metric is {metric}, which needs --{flag.replace('_', '-')}")
    require(metric in known, "--best-checkpoint-metric", metric, f"one of {', '.join(known)}")


def check_labels(task: Any, regression: bool) -> None:
    """Every label of the loaded splits must be one of the classes (or, for regression, a finite number)."""
    if not regression:
        dictionary = task.label_dictionary
        # fairseq pads label/dict.txt to a multiple of 8, and adds a mask to it
        words = [word for word in dictionary.symbols[dictionary.nspecial :] if not word.startswith("madeupword")]
        count = len([word for word in words if word != "<mask>"])
        require(
            task.cfg.num_classes <= count,
            "--num-classes",
            task.cfg.num_classes,
            f"{count}, the number of labels in {os.path.join(task.cfg.data, 'label', 'dict.txt')}",
        )
    for split, dataset in task.datasets.items():
        parts = getattr(getattr(dataset, "dataset", dataset), "defn", None)
        if parts is None:  # a data set of another task's making
            continue
        labels = parts.get("target")
        if labels is None:
            file = os.path.join(task.cfg.data, "label", f"{split}.label" if regression else f"{split}.bin")
            other = "without --regression-target" if regression else "with --regression-target --num-classes 1"
            raise UsageError(f"{file}: no such file; if this folder is for the other kind of task, train {other}")
        values = torch.stack([torch.as_tensor(labels[i]).reshape(-1)[0] for i in range(len(labels))])
        bad = ~torch.isfinite(values) if regression else (values < 0) | (values >= task.cfg.num_classes)
        if not bad.any():
            continue
        index = int(bad.nonzero()[0])
        where = f"{os.path.join(task.cfg.data, 'label', split)}: example {index + 1}"
        if regression:
            raise UsageError(f"{where} has the target {float(values[index])}; it must be a finite number")
        value = int(values[index])
        dictionary = task.label_dictionary
        word = repr(dictionary[value + dictionary.nspecial]) if value >= 0 else "that label/dict.txt does not hold"
        raise UsageError(
            f"{where} has a label {word} (number {value}), outside the {task.cfg.num_classes} classes of "
            "--num-classes; give the right number, or prepare the data again"
        )


def check_model(model: nn.Module) -> None:
    """The model must take a perturbation of its embeddings and a gradient with respect to it."""
    arguments = getattr(model, "args", None)
    if getattr(arguments, "checkpoint_activations", False) or getattr(arguments, "offload_activations", False):
        raise UsageError(
            "--checkpoint-activations is on; with --smart-weight above 0 it must be off, because fairseq's "
            "checkpointing allows no gradient with respect to the embeddings"
        )
    embedding_weight(model)


def resolution(model: nn.Module, dtype: torch.dtype) -> float:
    """The smallest perturbation of the embeddings that ``dtype`` resolves: rounding of their median entry."""
    median = float(embedding_weight(model).detach().float().abs().median())
    return torch.finfo(dtype).eps * median
