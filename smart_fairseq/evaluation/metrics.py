"""The official metrics of the tasks, of rows that each count so often (`intervals`); percent, as fairseq logs them.

F1 is that of class "1" (MRPC, QQP); Matthews is the multi-class R_K of Gorodkin (2004), which GLUE uses for AX and
which is the ordinary coefficient for CoLA. Where scikit-learn and scipy define a value for a degenerate case,
so do these: 0 for F1 without positives and for Matthews without variation, nan for correlations of a constant.
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, median, stdev

import numpy as np

from ..data.tasks import RIGHT
from .intervals import Statistic, mean_of

# what was predicted and what is right, [N]: labels, or numbers -> the metric of weighted rows
Metric = Callable[[np.ndarray, np.ndarray], Statistic]


def accuracy(predicted: np.ndarray, gold: np.ndarray) -> Statistic:
    """Share of rows that are right."""
    return mean_of(100.0 * (predicted == gold))


def f1(predicted: np.ndarray, gold: np.ndarray) -> Statistic:
    """Of the label "1"; arrays of strings."""
    said, true = ((labels == "1").astype(float) for labels in (predicted, gold))
    return lambda weights: np.asarray(200.0 * (weights @ (said * true)) / np.maximum(weights @ (said + true), 1.0))


def matthews(predicted: np.ndarray, gold: np.ndarray) -> Statistic:
    """Matthews' correlation, for any number of labels."""
    labels, numbers = np.unique(np.concatenate([predicted, gold]), return_inverse=True)
    said_by_row, true_by_row = np.split(np.eye(len(labels))[numbers], 2)
    right = (predicted == gold).astype(float)

    def statistic(weights: np.ndarray) -> np.ndarray:
        count, hits = weights.sum(1), weights @ right
        said, true = weights @ said_by_row, weights @ true_by_row
        spread = (count**2 - (said**2).sum(1)) * (count**2 - (true**2).sum(1))
        covariance = hits * count - (said * true).sum(1)
        return np.where(spread > 0, 100.0 * (covariance / np.sqrt(np.maximum(spread, 1.0))), 0.0)

    return statistic


def _correlation(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Values [N] or [R, N], weights [R, N]."""

    def mean(values: np.ndarray) -> np.ndarray:
        return np.asarray((weights * values).sum(1, keepdims=True) / weights.sum(1, keepdims=True))

    def differ(values: np.ndarray) -> np.ndarray:
        """Of a constant, deviations from the mean are not 0 but what was rounded."""
        drawn = weights > 0
        return np.asarray(np.where(drawn, values, -np.inf).max(1) > np.where(drawn, values, np.inf).min(1))

    known = differ(first) & differ(second)
    first, second = first - mean(first), second - mean(second)
    found = (mean(first * second) / np.sqrt(mean(first**2) * mean(second**2)))[:, 0]
    return np.where(known, 100.0 * found, np.nan)


def pearson(predicted: np.ndarray, gold: np.ndarray) -> Statistic:
    """Pearson's correlation of numbers."""
    return lambda weights: _correlation(predicted, gold, weights)


def spearman(predicted: np.ndarray, gold: np.ndarray) -> Statistic:
    """Spearman's correlation: Pearson's of the ranks that the rows have in each sample."""

    def ranks_of(values: np.ndarray) -> Statistic:
        order = np.argsort(values, kind="stable")
        distinct, group = np.unique(values, return_inverse=True)
        starts = np.searchsorted(values[order], distinct)

        def ranks(weights: np.ndarray) -> np.ndarray:
            drawn = np.add.reduceat(weights[:, order], starts, axis=1)
            return np.asarray((np.cumsum(drawn, 1) - (drawn - 1) / 2)[:, group])

        return ranks

    first, second = ranks_of(predicted), ranks_of(gold)
    return lambda weights: _correlation(first(weights), second(weights), weights)


def top1(predicted: np.ndarray, gold: np.ndarray) -> Statistic:
    """Share of a ranking's groups whose pick is right: "1" stands for the pick, and for right."""
    return mean_of(100.0 * (gold == RIGHT), predicted == RIGHT)


def _mean_of_two(first: Metric, second: Metric) -> Metric:
    """GLUE's number for tasks with two metrics."""

    def both(predicted: np.ndarray, gold: np.ndarray) -> Statistic:
        one, other = first(predicted, gold), second(predicted, gold)
        return lambda weights: (one(weights) + other(weights)) / 2

    return both


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "acc_and_f1": _mean_of_two(accuracy, f1),
    "mcc": matthews,
    "top1": top1,
    "pearson": pearson,
    "spearman": spearman,
    "pearson_and_spearman": _mean_of_two(pearson, spearman),
}


def value_of(name: str, predicted: np.ndarray, gold: np.ndarray) -> float:
    """The named metric of rows that each count once."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(METRICS[name](predicted, gold)(np.ones((1, len(gold))))[0])


def score(names: Sequence[str], predicted: Sequence[str], gold: Sequence[str], numbers: bool) -> dict[str, float]:
    """The named metrics of labels, or of ``numbers`` as they stand in the files."""
    said, true = (np.array(values, dtype=float if numbers else str) for values in (predicted, gold))
    return {name: value_of(name, said, true) for name in names}


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, median and standard deviation (with n - 1), all nan where a value is; of one value the deviation is.

    >>> over_seeds([1.0, 3.0]), over_seeds([1.0, math.nan])
    ((2.0, 2.0, 1.4142135623730951), (nan, nan, nan))
    """
    if not all(map(math.isfinite, values)):  # at which statistics' own fail, or sort
        return math.nan, math.nan, math.nan
    return fmean(values), median(values), stdev(values) if len(values) > 1 else math.nan
