"""Ranking: one score for each candidate of a group, and the distribution over the group.

Paper: Liu et al. (2019), MT-DNN, section 3, pairwise ranking: P(a | q) is the softmax of the scores over the candidates
of q, and the loss -log P of the right one. Several right ones, of which the paper does not speak, share one: -log of
the sum of their P. SMART's l_s (Jiang et al., 2020, section 3.1, for classes) is taken of that distribution.

Outputs stay [N, 1], a row for each candidate, whose own inputs alone they depend on. ``groups``, int64 [G, K], has the
rows of each group; the places of a group with fewer than K candidates are filled with N.
"""

import torch
from torch import Tensor

from .divergence import Divergence

# the logit where there is no candidate: its probability is 0, and differences of its logarithm are finite
NOTHING = -1e30


def group_places(sizes: list[int]) -> Tensor:
    """The ``groups`` of rows that stand one group after the other, by the groups' sizes.

    >>> group_places([2, 3])
    tensor([[0, 1, 5],
            [2, 3, 4]])
    """
    rows = torch.arange(sum(sizes))
    return torch.nn.utils.rnn.pad_sequence(list(rows.split(sizes)), batch_first=True, padding_value=len(rows))


def over_groups(values: Tensor, groups: Tensor, nothing: float = NOTHING) -> Tensor:
    """[N, 1] -> [G, K], float32 or wider, ``nothing`` where there is no candidate; differentiable.

    >>> over_groups(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0, 1], [2, 3]]), nothing=0.0)
    tensor([[1., 2.],
            [3., 0.]])
    """
    wide = values.view(-1).to(torch.promote_types(values.dtype, torch.float32))
    return torch.nn.functional.pad(wide, (0, 1), value=nothing)[groups]


def of_groups(divergence: Divergence, groups: Tensor, change: bool = False) -> Divergence:
    """A divergence between classes as one between scores: [N, 1] and [N, 1] -> [G].

    ``change``: the divergence takes outputs and their change.

    >>> from .divergence import squared_error
    >>> scores, groups = torch.tensor([[1.0], [2.0], [3.0]]), group_places([1, 2])
    >>> of_groups(squared_error, groups)(scores, 0 * scores)
    tensor([ 1., 13.])
    """
    second = 0.0 if change else NOTHING
    return lambda scores, other: divergence(over_groups(scores, groups), over_groups(other, groups, second))


def ranking_loss(scores: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
    """-log of the probability that a right candidate has: [N, 1], [N] (above 0: right) -> [G], float32 or wider, nats.

    >>> scores = torch.tensor([[0.5], [0.25], [0.25]]).log()
    >>> ranking_loss(scores, torch.tensor([0, 1, 0]), torch.tensor([[0, 1, 2]]))  # log(4)
    tensor([1.3863])
    """
    logits = over_groups(scores, groups)
    right = over_groups(targets, groups, 0.0) > 0
    return logits.logsumexp(-1) - logits.masked_fill(~right, NOTHING).logsumexp(-1)


def picked(scores: Tensor, groups: Tensor) -> Tensor:
    """The row of each group's highest score, its first where several are: [N, 1] -> int64 [G].

    >>> picked(torch.tensor([[1.0], [2.0], [4.0], [3.0]]), group_places([2, 2]))
    tensor([1, 2])
    """
    best = over_groups(scores, groups).argmax(-1, keepdim=True)
    return groups.gather(1, best).squeeze(1)
