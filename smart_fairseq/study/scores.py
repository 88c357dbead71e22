"""What a run's stored logits say: the task's metrics, cross entropy, calibration. Arrays in, plain numbers out."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..evaluation.calibration import brier, calibration_error, cross_entropy, fit_line, fit_temperature
from ..evaluation.draws import split_in_halves
from ..evaluation.metrics import score


def measures(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Cross entropy in nats, calibration error in percent, Brier score from 0 to 2."""
    return {
        "cross_entropy": float(cross_entropy(logits, labels).mean()),
        "calibration_error": float(calibration_error(logits, labels)(np.ones((1, len(labels))))[0]),
        "brier": float(brier(logits, labels).mean()),
    }


def all_scores(
    logits: np.ndarray, labels: np.ndarray, metrics: Sequence[str], classes: Sequence[str], seed: int
) -> dict[str, float]:
    """Everything that a report can show: the ``metrics`` of `evaluation.metrics` in percent, and more.

    Logits [N, K] with labels [N], class numbers for the names of ``classes``; for regression [N, 1] with targets, and
    no classes. ``seed`` draws the half of the rows that fits the temperature, for regression a straight line; what
    follows it is of the other half.
    """
    logits = logits.astype(np.float64)
    fitted_on, half = split_in_halves(len(labels), seed)
    if not classes:
        predicted = logits[:, 0]
        found = score(metrics, list(map(str, predicted)), list(map(str, labels)), True)
        slope, offset = fit_line(predicted[fitted_on], labels[fitted_on])
        errors, scaled = predicted - labels, slope * predicted + offset - labels
        found |= {"squared_error": float((errors**2).mean()), "mean_error": float(errors.mean()), "slope": slope}
        halves = {"squared_error_half": errors, "squared_error_scaled": scaled}
        return found | {name: float((values[half] ** 2).mean()) for name, values in halves.items()}
    names = np.array(classes)
    found = score(metrics, list(names[logits.argmax(1)]), list(names[labels]), False)
    found |= measures(logits, labels)
    found["temperature"] = fit_temperature(logits[fitted_on], labels[fitted_on])
    before, after = (measures(logits[half] / divisor, labels[half]) for divisor in (1, found["temperature"]))
    for name in ("cross_entropy", "calibration_error"):
        found |= {f"{name}_half": before[name], f"{name}_scaled": after[name]}
    return found


def scores_elsewhere(
    name: str, stored: Mapping[str, np.ndarray], metrics: Sequence[str], classes: Sequence[str], seed: int
) -> dict[str, float]:
    """`all_scores` of the rows of another folder, as ``accuracy_on_NAME`` and so on."""
    found = all_scores(stored[f"logits_on_{name}"], stored[f"labels_on_{name}"], metrics, classes, seed)
    return {f"{metric}_on_{name}": value for metric, value in found.items()}
