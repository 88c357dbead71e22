"""Where a perturbation of one batch begins: noise that belongs to the example and the update, and its unit."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..encoder import Forward
from ..method.adversary import Adversary
from ..method.relative import unit_of


class Drawn(NamedTuple):
    """Noise, its unit and its place.

    noise: [B, T, C], float32 or wider whatever the model's precision, as the distribution has it; also at padding.
    unit: [B, 1, 1] or [B, T, 1], what relative sizes are shares of; [1, 1, 1] of 1, which changes no bit, in absolute
        units.
    mask: [B, T, 1], 1 at real tokens.
    """

    noise: Tensor
    unit: Tensor
    mask: Tensor


def drawn(
    forward: Forward, sample: dict[str, Any], draw: Callable[..., Tensor], adversary: Adversary, relative: bool
) -> Drawn:
    """Draw for a batch as fairseq makes it; ``draw``: `example_noise` or `uniform_noise`."""
    encoder, table = forward.encoder, forward.encoder.table
    mask = encoder.mask(sample["net_input"]["src_tokens"])
    # seeded as fairseq seeds torch on every worker: with its --seed plus the update's number
    noise = draw(sample["id"], mask.shape[1], table.shape[1], seed=torch.initial_seed())
    noise = noise.to(torch.promote_types(table.dtype, torch.float32))
    unit = noise.new_ones(1, 1, 1)
    if relative:
        unit = unit_of(encoder.embeddings(forward.place, sample["net_input"]), mask, adversary).to(noise.dtype)
    return Drawn(noise, unit, mask)
