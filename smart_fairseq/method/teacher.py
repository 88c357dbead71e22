"""The teacher: an exponential moving average of the weights.

Paper: Jiang et al. (2020), section 3.2, equations 2 (VBPP) and 3 (MBPP), Algorithm 1, line 12:
theta~ <- (1 - beta) theta + beta theta~. beta multiplies the old teacher, as in optax and timm.

Deviation: none. With momentum 0 the teacher is the previous outer iterate (VBPP), with 1 it stays at
the pretrained weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def momentum_at(
    update: int, *, total_updates: int, momentum: float, warmup_momentum: float, warmup_ratio: float
) -> float:
    """beta at an update: ``warmup_momentum`` for the first part of training, then ``momentum``.

    Momentum 0 (VBPP) and 1 (a frozen teacher) are modes rather than averages: they hold from the start.

    Args:
        update: number of the update, from 1.
        total_updates: updates in the whole training.
        warmup_ratio: the first part, as a fraction of ``total_updates``.
    Source: Jiang et al. (2020), section 4.1: 0.99 for t <= 0.1 T, then 0.999.

    >>> paper = dict(total_updates=1000, momentum=0.999, warmup_momentum=0.99, warmup_ratio=0.1)
    >>> momentum_at(100, **paper), momentum_at(101, **paper)
    (0.99, 0.999)
    """
    if momentum in (0.0, 1.0):
        return momentum
    return warmup_momentum if update <= warmup_ratio * total_updates else momentum


def momentum_for(memory: float) -> float:
    """The momentum at which the teacher remembers about the last ``memory`` updates, 1 / (1 - beta).

    >>> momentum_for(100)
    0.99
    """
    return max(0.0, 1.0 - 1.0 / memory)


@torch.no_grad()
def average_(teacher: Sequence[Tensor], weights: Sequence[Tensor], momentum: float) -> None:
    """theta~ <- (1 - beta) theta + beta theta~, in place, in the teacher's precision.

    Args:
        teacher: tensors, float32 or wider: with beta 0.999 a half-precision average stands still.
        weights: tensors of the same shapes, any float dtype.

    >>> teacher = [torch.tensor([1.0])]
    >>> average_(teacher, [torch.tensor([2.0])], momentum=0.9)
    >>> teacher  # 0.9 * 1 + 0.1 * 2
    [tensor([1.1000])]
    """
    if momentum == 1.0:
        return
    if momentum == 0.0:  # exactly the weights: an interpolation would round
        for average, weight in zip(teacher, weights):
            average.copy_(weight)
        return
    wide = [weight.to(average.dtype) for average, weight in zip(teacher, weights)]
    torch._foreach_lerp_(list(teacher), wide, 1.0 - momentum)
