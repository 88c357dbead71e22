"""What is added to the task loss.

A term is a context around the clean pass. On entering it does what needs nothing of that pass, while there are no
activations to keep; within, it watches the pass; what it yields is called once with the clean logits [B, K] after the
pass has returned, and gives a `TermValue`:

    with term as value:
        clean = ...             # the ordinary forward, whatever wraps it
    found = value(clean)
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

from torch import Tensor


class TermValue(NamedTuple):
    """A term of one batch.

    value: summed over the batch, unweighted, float32 or wider, differentiable.
    size: of the perturbation, its norms summed over the batch; None for a term without one.
    perturbation: [B, T, C], float32 or wider, detached.
    beside: added to the loss without a weight, like the value a sum over the batch; None for nothing.
    """

    value: Tensor
    size: Tensor | None = None
    perturbation: Tensor | None = None
    beside: Tensor | None = None


Term = AbstractContextManager[Callable[[Tensor], TermValue]]
