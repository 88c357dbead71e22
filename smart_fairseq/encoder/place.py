"""Where a perturbation enters a forward.

| --smart-embedding | what is perturbed |
| --- | --- |
| token, input | the output of a module |
| normalized | the input of the embeddings' LayerNorm, as a LayerNorm without parameters would make it: SiFT |

SiFT (He et al. 2020, section 4) puts a LayerNorm without parameters before the encoder's own, in the clean pass too,
and adds the perturbation between the two: lines 21 to 54 of
https://github.com/microsoft/DeBERTa/blob/88a1775f431149df77363732ae4399a1fdd15488/DeBERTa/sift/sift.py
So the encoder's own LayerNorm normalises the sum once more; a perturbation between its normalisation and its weight and
bias, which nothing normalises, would be another method. That sum is reached without another layer: with a token's mean
u and deviation s, the own LayerNorm of x + s d equals that of (x - u) / s + d, because it takes out shift and scale
(but for its epsilon, which counts as in the model's own clean pass). So the clean pass is the model's own, bit for bit.

Unlike SiFT's code, whose perturbed pass is cut off from the embeddings, gradients reach them, through s as well.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# of the LayerNorm without parameters; that of SiFT's code
EPSILON = 1e-7


class Place:
    """The output of a module, [B, T, C].

    Args:
        rows: of the module's output that are one example: [B * rows, T, C] there is [B, rows * T, C] to all else.
    """

    def __init__(self, module: nn.Module, rows: int = 1) -> None:
        self.module, self.rows = module, rows

    def hook(self, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
        """Let ``change`` make of what passes here, x [B, T, C], what goes on."""
        return self.module.register_forward_hook(lambda module, args, output: self._of_examples(change, output))

    def _of_examples(self, change: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.rows == 1:
            return change(x)
        return change(x.reshape(len(x) // self.rows, -1, x.shape[2])).reshape_as(x)

    def embeddings(self, x: Tensor) -> Tensor:
        """What is perturbed, [B, T, C]."""
        return x

    def scaled(self, x: Tensor, perturbation: Tensor) -> Tensor:
        """What a perturbation adds to ``x``: both [B, T, C]."""
        return perturbation

    def entered(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` itself, and what it depends on as on the perturbation, for gradients with respect to that."""
        if not x.requires_grad:
            x.requires_grad_()
        return x, x


class NormalizedPlace(Place):
    """The input of a LayerNorm, token by token in units of its deviation, as seen from its mean."""

    def hook(self, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
        return self.module.register_forward_pre_hook(
            lambda module, args: (self._of_examples(change, args[0]), *args[1:])
        )

    def embeddings(self, x: Tensor) -> Tensor:
        """float32 or wider.

        >>> NormalizedPlace(nn.LayerNorm(2)).embeddings(torch.tensor([[[1.0, 5.0]]]))
        tensor([[[-1.,  1.]]])
        """
        mean, deviation = _mean_and_deviation(x)
        return (x - mean) / deviation

    def scaled(self, x: Tensor, perturbation: Tensor) -> Tensor:
        return _mean_and_deviation(x)[1] * perturbation

    def entered(self, x: Tensor) -> tuple[Tensor, Tensor]:
        nothing = torch.zeros_like(x, dtype=_wide(x)).requires_grad_()
        return (x + self.scaled(x.detach(), nothing)).to(x.dtype), nothing


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _mean_and_deviation(x: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T, C] -> [B, T, 1] each, float32 or wider."""
    variance, mean = torch.var_mean(x.to(_wide(x)), dim=-1, keepdim=True, correction=0)
    return mean, (variance + EPSILON).sqrt()
