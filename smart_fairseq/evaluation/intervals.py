"""Bootstrap intervals over rows: percentiles of a metric over samples of the rows, drawn with replacement.

Source: Efron and Tibshirani (1993), chapter 13. A sample is how often it holds each row, so a metric is a function
from such weights to values, and all metrics of all models take the same samples: differences are paired.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

RESAMPLES, LEVEL = 2000, 95.0
_BLOCK = 4_000_000  # weights at a time

# how often each row counts [R, N] -> values [R]
Statistic = Callable[[np.ndarray], np.ndarray]


def samples(rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each row was drawn, [R, N] float64, in blocks of samples."""
    draw = np.random.default_rng(seed)
    block = max(1, _BLOCK // rows)
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        places = draw.integers(0, rows, (count, rows)) + rows * np.arange(count)[:, None]
        yield np.bincount(places.ravel(), minlength=count * rows).reshape(count, rows).astype(float)


def resampled(
    statistics: Mapping[str, Statistic], rows: int, resamples: int = RESAMPLES, seed: int = 1
) -> dict[str, np.ndarray]:
    """Each metric of the rows as they are, then of the samples: [1 + R]; nan where it is not defined."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in statistics}
    with np.errstate(divide="ignore", invalid="ignore"):
        for weights in (np.ones((1, rows)), *samples(rows, resamples, seed)):
            for name, statistic in statistics.items():
                found[name].append(statistic(weights))
    return {name: np.concatenate(values) for name, values in found.items()}


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of the samples of `resampled` for which the metric is defined; nan where it is for none.

    >>> interval(np.arange(-1.0, 101.0))  # the first is the value itself
    (2.5, 97.5)
    """
    drawn = values[1:]
    known = drawn[np.isfinite(drawn)]
    if not known.size:
        return float("nan"), float("nan")
    low, high = np.percentile(known, [50 - LEVEL / 2, 50 + LEVEL / 2])
    return float(low), float(high)


def mean_of(values: np.ndarray, among: np.ndarray | None = None) -> Statistic:
    """The mean over the rows, or over those ``among`` which it is taken (bool [N])."""
    used = np.ones(len(values)) if among is None else among.astype(float)
    taken = np.where(used > 0, values, 0.0)
    return lambda weights: np.asarray((weights @ taken) / (weights @ used))
