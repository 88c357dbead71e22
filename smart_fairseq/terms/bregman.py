"""The Bregman term: how far the output has moved from the teacher's.

Paper: Jiang et al. (2020), equation 3: D_Breg = mean_i l_s(f(x_i; theta), f(x_i; theta~)).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ..encoder import Forward
from ..method.divergence import Divergence
from . import TermValue


def teacher_output(forward: Forward, weights: Mapping[str, Tensor], perturbation: Tensor | None = None) -> Tensor:
    """The teacher's logits [B, K], without dropout and without gradients."""
    # --encoder-layerdrop draws in evaluation too: the passes after this one have the masks that they have without it
    with torch.no_grad(), forward.encoder.without_dropout(), torch.random.fork_rng([]):
        return forward(forward.encoder.cast(weights), perturbation)


@contextmanager
def bregman(
    forward: Forward, weights: Mapping[str, Tensor], divergence: Divergence, perturbation: Tensor | None = None
) -> Iterator[Callable[[Tensor], TermValue]]:
    """D_Breg of one batch, as a `Term`.

    Args:
        weights: the teacher's, by parameter name.
        perturbation: [B, T, C], where the task loss is taken at a perturbed point: there the outputs are compared.
    """
    target = teacher_output(forward, weights, perturbation)
    yield lambda clean: TermValue(divergence(clean, target).sum())
