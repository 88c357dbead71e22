"""The stochastic answer network: a head that reads a pair of texts in several steps, and averages their answers.

Papers: Liu, Duh and Gao (2018), "Stochastic Answer Networks for Natural Language Inference", section 2, answer module;
MT-DNN (Liu et al., 2019), section 3, "Pairwise Text Classification Output", where it reads the encoder's last layer.
With the states p_i of the first text's tokens (the premise) and h_j of the second's (the hypothesis):

    s_0 = sum_j a_j h_j            a = softmax_j(w_1 . h_j)
    x_k = sum_i b_i p_i            b = softmax_i(s_{k-1} W_2 p_i)
    s_k = GRU(s_{k-1}, x_k)
    P_k = softmax(W_3 [s_k; x_k; |s_k - x_k|; s_k * x_k])
    P   = the average of P_1 .. P_K; in training of those that stochastic prediction dropout left

Deviations. The papers count the answers from 0 and leave x_0 open; here each of the K steps moves the state and then
answers (the authors' code answers first: module/san.py of
https://github.com/namisan/mt-dnn/tree/10656c6b567cd06e3a62b4f44d0fdba230d670e5). Dropped answers do not count in the
average, where that code divides by the expected number of those kept, so that P sums to 1 in training too. A
regression's P_k are the outputs themselves. Dropout falls on the encoder's states and on what W_3 sees, as in fairseq's
head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .loss import log_sum


def texts(tokens: Tensor, end: int, special: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where the two texts of each row stand, without the tokens around them.

    Args:
        tokens: [B, T] ids.
        end: the token that ends the first text; all behind its first occurrence is the second.
        special: tokens that belong to neither.
    Returns:
        [B, T] bool each.

    >>> [mask.int().tolist() for mask in texts(torch.tensor([[0, 5, 6, 2, 2, 7, 2, 1]]), 2, (0, 1, 2))]
    [[[0, 1, 1, 0, 0, 0, 0, 0]], [[0, 0, 0, 0, 0, 1, 0, 0]]]
    """
    real = torch.ones_like(tokens, dtype=torch.bool)
    for number in special:
        real = real & tokens.ne(number)
    behind = tokens.eq(end).cumsum(dim=1).gt(0)
    return real & ~behind, real & behind


def average(outputs: Tensor, kept: Tensor) -> Tensor:
    """The answer from the outputs of each step: for classes the logarithms of the mean probabilities.

    Args:
        outputs: [B, K, N] of K steps; N = 1 is a regression, whose outputs themselves are averaged.
        kept: [B, K] bool, the steps that count, at least one in each row.
    Returns:
        [B, N], float32 or wider, finite where the outputs are.

    >>> steps = torch.tensor([[[0.8, 0.2], [0.4, 0.6], [0.0, 1.0]]]).log().clamp(min=-1e4)
    >>> average(steps, torch.tensor([[True, True, False]])).exp()
    tensor([[0.6000, 0.4000]])
    """
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    count = kept.sum(dim=1, keepdim=True).to(outputs.dtype)
    if outputs.shape[-1] == 1:
        return (outputs * kept.unsqueeze(-1)).sum(dim=1) / count
    logs = outputs - log_sum(outputs, dim=-1)
    logs = logs.masked_fill(~kept.unsqueeze(-1), torch.finfo(outputs.dtype).min)
    return log_sum(logs, dim=1).squeeze(1) - count.log()


class StepDropout(nn.Module):
    """Stochastic prediction dropout: training leaves out each step with probability ``p``, never all of a row.

    >>> StepDropout(0.5).eval()(torch.zeros(1, 3, 2))
    tensor([[True, True, True]])
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, outputs: Tensor) -> Tensor:
        """The steps that count: [B, K, N] -> [B, K] bool."""
        if not self.training or self.p == 0:
            return torch.ones(outputs.shape[:2], dtype=torch.bool, device=outputs.device)
        drawn = torch.rand(outputs.shape[:2], device=outputs.device)
        return (drawn >= self.p) | (drawn == drawn.amax(dim=1, keepdim=True))


class StochasticAnswer(nn.Module):
    """The head. What it knows of the texts comes by `note`, before it is called.

    ``dense`` and ``out_proj``, by whose sizes fairseq tells heads apart, are the GRU's part for x and W_3.

    Args:
        channels: C, of the encoder's states.
        outputs: classes, or 1 for a regression.
        steps: K.
        dropout: of states and of what the output layer sees.
        step_dropout: share of steps that training leaves out.
        end, special: see `texts`.

    >>> head = StochasticAnswer(4, 3, steps=2, dropout=0.1, step_dropout=0.1, end=2, special=(0, 1, 2))
    >>> head.note(None, (torch.tensor([[0, 5, 2, 6, 2]]),))
    >>> head(torch.zeros(1, 5, 4)).shape
    torch.Size([1, 3])
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        steps: int,
        dropout: float,
        step_dropout: float,
        end: int,
        special: Sequence[int],
    ) -> None:
        super().__init__()
        self.steps, self.end, self.special = steps, end, tuple(special)
        self.summary = nn.Linear(channels, 1, bias=False)  # w_1
        self.attention = nn.Linear(channels, channels, bias=False)  # W_2
        # nn.GRUCell's three gates, in its order; the cell itself is a fused kernel without a forward-mode derivative
        self.dense = nn.Linear(channels, 3 * channels)
        self.state = nn.Linear(channels, 3 * channels)
        self.out_proj = nn.Linear(4 * channels, outputs)  # W_3
        self.dropout, self.step_dropout = nn.Dropout(dropout), StepDropout(step_dropout)
        self._tokens: Tensor | None = None

    def note(self, encoder: Any, inputs: tuple[Any, ...]) -> None:
        """For ``register_forward_pre_hook`` of the encoder: what it reads, [B, T] ids, tells the texts apart."""
        self._tokens = inputs[0]

    def forward(self, features: Tensor, **_: Any) -> Tensor:
        """The encoder's last states [B, T, C] -> [B, N], as `average`.

        Raises RuntimeError where the encoder did not read as many tokens just before.
        """
        tokens, self._tokens = self._tokens, None
        if tokens is None or tokens.shape != features.shape[:2]:
            raise RuntimeError("a stochastic answer head was called without the pass of the encoder that it reads")
        first, second = texts(tokens, self.end, self.special)
        features = self.dropout(features)
        state = _attended(self.summary(features).squeeze(-1), features, second)
        outputs = []
        for _step in range(self.steps):
            scores = (features @ self.attention(state).to(features.dtype).unsqueeze(-1)).squeeze(-1)
            x = _attended(scores, features, first)
            state = self._gru(state, x)
            seen = torch.cat([state, x, (state - x).abs(), state * x], dim=-1)
            outputs.append(self.out_proj(self.dropout(seen)))
        stacked = torch.stack(outputs, dim=1)
        return average(stacked, self.step_dropout(stacked))

    def _gru(self, state: Tensor, x: Tensor) -> Tensor:
        (reset, update, new), (own_reset, own_update, own_new) = (
            gates.chunk(3, dim=-1) for gates in (self.dense(x), self.state(state))
        )
        candidate = torch.tanh(new + torch.sigmoid(reset + own_reset) * own_new)
        share = torch.sigmoid(update + own_update)
        return candidate + share * (state - candidate)


def _attended(scores: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    """The mean of the states where the mask is, by the softmax of their scores; 0 where it is nowhere."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    wide = wide.masked_fill(~mask, torch.finfo(wide.dtype).min)
    shares = (wide - log_sum(wide, dim=-1)).exp() * mask
    return (shares.to(features.dtype).unsqueeze(1) @ features).squeeze(1)
