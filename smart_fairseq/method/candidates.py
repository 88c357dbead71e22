"""Scores of candidates for a pronoun by a masked language model, and the loss that ranks them.

Paper: Kocijan et al. (2019), "A Surprisingly Robust Trick for the Winograd Schema Challenge".
The pronoun is replaced by as many mask tokens as the candidate has tokens, and the score log P(c | s) is the mean of
the log-probabilities of these tokens. Of a sentence with a right candidate c and a wrong one a,

    loss = -log P(c | s) + alpha * max(0, log P(a | s) - log P(c | s) + beta)

The authors' code trains with alpha 20 and beta 0.2 on its Wikipedia examples, alpha 5 and beta 0.2 on Winograd ones.
"""

import torch
from torch import Tensor

from .loss import log_sum

# the score of a place of a batch without a candidate: its share of a softmax is 0, and differences stay finite
ABSENT = -1e4


def candidate_scores(logits: Tensor, tokens: Tensor, owners: Tensor, count: int) -> Tensor:
    """The mean log-probability of each candidate's tokens.

    Args:
        logits: [N, V], of the masked places, any float dtype.
        tokens: int64 [N], the candidate's token at each.
        owners: int64 [N], the candidate's number below ``count``.
    Returns:
        [count], float32 or wider; `ABSENT` for a candidate without a token.

    >>> logits = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]).log()
    >>> scores = candidate_scores(logits, torch.tensor([0, 0, 1]), torch.tensor([0, 2, 2]), 3)
    >>> scores.exp()  # 0.5, none, sqrt(0.9 * 0.8)
    tensor([0.5000, 0.0000, 0.8485])
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = (wide.gather(1, tokens[:, None]) - log_sum(wide, dim=1)).squeeze(1)
    numbers = wide.new_zeros(count).index_add(0, owners, torch.ones_like(chosen).detach())
    sums = wide.new_zeros(count).index_add(0, owners, chosen)
    return torch.where(numbers > 0, sums / numbers.clamp_min(1), ABSENT)


def ranked(labels: Tensor) -> Tensor:
    """Whether a group has a right and a wrong candidate: labels [G, K], 1, 0 or -1 (not known) -> [G] bool.

    >>> ranked(torch.tensor([[1, 0], [1, -1]]))
    tensor([ True, False])
    """
    return (labels == 1).any(1) & (labels == 0).any(1)


def mean_of_pairs(losses: Tensor, labels: Tensor) -> Tensor:
    """The mean over a group's pairs of a right and a wrong candidate, [G, K, K] -> [G]; 0 for a group without a pair.

    ``losses`` [g, c, a]: of candidate c as the right one and a as the wrong one; ``labels`` as in `margin_loss`.

    >>> mean_of_pairs(torch.tensor([[[9.0, 1.0], [9.0, 9.0]]]), torch.tensor([[1, 0]]))
    tensor([1.])
    """
    pairs = (labels == 1).unsqueeze(2) & (labels == 0).unsqueeze(1)
    return torch.where(pairs, losses, 0).sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)


def margin_loss(scores: Tensor, labels: Tensor, alpha: float, beta: float) -> Tensor:
    """The loss above, as `mean_of_pairs`.

    Args:
        scores: [G, K], log P.
        labels: [G, K], 1 right, 0 wrong, -1 not known.
    Returns:
        [G], nats.

    >>> scores, labels = torch.tensor([[-1.0, -1.1, -3.0]]), torch.tensor([[1, 0, 0]])
    >>> margin_loss(scores, labels, alpha=20.0, beta=0.2)  # 1 + 20 * (0.1 + 0) / 2
    tensor([2.0000])
    """
    score, other = scores.unsqueeze(2), scores.unsqueeze(1)
    return mean_of_pairs(-score + alpha * (other - score + beta).clamp_min(0), labels)


def best_of_others(scores: Tensor) -> Tensor:
    """For each candidate the highest score among its group's others: [G, K] -> [G, K]; `ABSENT` without another.

    >>> best_of_others(torch.tensor([[-1.0, -3.0, -2.0]]))
    tensor([[-2., -1., -1.]])
    """
    size = scores.shape[1]
    own = torch.eye(size, dtype=torch.bool, device=scores.device)
    return scores[:, None].expand(-1, size, -1).masked_fill(own, ABSENT).amax(2)
