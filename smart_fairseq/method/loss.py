"""The loss of the task, one number per example: what adversarial training raises, where SMART raises a divergence; and
its logsumexp, by which shares and likelihoods elsewhere are made."""

import torch
from torch import Tensor

from .divergence import squared_error


def task_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy for classes, squared error for a regression, in float32 or wider.

    Args:
        outputs: [B, K] logits, or [B, 1] of a regression; any float dtype.
        targets: int64 [B], the classes, or of a float dtype, [B] or [B, 1].
    Returns:
        [B], nats or squared units of the target.

    >>> task_loss(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([1])), task_loss(torch.ones(1, 1), torch.zeros(1))
    (tensor([0.6931]), tensor([1.]))
    """
    if targets.is_floating_point():
        return squared_error(outputs, targets.view(-1, 1))
    wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(wide, targets, reduction="none")


def log_sum(x: Tensor, dim: int) -> Tensor:
    """logsumexp, ``dim`` kept: torch's own in forward mode, and its softmax, have a change without a derivative.

    >>> log_sum(torch.zeros(1, 2), dim=1)  # log(2)
    tensor([[0.6931]])
    """
    top = x.detach().amax(dim=dim, keepdim=True)
    return top + (x - top).exp().sum(dim=dim, keepdim=True).log()
