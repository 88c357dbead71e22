"""The official metrics of the tasks, as pure functions of arrays; all in percent, as fairseq logs them.

F1 is that of class "1" (MRPC, QQP); Matthews is the multi-class R_K of Gorodkin (2004), which GLUE uses for AX and
which is the ordinary coefficient for CoLA. Where scikit-learn and scipy define a value for a degenerate case,
so do these: 0 for F1 without positives and for Matthews without variation, nan for correlations of a constant.
"""

from collections.abc import Callable, Sequence

import numpy as np


def accuracy(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Percent of rows that are right."""
    return 100.0 * float(np.mean(predicted == gold))


def f1(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Of the label "1"; arrays of strings."""
    both = np.sum((predicted == "1") & (gold == "1"))
    either = np.sum(predicted == "1") + np.sum(gold == "1")
    return 200.0 * float(both) / float(either) if either else 0.0


def acc_and_f1(predicted: np.ndarray, gold: np.ndarray) -> float:
    """The mean of both, GLUE's number for MRPC and QQP."""
    return (accuracy(predicted, gold) + f1(predicted, gold)) / 2


def matthews(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Matthews' correlation, for any number of labels."""
    labels = np.unique(np.concatenate([predicted, gold]))
    chosen = (predicted[:, None] == labels).astype(float)
    true = (gold[:, None] == labels).astype(float)
    # covariances of the one-hot columns, summed over classes; scaled by the number of rows squared
    count = len(gold)
    hits, predictions, golds = (chosen * true).sum(), chosen.sum(0), true.sum(0)
    covariance = hits * count - predictions @ golds
    spread = (count**2 - predictions @ predictions) * (count**2 - golds @ golds)
    return 100.0 * float(covariance / np.sqrt(spread)) if spread > 0 else 0.0


def pearson(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Pearson's correlation of numbers; nan where one side is constant."""
    first, second = predicted - predicted.mean(), gold - gold.mean()
    with np.errstate(invalid="ignore", divide="ignore"):
        return 100.0 * float(first @ second / np.sqrt((first @ first) * (second @ second)))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[place]


def spearman(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Spearman's correlation: Pearson's of the ranks."""
    return pearson(_ranks(predicted), _ranks(gold))


def pearson_and_spearman(predicted: np.ndarray, gold: np.ndarray) -> float:
    """The mean of both, GLUE's number for STS-B."""
    return (pearson(predicted, gold) + spearman(predicted, gold)) / 2


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "acc_and_f1": acc_and_f1,
    "mcc": matthews,
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
