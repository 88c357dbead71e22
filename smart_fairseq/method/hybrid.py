"""HNN: candidates for a pronoun scored by a language model and by a similarity, which share the encoder.

Paper: He et al. (2019), "A Hybrid Neural Network Model for Commonsense Reasoning", on WNLI the system that SMART starts
from. P_lm is the language model's score of `candidates`, a geometric mean of probabilities. For the similarity the
sentence with its pronoun is encoded together with the candidate as a second text; with the states h_0 of the first
token, p of the pronoun and h_i of the candidate's tokens,

    v = sum_i a_i h_i    a = softmax_i(W_1 h_0 . h_i / sqrt(C))    s = W_2 v . p    P_ss = sigmoid(s)

and a candidate's score is (P_lm + P_ss) / 2. Of a right candidate c and a wrong one a,

    loss = -log P_lm(c) + (-log sigmoid(s_c) - log sigmoid(-s_a)) / 2
           + log(1 + exp(gamma (score(a) + beta - score(c))))

Form and constants (bilinear similarity, beta 0.6, gamma 10) are those of the authors' script hnn_train_large.sh and of
hnn/src/apps/hnn_model.py: https://github.com/namisan/mt-dnn/tree/21faf3f63dc8395285d4af9c38be85fdf0b04d9b. That code
has two candidates; here the loss is the mean over all pairs of a right and a wrong one.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from .candidates import ABSENT, mean_of_pairs
from .loss import log_sum

Linear = Callable[[Tensor], Tensor]


def similarities(features: Tensor, marked: Tensor, query: Linear, bilinear: Linear) -> Tensor:
    """s above, of each row.

    Args:
        features: [N, T, C], the encoder's states.
        marked: [N, T] bool, in a row the pronoun's first token, and behind it the candidate's tokens.
        query, bilinear: W_1 and W_2, [.., C] -> [.., C].
    Returns:
        [N], float32 or wider; of a row without a mark it means nothing.

    >>> states = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]]])
    >>> similarities(states, torch.tensor([[False, True, True]]), lambda x: x, lambda x: x)  # (0, 2) . (3, 1)
    tensor([2.])
    """
    wide = torch.promote_types(features.dtype, torch.float32)
    pronoun = marked & marked.cumsum(1).eq(1)
    of_pronoun = torch.einsum("nt,ntc->nc", pronoun.to(features.dtype), features)
    weights = torch.einsum("nc,ntc->nt", query(features[:, 0]), features).to(wide) / math.sqrt(features.shape[-1])
    weights = weights.masked_fill(~marked | pronoun, ABSENT)
    weights = (weights - log_sum(weights, dim=1)).exp().to(features.dtype)
    of_candidate = torch.einsum("nt,ntc->nc", weights, features)
    return (bilinear(of_candidate).to(wide) * of_pronoun.to(wide)).sum(-1)


def hybrid_scores(log_probabilities: Tensor, similarity: Tensor, gamma: float) -> Tensor:
    """gamma (P_lm + P_ss) / 2, of whose softmax over a group the loss's last term is the likelihood, but for beta.

    Args:
        log_probabilities: [G, K], log P_lm, `ABSENT` where there is no candidate.
        similarity: [G, K], s.
    Returns:
        [G, K], `ABSENT` where there is no candidate.

    >>> hybrid_scores(torch.tensor([[0.5, 0.0]]).log().clamp(min=ABSENT), torch.zeros(1, 2), gamma=10.0)
    tensor([[ 5.0000e+00, -1.0000e+04]])
    """
    scores = gamma * (log_probabilities.exp() + torch.sigmoid(similarity)) / 2
    return scores.masked_fill(log_probabilities <= ABSENT, ABSENT)


def hybrid_loss(
    scores: Tensor, log_probabilities: Tensor, similarity: Tensor, labels: Tensor, beta: float, gamma: float
) -> Tensor:
    """The loss above, the mean over a group's pairs of a right and a wrong candidate; 0 for a group without a pair.

    Args:
        scores: [G, K], as `hybrid_scores` returns them for the same ``gamma``.
        log_probabilities, similarity: [G, K], of which they are made.
        labels: [G, K], 1 right, 0 wrong, -1 not known.
    Returns:
        [G], nats.

    >>> logs, similarity, labels = torch.tensor([[0.5, 0.5]]).log(), torch.zeros(1, 2), torch.tensor([[1, 0]])
    >>> hybrid_loss(hybrid_scores(logs, similarity, 1.0), logs, similarity, labels, 0.0, 1.0)  # 3 log(2)
    tensor([2.0794])
    """
    margins = softplus(scores.unsqueeze(1) + gamma * beta - scores.unsqueeze(2))
    apart = (-logsigmoid(similarity).unsqueeze(2) - logsigmoid(-similarity).unsqueeze(1)) / 2
    return mean_of_pairs(-log_probabilities.unsqueeze(2) + apart + margins, labels)
