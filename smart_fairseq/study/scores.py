"""What stored logits say: the task's metrics, cross entropy, calibration. numpy arrays in, plain numbers out.

Calibration error and temperature: Guo et al. (2017), arXiv:1706.04599, sections 2 and 4.2.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from ..data.metrics import score

__all__ = ["all_scores", "brier", "calibration_error", "cross_entropy", "temperature"]

BINS = 15


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over rows in nats; logits [N, K], labels [N] as class numbers."""
    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


def brier(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over rows of the squared distance between probabilities and one-hot label, summed over classes: 0 to 2."""
    wrong = np.exp(log_softmax(logits, axis=1))
    wrong[np.arange(len(labels)), labels] -= 1
    return float((wrong**2).sum(1).mean())


def calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """Gap between confidence and accuracy, 0 to 1, over 15 bins of equal width, each by its share of the rows."""
    probabilities = np.exp(log_softmax(logits, axis=1))
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    # bins are open on the left, as Guo et al. write them
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(place, confidence - right, BINS)  # per bin: rows * (mean confidence - accuracy)
    return float(np.abs(gaps).sum() / len(labels))


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The number by which to divide the logits for the least cross entropy, within 0.01 to 100."""

    def loss(log_temperature: float) -> float:
        return cross_entropy(logits / math.exp(log_temperature), labels)

    return math.exp(minimize_scalar(loss, bounds=(math.log(0.01), math.log(100)), method="bounded").x)


def all_scores(
    logits: np.ndarray, labels: np.ndarray, metrics: Sequence[str], classes: Sequence[str], seed: int
) -> dict[str, float]:
    """Everything that a report can show.

    Args:
        logits: [N, K]; [N, 1] for regression
        labels: [N], class numbers; targets for regression
        metrics: of `data.metrics`, in percent
        classes: names in the order of the class numbers; none for regression
        seed: draws the half of the rows that the temperature is fitted on; what follows it is of the other half
    """
    logits = logits.astype(np.float64)
    if not classes:
        predicted = logits[:, 0]
        found = score(metrics, list(map(str, predicted)), list(map(str, labels)), True)
        return {**found, "squared_error": float(((predicted - labels) ** 2).mean())}
    names = np.array(classes)
    found = score(metrics, list(names[logits.argmax(1)]), list(names[labels]), False)
    for name, measure in MEASURES.items():
        found[name] = measure(logits, labels)
    order = np.random.default_rng(seed).permutation(len(labels))
    fitted_on, half = order[: len(order) // 2], order[len(order) // 2 :]
    found["temperature"] = temperature(logits[fitted_on], labels[fitted_on])
    for name in ("cross_entropy", "calibration_error"):
        found[f"{name}_half"] = MEASURES[name](logits[half], labels[half])
        found[f"{name}_scaled"] = MEASURES[name](logits[half] / found["temperature"], labels[half])
    return found


MEASURES = {"cross_entropy": cross_entropy, "calibration_error": calibration_error, "brier": brier}
