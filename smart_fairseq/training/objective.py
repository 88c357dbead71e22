"""What a batch's outputs are judged by, and what the log says of several tasks.

Most runs have one task and one objective. With ``--task smart_multitask`` each batch carries the number of its task,
and the criterion turns to that task's head, loss, divergence and metrics before it looks at the batch.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fairseq.criterions.sentence_prediction import SentencePredictionConfig
from fairseq.logging import metrics
from fairseq.logging.meters import safe_round
from torch import Tensor

from ..data.metrics import METRICS
from .batches import TASK
from .metrics import log_calibration, log_terms

OUTPUTS = "outputs"  # in a validation batch's log, [2, B]: predicted, gold
# in the log of a batch, what means nothing beyond its task
OF_ONE_TASK = ("ncorrect", "confidence", OUTPUTS)


@dataclass(frozen=True)
class Objective:
    """The objective of one task.

    task: fairseq's `sentence_prediction` task, which holds the data and the labels.
    head: of the model's classification heads.
    num_classes: its outputs.
    regression: whether they are numbers rather than classes.
    name: of several tasks; "" where there is but one.
    metrics: logged under that name, by their names in `data.metrics`, the official one first.
    """

    task: Any
    head: str
    num_classes: int
    regression: bool
    name: str = ""
    metrics: tuple[str, ...] = ()


def objectives_of(task: Any, cfg: SentencePredictionConfig) -> Sequence[Objective]:
    """Those of ``--task smart_multitask``, or the one that the criterion's flags describe."""
    several: Sequence[Objective] | None = getattr(task, "objectives", None)
    return several or [Objective(task, cfg.classification_head_name, task.cfg.num_classes, cfg.regression_target)]


def keep_outputs(log: dict[str, Any], logits: Tensor, sample: dict[str, Any], objective: Objective) -> None:
    """Add what a validation batch predicts and what is right, numbers or numbers of classes. Logits [B, K]."""
    predicted = logits.view(-1) if objective.regression else logits.argmax(-1)
    log[OUTPUTS] = torch.stack([predicted.double(), sample["target"].view(-1).double()]).detach()


def log_by_task(objectives: Sequence[Objective], logging_outputs: Sequence[dict[str, Any]]) -> None:
    """Log under each task's name its loss and terms, or in validation its metrics; and the ``average`` of these."""
    for number, objective in enumerate(objectives):
        logs = [log for log in logging_outputs if log.get(TASK) == number]
        if not logs:
            continue
        name, size = objective.name, sum(log["sample_size"] for log in logs)
        if "task_loss" in logs[0]:
            log_terms(logs, prefix=f"{name}_", only=("loss",))
        else:
            loss = sum(log["loss"] for log in logs) / size / math.log(2)
            metrics.log_scalar(f"_{name}_loss", loss, size)
            metrics.log_derived(f"{name}_loss", functools.partial(_mean, f"_{name}_loss", digits=3))
        if OUTPUTS in logs[0]:
            log_calibration(logs, prefix=f"{name}_")
            for key, values in zip(("predicted", "gold"), torch.cat([log[OUTPUTS] for log in logs], dim=1)):
                metrics.log_concat_tensor(f"_{name}_{key}", values.cpu())
            for metric in objective.metrics:
                metrics.log_derived(f"{name}_{metric}", functools.partial(_metric, objective, metric))
        elif not objective.regression:
            correct = sum(log["ncorrect"] for log in logs)
            # the meter is hidden: of an interval without a batch of the task it has nothing
            metrics.log_scalar(f"_{name}_accuracy", 100.0 * correct / size, size)
            metrics.log_derived(f"{name}_accuracy", functools.partial(_mean, f"_{name}_accuracy"))
    if any(OUTPUTS in log for log in logging_outputs):
        metrics.log_derived("average", functools.partial(_average, objectives))


def _mean(key: str, meters: Any, digits: int = 1) -> Any:
    return "-" if meters[key].avg is None else safe_round(meters[key].avg, digits)


def _value(objective: Objective, metric: str, meters: Any) -> float:
    predicted, gold = (meters[f"_{objective.name}_{key}"].tensor.numpy() for key in ("predicted", "gold"))
    if not objective.regression:
        labels = objective.task.label_dictionary
        words = np.array(labels.symbols[labels.nspecial :])
        predicted, gold = words[predicted.astype(int)], words[gold.astype(int)]
    return METRICS[metric](predicted, gold)


def _metric(objective: Objective, metric: str, meters: Any) -> float:
    return safe_round(_value(objective, metric, meters), 1)  # type: ignore[no-any-return]


def _average(objectives: Sequence[Objective], meters: Any) -> float:
    """Of the official metrics; a correlation with a constant, which there is none of, counts as 0."""
    there = [objective for objective in objectives if f"_{objective.name}_gold" in meters]
    values = [_value(objective, objective.metrics[0], meters) for objective in there]
    return safe_round(float(np.mean(np.nan_to_num(values))), 2)  # type: ignore[no-any-return]
