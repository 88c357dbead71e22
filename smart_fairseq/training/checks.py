"""Checks before training: of the flags, and of what exists only then, files, data and the model.

Each raises `UsageError` with one line, or returns.
"""

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fairseq.criterions.sentence_prediction import SentencePredictionConfig

from ..config.flags import AdversaryFlags, RegularizedConfig
from ..data.binarize import FILLER, read_manifest
from ..data.folders import DATA, ROWS_OF, labels_in, texts_in, what_is_in
from ..encoder import Encoder
from ..errors import NOT_SHARDED, UsageError, require
from ..patches import trained_on
from .metrics import REPORTED
from .objective import Objective

logger = logging.getLogger(__name__)

DEFAULT_RESTORE_FILE = "checkpoint_last.pt"


def check_start(cfg: RegularizedConfig, task: Any, objectives: Sequence[Objective]) -> None:
    """What the run begins with: no other task's run goes on, and who trains from random weights, or reads a word in the
    place of the first token, is told so. ``task``: its configuration.
    """
    if cfg.smart_finetune_from and os.path.isdir(cfg.smart_finetune_from):
        raise UsageError(
            f"--finetune-from-model {cfg.smart_finetune_from}: a folder, of which fairseq would read nothing and start "
            "from random weights; name the checkpoint in it, such as its model.pt"
        )
    warmup, updates = getattr(cfg.smart_lr_scheduler, "warmup_updates", 0) or 0, cfg.smart_max_update or math.inf
    if warmup >= updates:
        logger.warning(
            f"--warmup-updates {warmup} is not below --max-update {updates}: the learning rate never reaches --lr"
        )
    last = os.path.join(cfg.smart_save_dir, DEFAULT_RESTORE_FILE)
    before = trained_on(last)
    if cfg.smart_restore_file != DEFAULT_RESTORE_FILE:
        _check_restore_file(cfg.smart_restore_file, last)
    elif before is not None:
        folder, was = before
        was = was or what_is_in(Path(folder))  # of a checkpoint that does not say it
        now = what_is_in(Path(task.data))
        names = [_task_of(folder), _task_of(task.data)]
        if was.get("labels", now.get("labels")) != now.get("labels"):
            names = [f"the classes {', '.join(found.get('labels', []))}" for found in (was, now)]
        if None not in names and names[0] != names[1]:
            raise UsageError(
                f"--save-dir holds {last}, of a run on {names[0]} ({folder}), and this one is on {names[1]} "
                f"({task.data}); give another --save-dir, and to start from those weights --finetune-from-model"
            )
        if not cfg.smart_reset_optimizer:
            tasks = [name for name, of_one in was.items() if isinstance(of_one, dict)]
            _check_tasks(tasks, [objective.name for objective in objectives if objective.name], last)
        if was.get("train", now.get("train")) != now.get("train"):
            logger.warning(
                f"--save-dir holds {last}, of a run on {was.get('rows')} training rows, and the {now.get('rows')} of "
                f"{task.data} are others: this run goes on from there; to train anew on these give another --save-dir"
            )
    elif not cfg.smart_finetune_from and not os.path.isfile(last):  # which one worker alone may have read
        logger.warning(
            "no --finetune-from-model, and nothing in --save-dir to go on from: training starts from random weights"
        )
    if getattr(task, "init_token", 0) is None:
        logger.warning(
            "--init-token is not set: the classification head reads the first word of a row in the place of the token "
            "that the encoder was pretrained with there; RoBERTa and BERT need --init-token 0"
        )


def _check_tasks(was: Sequence[str], now: Sequence[str], last: str) -> None:
    """The state of optimizer and teacher is by place: another head in a place would go on with it."""
    if was and now and was != now:
        raise UsageError(
            f"--save-dir holds {last}, of a run on the tasks {', '.join(was)}, and this one is on {', '.join(now)}; "
            "--multitask-tasks must name the same in the same order, or give another --save-dir, and to start from "
            "those weights --finetune-from-model"
        )


def check_classes(task: Any) -> None:
    """A checkpoint is evaluated on its own classes, in their order, and on as many texts: fairseq looks at neither."""
    remembered = task.state.state_dict.get(DATA, {})  # in fairseq-validate the checkpoint's
    was, now = remembered.get("labels"), labels_in(Path(str(task.cfg.data)))
    if was and now and was != now:
        raise UsageError(
            f"the checkpoint was trained with the classes {', '.join(was)}, and {task.cfg.data} has {', '.join(now)}; "
            "validate on the data of its own task"
        )
    before, texts = remembered.get("texts"), texts_in(Path(str(task.cfg.data)))
    if before and before != texts:
        raise UsageError(
            f"the checkpoint was trained on {ROWS_OF[before]}, and {task.cfg.data} has {ROWS_OF[texts]}; "
            "validate on the data of its own task"
        )


def _check_restore_file(path: str, last: str) -> None:
    """A checkpoint that is named must exist: fairseq trains from scratch without a word when it does not.

    And it is loaded at every start, so that the same command begins anew where a killed run could go on from the
    ``last`` one: warn of that.
    """
    if not os.path.isfile(path):
        raise UsageError(
            f"--restore-file {path}: no such file; training would have started from random weights. "
            "Name an existing checkpoint, or leave the flag out to train from scratch"
        )
    if os.path.isfile(last) and not os.path.samefile(last, path):
        logger.warning(
            f"--restore-file {path}: this run begins anew and will overwrite {last}; to go on from there instead, give "
            f"--finetune-from-model {path} in the place of --restore-file and the --reset flags"
        )


def _task_of(folder: str) -> str | None:
    """What preprocess says that a data folder holds; None where it says nothing."""
    try:
        return str(read_manifest(Path(folder))["task"])
    except UsageError:
        return None


def check_best_metric(cfg: RegularizedConfig, metric: str, objectives: Sequence[Objective]) -> None:
    """fairseq looks the metric up after the first epoch, and dies of a bare KeyError.

    And it keeps the worst checkpoint without a word where the metric is sought at its wrong end.
    """
    _check_known(cfg, metric, objectives)
    lowest = metric.endswith(("loss", "calibration_error"))
    if cfg.smart_disable_validation or lowest != bool(cfg.smart_maximize_best):
        return
    maximize = "--maximize-best-checkpoint-metric"
    given, advice = (f"is set with {maximize}", "leave that out") if lowest else ("is set alone", f"add {maximize}")
    raise UsageError(
        f"--best-checkpoint-metric {metric} {given}, so the worst checkpoint would be kept as the best; {advice}"
    )


def _check_known(cfg: RegularizedConfig, metric: str, objectives: Sequence[Objective]) -> None:
    if objectives[0].name:
        known = ["average", "loss", "nll_loss"]
        # fairseq looks it up in each validation set
        splits = {split for objective in objectives for split in objective.task.datasets} - {cfg.smart_train_subset}
        for objective in (objective for objective in objectives if objective.task.datasets.keys() >= splits):
            calibration = ["calibration_error"] if cfg.smart_report_calibration and objective.classes else []
            known += [f"{objective.name}_{what}" for what in (*objective.metrics, *calibration, "loss")]
        require(metric in known, "--best-checkpoint-metric", metric, f"one of {', '.join(known)}")
        return
    known = ["loss", "nll_loss", *(() if cfg.regression_target else ("accuracy",))]
    for flag, names in {**REPORTED, "smart_report_calibration": ["calibration_error"]}.items():
        if getattr(cfg, flag):
            known += names
        elif metric in names:
            raise UsageError(f"--best-checkpoint-metric is {metric}, which needs --{flag.replace('_', '-')}")
    require(metric in known, "--best-checkpoint-metric", metric, f"one of {', '.join(known)}")


def check_labels(cfg: RegularizedConfig, task: Any, regression: bool) -> None:
    """Every label of the loaded splits must be one of the classes (or, for regression, a finite number)."""
    folder, num_classes = os.path.join(task.cfg.data, "label"), task.cfg.num_classes
    if not regression:
        dictionary = task.label_dictionary
        # fairseq pads label/dict.txt to a multiple of 8, and adds a mask to it
        words = dictionary.symbols[dictionary.nspecial :]
        count = sum(not word.startswith(FILLER) and word != "<mask>" for word in words)
        allowed = f"{count}, the number of labels in {os.path.join(folder, 'dict.txt')}"
        require(num_classes <= count, "--num-classes", num_classes, allowed)
        _check_reported(cfg, words[:count], folder)
    for split, dataset in task.datasets.items():
        parts = getattr(getattr(dataset, "dataset", dataset), "defn", None)
        if parts is None:  # a data set of another task's making
            continue
        labels = parts.get("target")
        if labels is None:
            files = [os.path.join(folder, f"{split}.{kind}") for kind in ("bin", "label")]
            if not any(map(os.path.isfile, files)):
                raise UsageError(
                    f"{folder}: no labels of the split {split}, which --train-subset or --valid-subset names; name "
                    "splits that have labels"
                )
            file = files[regression]
            other = "without --regression-target" if regression else "with --regression-target --num-classes 1"
            raise UsageError(f"{file}: no such file; if this folder is for the other kind of task, train {other}")
        values = torch.stack([torch.as_tensor(labels[i]).reshape(-1)[0] for i in range(len(labels))])
        bad = ~torch.isfinite(values) if regression else (values < 0) | (values >= num_classes)
        if not bad.any():
            continue
        index = int(bad.nonzero()[0])
        where, value = f"{os.path.join(folder, split)}: example {index + 1}", values[index].item()
        if regression:
            raise UsageError(f"{where} has the target {value}; it must be a finite number")
        word = repr(dictionary[value + dictionary.nspecial]) if value >= 0 else "that label/dict.txt does not hold"
        raise UsageError(
            f"{where} has a label {word} (number {value}), outside the {num_classes} classes of "
            "--num-classes; give the right number, or prepare the data again"
        )


def _check_reported(cfg: RegularizedConfig, words: Sequence[str], folder: str) -> None:
    """fairseq makes numbers of the labels for its report, and dies of one that is none after the first epoch."""
    for flag in ("report_mcc", "report_acc_and_f1"):
        word = next((word for word in words if not word.isdecimal()), None)
        if getattr(cfg, flag) and word is not None:
            raise UsageError(
                f"--{flag.replace('_', '-')} is set, and {os.path.join(folder, 'dict.txt')} has the label {word!r}, of "
                "which fairseq's report makes no number; leave the flag out (the command evaluate has these metrics)"
            )


def check_model(encoder: Encoder) -> None:
    """The model must take a perturbation of its embeddings and a gradient with respect to it."""
    arguments = getattr(encoder.model, "args", None)
    if getattr(arguments, "checkpoint_activations", False) or getattr(arguments, "offload_activations", False):
        raise UsageError(
            "--checkpoint-activations is on; with a perturbation of the embeddings it must be off, because fairseq's "
            "checkpointing allows no gradient with respect to them"
        )
    _ = encoder.insides


def _optimizer_name(cfg: RegularizedConfig) -> str | None:
    """The value of --optimizer; None in fairseq-validate, which has none."""
    return getattr(cfg.smart_optimizer, "_name", None)


def check_weight(flag: str, weight: float) -> float:
    require(weight >= 0 and math.isfinite(weight), flag, weight, "0 or above")
    return weight


def bregman_weight(cfg: RegularizedConfig) -> float:
    """The weight of the Bregman term, which depends on the optimizer where it is not set."""
    optimizer, weight = _optimizer_name(cfg), cfg.smart_bregman_weight
    without_teacher = optimizer not in (None, "mbpp")
    if weight is None:
        if without_teacher:
            logger.info(
                f"--smart-bregman-weight is not set and --optimizer is {optimizer}: no Bregman term "
                "(--optimizer mbpp brings it, with weight 1)"
            )
        return 1.0 if optimizer == "mbpp" else 0.0
    check_weight("--smart-bregman-weight", weight)
    if weight > 0 and without_teacher:
        raise UsageError(
            f"--smart-bregman-weight is {weight:g} but --optimizer is {optimizer}; "
            "a value above 0 needs --optimizer mbpp, which keeps the teacher"
        )
    return weight


def check_for_several_tasks(cfg: RegularizedConfig) -> None:
    """Raise `UsageError` for flags of the criterion that stand for one task."""
    for flag in ("regression_target", *REPORTED):
        if getattr(cfg, flag):
            raise UsageError(
                f"--{flag.replace('_', '-')} is set with --task smart_multitask, which knows each task's kind and "
                "reports its metrics; leave it out"
            )
    head = SentencePredictionConfig.classification_head_name
    if cfg.classification_head_name != head:
        raise UsageError(
            f"--classification-head-name is {cfg.classification_head_name} with --task smart_multitask, whose heads "
            "have the names of the tasks; leave it out"
        )


def check_workers(cfg: RegularizedConfig, encoder: Encoder, objectives: Sequence[Objective]) -> None:
    """Raise `UsageError` where workers would wait for gradients that do not come."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not several or cfg.smart_ddp_backend in ("legacy_ddp", "no_c10d"):
        return
    if objectives[0].name:
        raise UsageError(
            f"--ddp-backend is {cfg.smart_ddp_backend} with --task smart_multitask on several workers, whose batches "
            "may be of different tasks; use legacy_ddp"
        )
    resting = [] if cfg.smart_find_unused_parameters else encoder.resting(objectives[0].head)
    if resting:
        raise UsageError(
            f"--ddp-backend is {cfg.smart_ddp_backend} on several workers, which would wait for gradients of weights "
            f"that classification leaves alone ({resting[0]}, {len(resting)} in all); add --find-unused-parameters"
        )


def check_surroundings(cfg: RegularizedConfig, objective: Objective, regularized: bool) -> None:
    """Raise `UsageError` where the run around the criterion would train something else than the user believes."""
    if cfg.smart_ddp_backend == "fully_sharded":
        raise UsageError(NOT_SHARDED)
    optimizer = _optimizer_name(cfg)
    if cfg.smart_validate_with == "teacher" and optimizer not in (None, "mbpp"):
        raise UsageError(
            f"--smart-validate-with is teacher but --optimizer is {optimizer}; it needs --optimizer mbpp, which keeps "
            "the teacher"
        )
    num_classes = objective.num_classes
    if objective.name:  # what the data folders say
        return
    if objective.regression:
        require(num_classes == 1, "--num-classes", num_classes, "1 with --regression-target")
        if cfg.smart_report_calibration:
            raise UsageError("--smart-report-calibration is set with --regression-target, which has no probabilities")
    elif regularized:
        require(num_classes >= 2, "--num-classes", num_classes, "2 or more without --regression-target")


def check_adversary(flags: AdversaryFlags, weight: float, regression: bool) -> None:
    """Raise `UsageError` for values of the ball and the ascent that are none, or that exclude each other."""
    or_off = "(--smart-weight 0 switches the term off)"
    for name in ("epsilon", "noise_std", "step_size"):  # at the clean point itself the gradient is 0
        value = getattr(flags, f"smart_{name}")
        require(value > 0 and math.isfinite(value), f"--smart-{name.replace('_', '-')}", value, f"above 0 {or_off}")
    if flags.smart_epsilon_unit == "relative":
        allowed = "at most 1, the size of the embeddings themselves; or with --smart-epsilon-unit absolute"
        require(flags.smart_epsilon <= 1, "--smart-epsilon", flags.smart_epsilon, allowed)
    lowest = 1 if weight else 0
    require(flags.smart_steps >= lowest, "--smart-steps", flags.smart_steps, f"{lowest} or more {or_off}")
    if flags.smart_linear_search and (flags.smart_recompute or flags.smart_dropout == "independent"):
        flag = "--smart-recompute" if flags.smart_recompute else "--smart-dropout independent"
        raise UsageError(
            f"--smart-linear-search needs the clean pass as it was, which {flag} does not keep; leave one out"
        )
    if flags.smart_recompute and flags.smart_dropout == "off":
        raise UsageError(
            "--smart-recompute is set with --smart-dropout off, which takes a second clean pass; use shared or "
            "independent"
        )
    divergence = divergence_name(flags, regression)
    if regression and divergence != "squared":
        raise UsageError(
            f"--smart-divergence is {divergence} with --regression-target, whose single output is no "
            "distribution; use squared or auto"
        )


def divergence_name(flags: AdversaryFlags, regression: bool) -> str:
    if flags.smart_divergence == "auto":
        return "squared" if regression else "sym_kl"
    return str(flags.smart_divergence)
