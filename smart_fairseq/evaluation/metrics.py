"""The official metrics of the tasks, as pure functions of arrays; all in percent, as fairseq logs them.

F1 is that of class "1" (MRPC, QQP); Matthews is the multi-class R_K of Gorodkin (2004), which GLUE uses for AX and
which is the ordinary coefficient for CoLA. Where scikit-learn and scipy define a value for a degenerate case,
so do these: 0 for F1 without positives and for Matthews without variation, nan for correlations of a constant.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ..data.tasks import RIGHT
from . import intervals
from .intervals import Statistic


def accuracy(predicted: np.ndarray, gold: np.ndarray | str) -> float:
    """Percent of rows that are right."""
    return 100.0 * float(np.mean(predicted == gold))


def _of_all(statistic: Statistic, rows: int) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(statistic(np.ones((1, rows)))[0])


def f1(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Of the label "1"; arrays of strings."""
    return _of_all(intervals.f1(predicted == "1", gold == "1", True), len(gold))


def acc_and_f1(predicted: np.ndarray, gold: np.ndarray) -> float:
    """The mean of both, GLUE's number for MRPC and QQP."""
    return (accuracy(predicted, gold) + f1(predicted, gold)) / 2


def matthews(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Matthews' correlation, for any number of labels."""
    labels, numbers = np.unique(np.concatenate([predicted, gold]), return_inverse=True)
    first, second = np.split(numbers, 2)
    return _of_all(intervals.matthews(first, second, len(labels)), len(gold))


def pearson(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Pearson's correlation of numbers; nan where one side is constant."""
    return _of_all(intervals.pearson(predicted, gold), len(gold))


def spearman(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Spearman's correlation: Pearson's of the ranks."""
    return _of_all(intervals.spearman(predicted, gold), len(gold))


def pearson_and_spearman(predicted: np.ndarray, gold: np.ndarray) -> float:
    """The mean of both, GLUE's number for STS-B."""
    return (pearson(predicted, gold) + spearman(predicted, gold)) / 2


def top1(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Percent of a ranking's groups whose pick is right: "1" stands for the pick, and for right."""
    return accuracy(gold[predicted == RIGHT], RIGHT)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "acc_and_f1": acc_and_f1,
    "mcc": matthews,
    "top1": top1,
    "pearson": pearson,
    "spearman": spearman,
    "pearson_and_spearman": pearson_and_spearman,
}


def score(names: Sequence[str], predicted: Sequence[str], gold: Sequence[str], numbers: bool) -> dict[str, float]:
    """The named metrics of labels, or of ``numbers`` as they stand in the files."""
    arrays: tuple[np.ndarray, ...] = tuple(
        np.array(values, dtype=float) if numbers else np.array(values, dtype=str) for values in (predicted, gold)
    )
    return {name: METRICS[name](*arrays) for name in names}
