"""A run's weights under attack (`evaluation.attack`), before they are deleted.

For a seed all methods have the same rows attacked, from the same start. Logits are divided by a temperature that is
fitted on the half of the rows on which `scores` fits it: overconfidence alone hides the direction of an attack.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..evaluation.calibration import fit_temperature
from ..evaluation.draws import rows_to_attack, split_in_halves
from ..inference import Model

MAX_TOKENS = 1024  # of a batch: a gradient keeps activations, which a prediction does not


@dataclass(frozen=True)
class Attack:
    """What is asked for: rising radii, as shares of an example's own embeddings; so many rows, drawn by the seed."""

    radii: list[float]
    rows: int


def attacked(asked: Attack, seed: int, model: Model, logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """What a run stores beside its valid split's logits [N, K].

    ``attack_rows`` [M], ``attack_radii`` [R], and the outputs at the worst points found and at random corners of each
    ball, ``attack_loss`` and ``attack_random`` [R, M, K].

    Args:
        labels: [N], classes, or targets of a regression.
    """
    from ..evaluation.attack import attacked_outputs  # takes seconds to load

    temperature = 1.0
    if labels.dtype.kind == "i":
        half, _ = split_in_halves(len(labels), seed)
        temperature = fit_temperature(logits[half].astype(np.float64), labels[half])
    rows = rows_to_attack(len(labels), asked.rows, seed)
    chosen = np.isin(np.arange(len(labels)), rows)
    found = attacked_outputs(model, "valid", labels, chosen, temperature, MAX_TOKENS, seed, asked.radii, ["loss"])
    outputs = {f"attack_{kind}": values[:, rows].astype(np.float32) for kind, values in found.items()}
    return {"attack_rows": rows, "attack_radii": np.array(asked.radii), **outputs}


def scores_under_attack(stored: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Accuracy in percent of the attacked rows, without and with attack at each radius, and at random corners.

    For a regression the mean squared error.
    """
    rows, labels = stored["attack_rows"], stored["labels"]
    regression = labels.dtype.kind == "f"
    gold, name = labels[rows], "squared_error" if regression else "accuracy"

    def score(outputs: np.ndarray) -> float:
        if regression:
            return float(((outputs[:, 0].astype(np.float64) - gold) ** 2).mean())
        return float(100 * (outputs.argmax(1) == gold).mean())

    found = {f"{name}_attack_0%": score(stored["logits"][rows])}
    for kind, outputs in (("attack", stored["attack_loss"]), ("random", stored["attack_random"])):
        for radius, values in zip(stored["attack_radii"], outputs):
            found[f"{name}_{kind}_{100 * radius:g}%"] = score(values)
    return found
