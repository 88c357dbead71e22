"""What the log says: GLUE's metrics over the whole validation set, and each term with its digits.

fairseq takes each metric of every batch before that of the set, where a correlation of one example is an error, and
adds up what the workers log, which lists of predictions do not survive. Here each of several workers logs a vector
over the whole set with its predictions in their places (`place_predictions`).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fairseq.logging import metrics
from fairseq.logging.meters import safe_round
from torch import Tensor

from ..evaluation.calibration import bins_of
from ..evaluation.metrics import value_of

# by flag
REPORTED = {
    "report_mcc": ["mcc"],
    "report_acc_and_f1": ["acc_and_f1", "f1"],
    "report_pearson_and_spearman": ["pearson_and_spearman", "pearson", "spearman"],
}


def size_of(task: Any) -> int:
    """Of the largest of the task's loaded splits, the same on every worker."""
    return max(len(dataset) for dataset in task.datasets.values())


def placed(rows: Tensor, example_ids: Tensor, size: int) -> Tensor:
    """[R, B] -> [R + 1, B], the last row how often the example was seen: 1.

    With several workers [R + 1, size] with zeros at the examples of other batches, so that the workers' tensors can be
    added.
    """
    values = torch.cat([rows, torch.ones_like(rows[:1])])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        found, values = values, values.new_zeros(len(values), size)
        values[:, example_ids] = found
    return values


def place_predictions(log: dict[str, Any], example_ids: Tensor, task: Any) -> None:
    """Replace the lists ``pred`` and ``targ`` of a batch by one float64 tensor ``predictions`` of `placed` rows."""
    if "pred" in log:
        pairs = [log.pop("pred"), log.pop("targ")]
        rows = torch.tensor(pairs, dtype=torch.float64, device=example_ids.device)
        log["predictions"] = placed(rows, example_ids, size_of(task))


def place_confidence(log: dict[str, Any], logits: Tensor, sample: dict[str, Any], task: Any) -> None:
    """Add ``confidence``, `placed` rows: the largest probability, and whether its class is right. Logits [B, K]."""
    largest, predicted = logits.detach().double().softmax(-1).max(-1)
    right = predicted == sample["target"].view(-1)
    log["confidence"] = placed(torch.stack([largest, right.double()]), sample["id"], size_of(task))


def log_calibration(logging_outputs: Sequence[dict[str, Any]], prefix: str = "") -> None:
    """Log ``calibration_error``, in percent over the whole set, from `place_confidence`; ``prefix`` before its name."""
    placed = [log["confidence"] for log in logging_outputs if "confidence" in log]
    if placed:
        confidence, right, seen = torch.cat(placed, dim=1)
        metrics.log_concat_tensor(f"_{prefix}confidence", confidence[seen > 0].cpu())
        metrics.log_concat_tensor(f"_{prefix}right", right[seen > 0].cpu())
        metrics.log_derived(f"{prefix}calibration_error", functools.partial(_calibration_error, prefix))


def _calibration_error(prefix: str, meters: Any) -> float:
    confidence, right = (meters[f"_{prefix}{key}"].tensor.numpy() for key in ("confidence", "right"))
    gaps = np.bincount(bins_of(confidence), right - confidence)
    return safe_round(100 * np.abs(gaps).sum() / len(right), 1)  # type: ignore[no-any-return]


def log_glue_metrics(logging_outputs: list[dict[str, Any]]) -> None:
    """Log the metrics that were asked for, in percent with one decimal, from `place_predictions`."""
    placed = [log["predictions"] for log in logging_outputs if "predictions" in log]
    if not placed:
        return
    predicted, gold, seen = torch.cat(placed, dim=1)
    if seen.max() > 1:
        raise RuntimeError("an example was evaluated twice in one step: the metrics would count it double")
    # a leading underscore keeps the gathered values out of the log line
    metrics.log_concat_tensor("_predicted", predicted[seen > 0].cpu())
    metrics.log_concat_tensor("_gold", gold[seen > 0].cpu())
    for flag, names in REPORTED.items():
        if any(flag in log for log in logging_outputs):
            for name in names:
                metrics.log_derived(name, functools.partial(_metric, name))


def _metric(name: str, meters: Any) -> float:
    predicted, gold = (meters[key].tensor.numpy() for key in ("_predicted", "_gold"))
    if name in ("mcc", "acc_and_f1", "f1"):  # of labels, which are whole numbers
        predicted, gold = predicted.astype(int).astype(str), gold.astype(int).astype(str)
    return safe_round(value_of(name, predicted, gold), 1)  # type: ignore[no-any-return]


def log_terms(
    logging_outputs: Sequence[dict[str, Any]], prefix: str = "", only: Sequence[str] = ("loss", "delta", "rise")
) -> None:
    """Log the task loss and each term in nats per example, unweighted, and the size of its perturbation.

    What a criterion puts into its log for a term NAME, as sums over the batch: ``NAME_loss``, ``NAME_delta`` for a
    term with a perturbation, and ``NAME_dropped``, the number of batches whose term was not finite. Adversarial
    training has ``NAME_delta`` and ``NAME_rise``, by how much its perturbation raises the task loss. ``prefix`` is put
    before each name, ``only`` says which of these are wanted; what is counted or derived goes with ``delta``.
    """
    sample_size = sum(log.get("sample_size", 0) for log in logging_outputs)
    logged = logging_outputs[0] if logging_outputs else {}
    endings = ("_dropped", "_delta")
    names = list(dict.fromkeys(key[: key.rindex("_")] for key in logged if key.endswith(endings)))
    for key in ("task_loss", *(f"{name}_{what}" for name in names for what in only)):
        if key in logged:
            total = sum(log.get(key, 0) for log in logging_outputs)
            # the meter that is saved and averaged is hidden; what is printed keeps significant digits
            shown = prefix + key
            metrics.log_scalar("_" + shown, total / sample_size, sample_size)
            metrics.log_derived(shown, lambda meters, shown=shown: _significant(meters["_" + shown].avg))
    for name in names if "delta" in only else ():
        if f"{name}_delta" in logged and f"{name}_loss" in logged:
            metrics.log_derived(f"{name}_sensitivity", functools.partial(_sensitivity, name))
        dropped = sum(log.get(f"{name}_dropped", 0) for log in logging_outputs)
        if dropped:
            metrics.log_scalar_sum(f"{name}_dropped", int(dropped), round=0)


def _significant(value: Any) -> Any:
    """A number rounded to three significant digits, so that 1.3e-06 is not printed as 0; "-" where there is none."""
    if value is None:  # no update of the interval had the term (--smart-every)
        return "-"
    return float(f"{float(value):.2e}")


def _sensitivity(name: str, meters: Any) -> Any:
    """The term over the squared size of its perturbation."""
    value, size = (meters[f"_{name}_{what}"].avg for what in ("loss", "delta"))
    if value is None:
        return "-"
    return _significant(float(value) / float(size) ** 2) if float(size) else math.nan
