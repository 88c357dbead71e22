"""Which rows an evaluation draws by its seed: the same for all models, in `evaluate --full` and in studies."""

import numpy as np

_ATTACK = 1  # another draw than the half that fits the temperature


def split_in_halves(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that a temperature, or a regression's line, is fitted on, and the others."""
    order = np.random.default_rng(seed).permutation(rows)
    return order[: rows // 2], order[rows // 2 :]


def rows_to_attack(rows: int, count: int, seed: int) -> np.ndarray:
    """At most ``count`` of the rows, rising."""
    return np.sort(np.random.default_rng([seed, _ATTACK]).permutation(rows)[:count])
