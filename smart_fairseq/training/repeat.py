"""Several updates on each batch: what fairseq's iterator of the training set gives is given several times in a row.

With ``--update-freq`` the batches of an update together: a b a b c d c d. Order, workers and resuming stay fairseq's;
an epoch is as many times as long.
"""

import functools
from collections.abc import Sequence
from typing import Any

from fairseq.data.iterators import EpochBatchIterator


class RepeatedBatches(EpochBatchIterator):
    """fairseq's iterator, made into one of these by `repeat_batches`."""

    times: int
    update_freq: Sequence[int]  # by epoch; the last one holds from there on

    def _group(self, epoch: int) -> int:
        return int(self.update_freq[min(epoch, len(self.update_freq)) - 1])

    def __len__(self) -> int:
        group = self._group(self.epoch)
        once: int = super().__len__()
        return -(-once // group) * group * self.times

    def ordered_batches(self, epoch: int, fix_batches_to_gpus: bool, shuffle: bool) -> list[list[int]]:
        batches = list(super().ordered_batches(epoch, fix_batches_to_gpus, shuffle))
        size = self._group(epoch)
        left = len(batches) % size
        if left:
            # spread over a whole update: an empty batch, which only keeps a worker in step, would end it as the last
            # of its batches, and fairseq then leaves the others out of the number that it divides the gradient by
            examples = [example for batch in batches[-left:] for example in batch]
            if examples:  # each as often as it takes to fill all of them: the gradient stays the mean
                examples *= -(-size // len(examples))
            batches[-left:] = [examples[first::size] for first in range(size)]
        groups = [batches[first : first + size] for first in range(0, len(batches), size)]
        return [batch for group in groups for _ in range(self.times) for batch in group]


def repeat_batches(task: Any, train_subset: str, times: int, update_freq: Sequence[int]) -> None:
    """Let the task's iterator of ``train_subset`` give each batch ``times`` times."""
    get_batch_iterator = task.get_batch_iterator

    @functools.wraps(get_batch_iterator)
    def get_repeated(dataset: Any, **options: Any) -> Any:
        iterator = get_batch_iterator(dataset, **options)
        if dataset is task.datasets.get(train_subset):
            iterator.__class__ = RepeatedBatches
            iterator.times, iterator.update_freq = times, update_freq
        return iterator

    task.get_batch_iterator = get_repeated
