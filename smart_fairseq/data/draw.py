"""Parts of the training rows that are drawn: nested subsets, and a share that is held out."""

import itertools
import random
from collections.abc import Mapping, Sequence

from ..errors import UsageError
from .lines import Row
from .tasks import Task


def nested_order(rows: Sequence[Row], seed: int, classes: bool = True) -> list[int]:
    """Positions of the rows so that the first n are the subset of size n, for every n.

    Class by class in turn, each class shuffled: a subset holds equally many rows of each class for as long as the
    smallest class lasts. Without ``classes`` (regression) a plain shuffle.
    """
    generator = random.Random(seed)
    by_class: dict[str | None, list[int]] = {}
    for place, row in enumerate(rows):
        by_class.setdefault(row.label if classes else None, []).append(place)
    piles = [by_class[key] for key in sorted(by_class, key=str)]
    for pile in piles:
        generator.shuffle(pile)
    return [place for turn in itertools.zip_longest(*piles) for place in turn if place is not None]


def subset(rows: Sequence[Row], fraction: float, order: Sequence[int]) -> list[Row]:
    """The rows of this fraction (at least one), in the order of the file."""
    count = max(1, round(fraction * len(rows)))
    return [rows[place] for place in sorted(order[:count])]


def held_out(task: Task, rows: Mapping[str, list[Row]], share: float, seed: int) -> dict[str, list[Row]]:
    """All splits, with a share of the training rows, every class by its own, as a valid one. Raises `UsageError`."""
    name, train = task.name, rows.get("train", [])
    if "valid" in rows:
        raise UsageError(f"--hold-out is given, and {name} has a valid split of its own; leave it out")
    if task.ranking or task.candidates:
        raise UsageError(f"--hold-out takes rows, and those of {name} belong together; leave it out")
    by_class: dict[str | None, list[int]] = {}
    for place, row in enumerate(train):
        by_class.setdefault(None if task.regression else row.label, []).append(place)
    held: set[int] = set()
    for label in sorted(by_class, key=str):
        held.update(random.Random(f"{seed} {label}").sample(by_class[label], round(share * len(by_class[label]))))
    parts = {"train": [row for place, row in enumerate(train) if place not in held]}
    parts["valid"] = [train[place] for place in sorted(held)]
    if not all(parts.values()):
        raise UsageError(f"--hold-out {share:g} of {len(train)} training rows leaves one of the two parts empty")
    return {**rows, **parts}
