"""Divergences between two model outputs, one number per example.

Paper: Jiang et al. (2020), section 3.1: ``l_s`` is KL(P, Q) + KL(Q, P) for classes and (p - q)^2 for
regression.

Deviations: none from the paper. The authors' release detaches one side of each KL term and halves
nothing, so its value agrees while its gradient does not; here gradients reach both sides unless the
caller detaches one.

All functions take raw model outputs (logits for classes), compute in float32 or wider whatever the
input's precision, and return natural-log units (nats).
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

# (outputs, reference outputs), both [B, K] -> [B]
Divergence = Callable[[Tensor, Tensor], Tensor]


def _wide(outputs: Tensor, reference: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(outputs.dtype, reference.dtype), torch.float32)


def _pair(outputs: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Check the shapes and widen both sides to float32 at least."""
    if outputs.shape != reference.shape or outputs.dim() != 2:
        raise ValueError(
            f"outputs {tuple(outputs.shape)} and reference {tuple(reference.shape)}: both must be [B, K], of one shape"
        )
    wide = _wide(outputs, reference)
    return outputs.to(wide), reference.to(wide)


def _log_probabilities(logits: Tensor, reference_logits: Tensor) -> tuple[Tensor, Tensor]:
    logits, reference_logits = _pair(logits, reference_logits)
    return torch.log_softmax(logits, dim=-1), torch.log_softmax(reference_logits, dim=-1)


def _in_float64(divergence: Divergence) -> Divergence:
    """For a sum whose parts cancel where P and Q are close, at the paper's radius: float32 leaves noise of any sign."""

    @functools.wraps(divergence)
    def exact(logits: Tensor, reference_logits: Tensor) -> Tensor:
        return divergence(logits.double(), reference_logits.double()).to(_wide(logits, reference_logits))

    return exact


def symmetric_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(P, Q) + KL(Q, P), without a half.

    Written as sum_k (p - q)(log p - log q) with p - q = max(p, q) * -expm1(-|log p - log q|): each term
    is at least 0 and loses no digits when P and Q are close, which they are at the paper's radius.

    Args:
        logits: [B, K], any float dtype.
        reference_logits: [B, K].
    Returns:
        [B], float32 or wider, nats.
    Raises:
        ValueError: the shapes differ or are not [B, K].
    Source: Jiang et al. (2020), section 3.1.

    >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    >>> symmetric_kl(p, q)  # 0.4 log(0.9 / 0.5) + 0.4 log(0.5 / 0.1) = 0.4 log(9)
    tensor([0.8789])
    """
    log_p, log_q = _log_probabilities(logits, reference_logits)
    distance = (log_p - log_q).abs()
    return (torch.maximum(log_p, log_q).exp() * distance * -torch.expm1(-distance)).sum(dim=-1)


@_in_float64
def kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(P, Q), P from ``logits`` and Q from ``reference_logits``; shapes and errors as `symmetric_kl`.

    >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    >>> kl(p, q)  # 0.5 log(2 / 3) + 0.5 log(2) = 0.5 log(4 / 3)
    tensor([0.1438])
    """
    log_p, log_q = _log_probabilities(logits, reference_logits)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


@_in_float64
def jensen_shannon(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(P, M) / 2 + KL(Q, M) / 2 with M = (P + Q) / 2; shapes and errors as `symmetric_kl`.

    Source: Lin (1991), equation 3.3 with equal weights.

    >>> jensen_shannon(torch.tensor([[99.0, 0.0]]), torch.tensor([[0.0, 99.0]]))  # at most log(2)
    tensor([0.6931])
    """
    log_p, log_q = _log_probabilities(logits, reference_logits)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(dim=-1)


def squared_error(outputs: Tensor, reference: Tensor) -> Tensor:
    """(p - q)^2, summed over the outputs; [B, K] and [B, K] -> [B], errors as `symmetric_kl`.

    Source: Jiang et al. (2020), section 3.1 (regression).

    >>> squared_error(torch.tensor([[3.0]]), torch.tensor([[1.0]]))
    tensor([4.])
    """
    outputs, reference = _pair(outputs, reference)
    return (outputs - reference).square().sum(dim=-1)


def squared_error_of_classes(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """Squared error between class probabilities; shapes and errors as `symmetric_kl`.

    >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    >>> squared_error_of_classes(p, q)  # 0.4^2 + 0.4^2
    tensor([0.3200])
    """
    log_p, log_q = _log_probabilities(logits, reference_logits)
    return (log_p.exp() - log_q.exp()).square().sum(dim=-1)


def _log_ratio_of_change(logits: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Q and log P - log Q for P of ``logits + change`` and Q of ``logits``.

    No difference of nearly equal numbers is taken, so it is right where ``logits + change`` would round to ``logits``.
    """
    logits, change = _pair(logits, change)
    q = torch.softmax(logits, dim=-1)
    change = change - (q * change).sum(dim=-1, keepdim=True)
    return q, change - torch.log1p((q * torch.expm1(change)).sum(dim=-1, keepdim=True))


def symmetric_kl_of_change(logits: Tensor, change: Tensor) -> Tensor:
    """KL(P, Q) + KL(Q, P) for P of ``logits + change`` and Q of ``logits``, however small the change.

    With d = log P - log Q = change - log sum_k Q_k exp(change_k), the value is sum_k Q_k expm1(d_k) d_k.

    Args:
        logits, change: [B, K], any float dtype.
    Returns:
        [B], float32 or wider, nats.

    >>> change = torch.tensor([[math.log(9), 0.0]])  # from (0.5, 0.5) to (0.9, 0.1)
    >>> symmetric_kl_of_change(torch.zeros(1, 2), change)  # 0.4 log(9)
    tensor([0.8789])
    """
    q, log_ratio = _log_ratio_of_change(logits, change)
    return (q * torch.expm1(log_ratio) * log_ratio).sum(dim=-1)


def squared_change(outputs: Tensor, change: Tensor) -> Tensor:
    """`squared_error` of ``outputs + change`` and ``outputs``; shapes as `symmetric_kl_of_change`.

    >>> squared_change(torch.tensor([[1.0]]), torch.tensor([[2.0]]))
    tensor([4.])
    """
    _, change = _pair(outputs, change)
    return change.square().sum(dim=-1)


def squared_change_of_classes(logits: Tensor, change: Tensor) -> Tensor:
    """`squared_error_of_classes` of ``logits + change`` and ``logits``; shapes as `symmetric_kl_of_change`.

    >>> change = torch.tensor([[math.log(9), 0.0]])  # from (0.5, 0.5) to (0.9, 0.1)
    >>> squared_change_of_classes(torch.zeros(1, 2), change)  # 0.4^2 + 0.4^2
    tensor([0.3200])
    """
    q, log_ratio = _log_ratio_of_change(logits, change)
    return (q * torch.expm1(log_ratio)).square().sum(dim=-1)


DIVERGENCES: dict[str, Divergence] = {
    "sym_kl": symmetric_kl,
    "kl": kl,
    "js": jensen_shannon,
    "squared": squared_error_of_classes,
}
