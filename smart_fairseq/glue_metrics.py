"""GLUE's metrics over the whole validation set.

Two habits of fairseq stand in the way, and are met here:
- From the last batch of a split it drops all examples when their number is no multiple of
  ``--required-batch-size-multiple``, which is 8 unless changed: RTE would be judged on 272 of its 277
  examples in batches of 16. `cover_validation_sets` asks for every example of every split but the
  training one, and says how many training examples fairseq leaves out.
- It takes each metric of every batch before that of the set, where a correlation of one example is an
  error, and adds up what the workers log, which lists of predictions do not survive. Here each of several
  workers logs a vector over the whole set with its predictions in their places (`place_predictions`).
"""

import functools
import inspect
import logging
from typing import Any

import torch
import torch.distributed as dist
from fairseq.logging import metrics
from fairseq.logging.meters import safe_round
from torch import Tensor

from .data.metrics import METRICS

logger = logging.getLogger(__name__)

__all__ = ["cover_validation_sets", "log_glue_metrics", "place_predictions"]

_REPORTED = {
    "report_mcc": ["mcc"],
    "report_acc_and_f1": ["acc_and_f1", "f1"],
    "report_pearson_and_spearman": ["pearson_and_spearman", "pearson", "spearman"],
}


def place_predictions(log: dict[str, Any], example_ids: Tensor, task: Any) -> None:
    """Replace the lists ``pred`` and ``targ`` of a batch by one float64 tensor ``predictions``.

    Its rows are predictions, targets and how often the example was seen: [3, B] where there is one worker,
    otherwise [3, N] with zeros at the examples of other batches, so that the workers' tensors can be added.
    N is the size of the largest of the task's loaded splits, the same on every worker.
    """
    if "pred" not in log:
        return
    pairs = [log.pop("pred"), log.pop("targ")]
    values = torch.tensor([*pairs, [1] * len(pairs[0])], dtype=torch.float64, device=example_ids.device)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        placed = values.new_zeros(3, max(len(dataset) for dataset in task.datasets.values()))
        placed[:, example_ids] = values
        values = placed
    log["predictions"] = values


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
    for flag, names in _REPORTED.items():
        if any(flag in log for log in logging_outputs):
            for name in names:
                metrics.log_derived(name, functools.partial(_metric, name))


def _metric(name: str, meters: Any) -> float:
    predicted, gold = (meters[key].tensor.numpy() for key in ("_predicted", "_gold"))
    if name in ("mcc", "acc_and_f1", "f1"):  # of labels, which are whole numbers
        predicted, gold = predicted.astype(int).astype(str), gold.astype(int).astype(str)
    return safe_round(METRICS[name](predicted, gold), 1)  # type: ignore[no-any-return]


def cover_validation_sets(task: Any, train_subset: str) -> None:
    """Let the task's batches hold every example of every split but ``train_subset``."""
    get_batch_iterator = task.get_batch_iterator
    signature = inspect.signature(get_batch_iterator)

    @functools.wraps(get_batch_iterator)
    def get_whole_batch_iterator(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        training = call.arguments["dataset"] is task.datasets.get(train_subset)
        if not training:
            call.arguments["required_batch_size_multiple"] = 1
        iterator = get_batch_iterator(*call.args, **call.kwargs)
        if training:
            used = sum(len(batch) for batch in iterator.frozen_batches)
            total = len(call.arguments["dataset"])
            if used < total:
                logger.info(
                    f"training uses {used} of {total} examples: fairseq leaves out a last batch that is no multiple of "
                    "--required-batch-size-multiple (1 takes all), and examples longer than --max-positions"
                )
        return iterator

    task.get_batch_iterator = get_whole_batch_iterator
