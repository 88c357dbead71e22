"""Perturbations that are kept from one epoch to the next, instead of being found anew.

An approximation to Algorithm 1 of Jiang et al. (2020), after free adversarial training (Shafahi et al., 2019,
"Adversarial training for free!", algorithm 1): the backward pass of training also yields the gradient with
respect to the perturbation; the ascent step along it is taken then, and used when the example comes again.
"""

import torch
from torch import Tensor

from .adversary import Adversary, normalize, project

__all__ = ["PerturbationMemory"]


class PerturbationMemory:
    """The last perturbation of each example, in the host's memory, two bytes for each token and channel.

    It is not saved with a checkpoint: after a resumption, perturbations are found anew.
    """

    def __init__(self, adversary: Adversary) -> None:
        self.adversary = adversary
        self._kept: dict[int, Tensor] = {}

    def recall(self, example_ids: Tensor, like: Tensor) -> Tensor | None:
        """The perturbations of a batch, or None if there is one that is not known.

        Args:
            example_ids: [B], int64.
            like: [B, T, C], gives shape and device; an example's own may be shorter or longer.
        Returns:
            [B, T, C], float32 or wider.
        """
        kept = [self._kept.get(number) for number in example_ids.tolist()]
        if not kept or any(perturbation is None for perturbation in kept):
            return None
        found = torch.zeros(like.shape)
        for row, perturbation in zip(found, kept):
            length = min(len(perturbation), len(row))  # type: ignore[arg-type]
            row[:length] = perturbation[:length]  # type: ignore[index]
        return (found * self.adversary.size).to(like.device, torch.promote_types(like.dtype, torch.float32))

    def watched(self, example_ids: Tensor, perturbation: Tensor, mask: Tensor) -> Tensor:
        """The perturbation [B, T, C] as a leaf: when its gradient comes, it is moved along it and kept.

        Args:
            example_ids: [B], int64.
            mask: [B, T, 1], 1 at real tokens.
        """
        leaf = perturbation.detach().requires_grad_()

        def move(gradient: Tensor) -> None:
            direction = normalize(gradient.to(leaf.dtype) * mask, self.adversary)
            # where the gradient overflowed, it stays
            direction = torch.where(direction.isfinite(), direction, torch.zeros_like(direction))
            moved = project(leaf.detach() + self.adversary.step_size * direction, self.adversary)
            lengths = mask.sum(dim=(1, 2)).long().tolist()
            for number, row, length in zip(example_ids.tolist(), (moved / self.adversary.size).half().cpu(), lengths):
                self._kept[number] = row[:length].clone()  # padding is on the right

        leaf.register_hook(move)  # type: ignore[no-untyped-call]
        return leaf
