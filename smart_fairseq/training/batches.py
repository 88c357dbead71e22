"""Batches of several data sets, each batch of one of them, in proportion to their sizes or to a power of these."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from fairseq.data import ConcatDataset, FairseqDataset, data_utils

from ..method.ranking import group_places

# of a batch, and of what is logged of it: the number of its task
TASK = "multitask"
# of a batch of a ranking: `method.ranking`'s places of its groups
GROUPS = "groups"


def shares(sizes: Sequence[int], exponent: float) -> list[int]:
    """As many as ``sizes`` has together, dealt in proportion to size^exponent; at least one of each.

    What is left by rounding down goes to those that lost most by it.

    >>> shares([90, 10], 1.0), shares([90, 10], 0.5), shares([90, 10], 0.0)
    ([90, 10], [75, 25], [50, 50])
    """
    if exponent == 1:
        return list(sizes)
    weights = np.array(sizes, dtype=float) ** exponent
    exact = sum(sizes) * weights / weights.sum()
    dealt = np.floor(exact).astype(int)
    most_lost = np.argsort(dealt - exact, kind="stable")[: sum(sizes) - int(dealt.sum())]
    dealt[most_lost] += 1
    return [max(1, int(count)) for count in dealt]


def in_turn(count: int, size: int, epoch: int, seed: Sequence[int]) -> list[int]:
    """Which ``count`` of ``size`` batches an epoch takes, so that over the epochs each comes as often as the others.

    They are a piece of an endless row of permutations, which ``seed`` determines; all of them in order where an epoch
    takes each once. ``epoch`` counts from 1.
    """
    if count == size:
        return list(range(size))
    start = (epoch - 1) * count
    rounds = range(start // size, (start + count - 1) // size + 1)
    orders = [np.random.default_rng([*seed, number]).permutation(size) for number in rounds]
    first = start - rounds[0] * size
    return [int(place) for place in np.concatenate(orders)[first : first + count]]


class Groups(FairseqDataset):
    """A data set whose examples are groups of rows.

    Args:
        longest: tokens of each group's longest row.
        counts: rows of each group.
        seed: of the groups' order; None: as they stand.
    """

    def __init__(self, longest: np.ndarray, counts: np.ndarray, seed: int | None) -> None:
        super().__init__()
        self.sizes, self.counts, self.seed = [longest], counts, seed

    def __len__(self) -> int:
        return len(self.counts)

    def size(self, index: int) -> int:
        return int(self.sizes[0][index])

    def num_tokens(self, index: int) -> int:
        return self.size(index) * int(self.counts[index])

    def ordered_indices(self) -> np.ndarray:
        if self.seed is None:
            return np.arange(len(self))
        with data_utils.numpy_seed(self.seed):  # as fairseq orders the rows of other tasks
            return np.random.permutation(len(self))


class GroupedDataset(Groups):
    """The groups of a ranking; ``rows`` are those of all groups, one group after the other."""

    def __init__(self, rows: FairseqDataset, counts: Sequence[int], seed: int | None) -> None:
        sizes = np.array(counts)
        self.rows, self.ends = rows, np.cumsum(sizes)
        super().__init__(np.maximum.reduceat(np.asarray(rows.sizes[0]), self.ends - sizes), sizes, seed)

    def __getitem__(self, index: int) -> list[Any]:
        end = int(self.ends[index])
        return [self.rows[row] for row in range(end - int(self.counts[index]), end)]

    def collater(self, samples: Sequence[list[Any]]) -> dict[str, Any]:
        """The batch of the groups' rows, with their places under ``GROUPS``."""
        rows = [row for group in samples for row in group]
        return {**self.rows.collater(rows), GROUPS: group_places([len(group) for group in samples])}


class MultitaskDataset(ConcatDataset):
    """The rows of several data sets, one set after the other.

    Args:
        datasets: by the number of their task.
        exponent: of the sizes, counted in batches; 1 takes each batch once an epoch.
        seed: of the order in which the batches of a task come where an epoch does not take each once.
    """

    def __init__(self, datasets: Mapping[int, FairseqDataset], exponent: float = 1.0, seed: int = 1) -> None:
        super().__init__(datasets.values())
        self.numbers, self.exponent, self.seed, self.epoch = list(datasets), exponent, seed, 1

    def _parts(self) -> Iterator[tuple[int, int, FairseqDataset]]:
        return zip(self.numbers, [0, *self.cumulative_sizes], self.datasets)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        place, _ = self._get_dataset_and_sample_index(index)
        return place, super().__getitem__(index)

    def collater(self, samples: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        """The batch as its own data set makes it, ids included, with the number of its task under ``TASK``."""
        if not samples:
            return {}
        (place,) = {place for place, _ in samples}
        return {**self.datasets[place].collater([sample for _, sample in samples]), TASK: self.numbers[place]}

    def num_tokens(self, index: int) -> int:
        place, row = self._get_dataset_and_sample_index(index)
        return int(self.datasets[place].num_tokens(row))

    def ordered_indices(self) -> np.ndarray:
        return np.concatenate([dataset.ordered_indices() + start for _, start, dataset in self._parts()])

    def batch_by_size(self, indices: np.ndarray, **limits: Any) -> list[np.ndarray]:
        """What each data set makes of its own, as many of each task as this epoch takes."""
        found = []
        for number, start, dataset in self._parts():
            own = indices[(indices >= start) & (indices < start + len(dataset))]
            batches = dataset.batch_by_size(own - start, **limits) if len(own) else []
            found.append((number, [np.asarray(batch) + start for batch in batches]))
        found = [(number, batches) for number, batches in found if batches]
        counts = shares([len(batches) for _, batches in found], self.exponent)
        return [
            batches[place]
            for (number, batches), count in zip(found, counts)
            for place in in_turn(count, len(batches), self.epoch, [self.seed, number])
        ]

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        return self.exponent == 1

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.epoch = epoch
