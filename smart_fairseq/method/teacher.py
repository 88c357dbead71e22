"""The teacher: an exponential moving average of the weights.

Paper: Jiang et al. (2020), section 3.2, equations 2 (VBPP) and 3 (MBPP), Algorithm 1, line 12:
theta~ <- (1 - beta) theta + beta theta~. beta multiplies the old teacher, as in optax and timm.

Deviation: none. With momentum 0 the teacher is the previous outer iterate (VBPP), with 1 it stays at
the pretrained weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


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
    wide = [weight.to(average.dtype) for average, weight in zip(teacher, weights)]
    torch._foreach_lerp_(list(teacher), wide, 1.0 - momentum)
