"""What a batch's outputs are judged by, and what the log says of several tasks.

Most runs have one task and one objective. With ``--task smart_multitask`` each batch carries the number of its task,
and the criterion turns to that task's head, loss, divergence and metrics before it looks at the batch.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fairseq.criterions.sentence_prediction import SentencePredictionConfig
from fairseq.logging import metrics
from fairseq.logging.meters import safe_round
from torch import Tensor

from ..evaluation.metrics import value_of
from ..method.ranking import picked, ranking_loss
from .batches import GROUPS, TASK
from .metrics import log_calibration, log_terms, placed, size_of

# in a validation batch's log, rows: the task's number, predicted and right number or class, probability of that class
OUTPUTS = "outputs"


@dataclass(frozen=True)
class Objective:
    """The objective of one task.

    task: fairseq's `sentence_prediction` task, which holds the data and the labels.
    head: of the model's classification heads.
    num_classes: its outputs.
    regression: whether they are numbers rather than classes.
    name: of several tasks; "" where there is but one.
    ranking: whether they are scores of candidates, one for each, whose groups the batches carry.
    metrics: logged under that name, by their names in `evaluation.metrics`, the official one first.
    judge: what stands in for fairseq's criterion, for a model and a batch; None where that one or `judge_ranking` does.
    """

    task: Any
    head: str
    num_classes: int
    regression: bool
    name: str = ""
    metrics: tuple[str, ...] = ()
    ranking: bool = False
    judge: Callable[[Any, dict[str, Any]], tuple[Tensor, int, dict[str, Any]]] | None = None

    @property
    def classes(self) -> bool:
        """Whether an output alone is a distribution over classes."""
        return not self.regression and not self.ranking


def objectives_of(task: Any, cfg: SentencePredictionConfig) -> Sequence[Objective]:
    """Those of ``--task smart_multitask``, or the one that the criterion's flags describe."""
    several: Sequence[Objective] | None = getattr(task, "objectives", None)
    return several or [Objective(task, cfg.classification_head_name, task.cfg.num_classes, cfg.regression_target)]


def judge_ranking(outputs: Tensor, sample: dict[str, Any]) -> tuple[Tensor, int, dict[str, Any]]:
    """What fairseq's criterion returns of a batch, here of a ranking, whose examples are the groups. Outputs [N, 1]."""
    groups, targets = sample[GROUPS], sample["target"].view(-1)
    loss, size = ranking_loss(outputs, targets, groups).sum(), len(groups)
    correct = (targets[picked(outputs, groups)] > 0).sum()
    log = {"loss": loss.detach(), "ntokens": sample["ntokens"], "nsentences": size, "sample_size": size}
    return loss, size, {**log, "ncorrect": correct}


def place_outputs(log: dict[str, Any], logits: Tensor, sample: dict[str, Any], objectives: Sequence[Objective]) -> None:
    """Add ``OUTPUTS`` for a validation batch: `placed` rows among the examples of all tasks. Logits [B, K]."""
    number: int = sample[TASK]
    if objectives[number].ranking:
        confidence = logits.new_zeros(len(logits), dtype=torch.float64)
        predicted = confidence.index_fill(0, picked(logits, sample[GROUPS]), 1)
    elif objectives[number].regression:
        predicted, confidence = logits.view(-1).double(), logits.new_zeros(len(logits), dtype=torch.float64)
    else:
        confidence, predicted = logits.double().softmax(-1).max(-1)
    rows = [torch.full_like(confidence, number), predicted, sample["target"].view(-1), confidence]
    sizes = [size_of(objective.task) if objective.task.datasets else 0 for objective in objectives]
    ids = sample["id"] + sum(sizes[:number])
    log[OUTPUTS] = placed(torch.stack([row.detach().double() for row in rows]), ids, sum(sizes))


def spread(log: dict[str, Any], number: int, tasks: int) -> None:
    """Repeat a batch's log for each of the ``tasks``: its own entries for task ``number``, 0 for the others.

    So that workers whose batches are of different tasks have the same entries in the same order, which fairseq adds.
    """
    zero = torch.zeros_like(log["loss"])
    log.setdefault("ncorrect", zero)  # a regression has none
    for key in [key for key in log if key != OUTPUTS]:
        nothing = zero if torch.is_tensor(log[key]) else 0
        log |= {f"{place}/{key}": log[key] if place == number else nothing for place in range(tasks)}
    entries = sorted(log.items())
    log.clear()
    log.update(entries)


def common(log: dict[str, Any]) -> dict[str, Any]:
    """What of a batch's log means something beyond its task."""
    return {key: value for key, value in log.items() if "/" not in key and key not in ("ncorrect", OUTPUTS)}


def log_by_task(
    objectives: Sequence[Objective], logging_outputs: Sequence[dict[str, Any]], calibration: bool = False
) -> None:
    """Log under each task's name its loss and terms, or in validation its metrics; and the ``average`` of these."""
    for number, objective in enumerate(objectives):
        start = f"{number}/"
        logs = [
            {key.removeprefix(start): value for key, value in log.items() if key.startswith(start)}
            for log in logging_outputs
        ]
        name, size = objective.name, sum(log["sample_size"] for log in logs)
        if not size:
            continue
        if "task_loss" in logs[0]:
            log_terms(logs, prefix=f"{name}_", only=("loss",))
        else:
            loss = sum(log["loss"] for log in logs) / size / math.log(2)
            metrics.log_scalar(f"_{name}_loss", loss, size)
            metrics.log_derived(f"{name}_loss", functools.partial(_mean, f"_{name}_loss", digits=3))
        if not objective.regression and not any(OUTPUTS in log for log in logging_outputs):
            correct = sum(log["ncorrect"] for log in logs)
            # the meter is hidden: of an interval without a batch of the task it has nothing
            metrics.log_scalar(f"_{name}_accuracy", 100.0 * correct / size, size)
            metrics.log_derived(f"{name}_accuracy", functools.partial(_mean, f"_{name}_accuracy"))
    outputs = [log[OUTPUTS] for log in logging_outputs if OUTPUTS in log]
    if outputs:
        _log_outputs(objectives, torch.cat(outputs, dim=1).cpu(), calibration)


def _log_outputs(objectives: Sequence[Objective], outputs: Tensor, calibration: bool) -> None:
    numbers, predicted, gold, confidence, seen = outputs
    if seen.max() > 1:
        raise RuntimeError("an example was evaluated twice in one step: the metrics would count it double")
    for number, objective in enumerate(objectives):
        own, name = (seen > 0) & (numbers == number), objective.name
        if not own.any():
            continue
        metrics.log_concat_tensor(f"_{name}_predicted", predicted[own])
        metrics.log_concat_tensor(f"_{name}_gold", gold[own])
        for metric in objective.metrics:
            metrics.log_derived(f"{name}_{metric}", functools.partial(_metric, objective, metric))
        if calibration and objective.classes:
            rows = torch.stack([confidence, (predicted == gold).double(), seen])[:, own]
            log_calibration([{"confidence": rows}], prefix=f"{name}_")
    metrics.log_derived("average", functools.partial(_average, objectives))


def _mean(key: str, meters: Any, digits: int = 1) -> Any:
    return "-" if meters[key].avg is None else safe_round(meters[key].avg, digits)


def _value(objective: Objective, metric: str, meters: Any) -> float:
    predicted, gold = (meters[f"_{objective.name}_{key}"].tensor.numpy() for key in ("predicted", "gold"))
    if not objective.regression:
        labels = objective.task.label_dictionary
        words = np.array(labels.symbols[labels.nspecial :])
        predicted, gold = words[predicted.astype(int)], words[gold.astype(int)]
    return value_of(metric, predicted, gold)


def _metric(objective: Objective, metric: str, meters: Any) -> float:
    return safe_round(_value(objective, metric, meters), 1)  # type: ignore[no-any-return]


def _average(objectives: Sequence[Objective], meters: Any) -> float:
    """Of the official metrics; a correlation with a constant, which there is none of, counts as 0."""
    there = [objective for objective in objectives if f"_{objective.name}_gold" in meters]
    values = [_value(objective, objective.metrics[0], meters) for objective in there]
    return safe_round(float(np.mean(np.nan_to_num(values))), 2)  # type: ignore[no-any-return]
