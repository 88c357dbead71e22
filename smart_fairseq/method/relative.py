"""A unit for the perturbation: the size of what is perturbed, example by example.

The same radius is nothing for one encoder and everything for another, whose embeddings are a tenth as large. Relative
to the embeddings' root mean square r over an example's real tokens it means the same for both: in the norm "inf" the
radius is e r, in the norm "l2" e |x|_2 = e r sqrt(number of entries). The noise's standard deviation and the ascent
step are in the same unit.
"""

import torch
from torch import Tensor

from .adversary import Adversary


def unit_of(embeddings: Tensor, mask: Tensor, adversary: Adversary) -> Tensor:
    """The size of an example's (scope "example") or a token's embeddings: what a relative size is a share of.

    Args:
        embeddings: [B, T, C], what is perturbed, any float dtype.
        mask: [B, T, 1], 1 at real tokens, 0 at padding, which does not count.
    Returns:
        [B, 1, 1] or [B, T, 1], float32 or wider, without a gradient: root mean square ("inf") or length ("l2").

    >>> x, mask = torch.tensor([[[3.0, 4.0], [9.0, 9.0]]]), torch.tensor([[[1.0], [0.0]]])
    >>> unit_of(x, mask, Adversary(norm="l2")).item()
    5.0
    >>> round(unit_of(x, mask, Adversary(norm="inf")).item() ** 2, 4)  # (9 + 16) / 2
    12.5
    """
    wide = embeddings.detach().to(torch.promote_types(embeddings.dtype, torch.float32))
    over = (1, 2) if adversary.scope == "example" else (2,)
    squares = (wide * mask).square().sum(dim=over, keepdim=True)
    return (squares if adversary.norm == "l2" else squares / _entries(wide, mask, adversary)).sqrt()


def noise_in_units(noise: Tensor, mask: Tensor, adversary: Adversary) -> Tensor:
    """Noise whose standard deviation is in root mean squares, in the unit of the norm. [B, T, C] -> [B, T, C].

    >>> noise_in_units(torch.ones(1, 2, 2), torch.ones(1, 2, 1), Adversary(norm="l2")).flatten().tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    return noise / _entries(noise, mask, adversary).sqrt() if adversary.norm == "l2" else noise


def _entries(tensor: Tensor, mask: Tensor, adversary: Adversary) -> Tensor:
    """How many entries of [B, T, C] a norm is taken over, [B, 1, 1]."""
    tokens = mask.sum(dim=1, keepdim=True) if adversary.scope == "example" else mask.new_ones(len(mask), 1, 1)
    return tokens.to(tensor.dtype) * tensor.shape[2]
