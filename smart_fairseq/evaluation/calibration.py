"""How far probabilities can be trusted: cross entropy, Brier score, calibration error, temperature.

| source | here |
| --- | --- |
| Guo et al. (2017), equation 3 | `calibration_error`, 15 bins of equal width, of the most probable class |
| Guo et al. (2017), section 4.2 | `fit_temperature`: one T for all classes, logits / T |
| Brier (1950) | `brier`: summed over the classes, 0 to 2 |

Arrays are [N, K] (rows, classes) and [N]; the gold classes are int64 [N]. Entropies are in nats.
"""

import numpy as np
from scipy.special import entr, log_softmax

from .intervals import Statistic

BINS = 15
LOWEST, HIGHEST = 0.1, 100.0  # of a temperature: rows that are all right know no lower bound


def cross_entropy(logits: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """-log p(gold) of each row, [N]."""
    return np.asarray(-log_softmax(logits, axis=1)[np.arange(len(gold)), gold])


def brier(logits: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """The squared distance of each row's probabilities from the gold class, [N].

    >>> brier(np.array([[0.0, np.log(3)]]), np.array([1])).round(6)  # 0.25^2 + 0.25^2
    array([0.125])
    """
    probabilities = np.exp(log_softmax(logits, axis=1))
    return np.asarray(((probabilities - np.eye(logits.shape[1])[gold]) ** 2).sum(1))


def divergence_from(shares: np.ndarray, log_probabilities: np.ndarray) -> np.ndarray:
    """KL(shares, model) of each row, [N]; ``shares`` [N, K] sum to 1."""
    return np.asarray(-(entr(shares) + shares * log_probabilities).sum(1))


def bins_of(confidence: np.ndarray) -> np.ndarray:
    """The bin of each row, 0 to 14: bin m holds (m / 15, (m + 1) / 15]."""
    return np.asarray(np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1))


def calibration_error(logits: np.ndarray, gold: np.ndarray, among: np.ndarray | None = None) -> Statistic:
    """Expected calibration error in percent: the bins' |accuracy - confidence|, weighted by their rows.

    Args:
        among: bool [N], the rows that count; None: all.
    """
    probabilities = np.exp(log_softmax(logits, axis=1))
    confidence = probabilities.max(1)
    used = np.ones(len(gold)) if among is None else among.astype(float)
    gaps = np.zeros((len(gold), BINS))
    gaps[np.arange(len(gold)), bins_of(confidence)] = ((logits.argmax(1) == gold) - confidence) * used

    def statistic(weights: np.ndarray) -> np.ndarray:
        return np.asarray(100.0 * np.abs(weights @ gaps).sum(1) / (weights @ used))

    return statistic


def reliability(logits: np.ndarray, gold: np.ndarray) -> dict[str, list[float | None]]:
    """Of each bin its rows, mean confidence and accuracy (0 to 1); None where it is empty."""
    confidence = np.exp(log_softmax(logits, axis=1)).max(1)
    right, place = logits.argmax(1) == gold, bins_of(confidence)
    rows = np.bincount(place, minlength=BINS)

    def means(values: np.ndarray) -> list[float | None]:
        sums = np.bincount(place, values, BINS)
        return [float(total / count) if count else None for total, count in zip(sums, rows)]

    return {"rows": rows.tolist(), "confidence": means(confidence), "accuracy": means(right.astype(float))}


def fit_temperature(logits: np.ndarray, gold: np.ndarray) -> float:
    """The T at which logits / T have the least cross entropy, between 0.1 and 100.

    The cross entropy is convex in 1 / T with the slope mean(E_p[z] - z_gold), so its zero is found by halving. Where
    all rows are right, none is found and T is the lowest; where the model is no better than chance, the highest.

    Three of four rows right, each with a logit of 2 for its class: 1 / (1 + exp(-2 / T)) = 3 / 4, T = 2 / log 3:

    >>> logits = np.array([[2.0, 0.0]] * 4)
    >>> bool(np.isclose(fit_temperature(logits, np.array([0, 0, 0, 1])), 2 / np.log(3)))
    True
    """
    chosen = logits[np.arange(len(gold)), gold]

    def falls(temperature: float) -> bool:
        """Does a larger temperature lower the cross entropy?"""
        scaled = np.exp(log_softmax(logits / temperature, axis=1))
        return bool(((scaled * logits).sum(1) - chosen).mean() > 0)

    low, high = np.log(LOWEST), np.log(HIGHEST)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falls(np.exp(middle)) else (low, middle)
    return float(np.exp((low + high) / 2))


def fit_line(predicted: np.ndarray, gold: np.ndarray) -> tuple[float, float]:
    """Slope and offset of the straight line by which a regression's outputs come nearest to the targets.

    What a temperature is to classes: it takes away an error of scale and one of place. Least squares; slope 0 where all
    outputs are one.

    >>> fit_line(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    (2.0, 0.0)
    """
    apart = predicted - predicted.mean()
    spread = float((apart**2).sum())
    slope = float((apart * gold).sum()) / spread if np.ptp(predicted) else 0.0
    return slope, float(gold.mean() - slope * predicted.mean())
