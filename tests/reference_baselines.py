"""The baselines' equations, example by example in float64; they share no code with the package.

A model is a function f from one example's embeddings [T, C] to its output [K]; random starts are handed in, because
any draw is a valid one. Sizes are in the embeddings' own units.
"""

import math
from collections.abc import Callable

import torch
from reference import size
from torch import Tensor

Function = Callable[[Tensor], Tensor]


def loss(output: Tensor, target: Tensor) -> Tensor:
    if target.is_floating_point():
        return (output[0] - target) ** 2
    return -torch.softmax(output, 0)[int(target)].log()


def both_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    p, q = torch.softmax(p_logits, 0), torch.softmax(q_logits, 0)
    return (p * (p / q).log()).sum() + (q * (q / p).log()).sum()


def climb(f: Function, x: Tensor, d: Tensor, target: Tensor, step: float, radius: float, norm: str) -> Tensor:
    """One step of the perturbation d [T, C]: Madry et al. (2018), section 2.1; Zhu et al. (2020), lines 8 and 9."""
    d = d.detach().requires_grad_()
    gradient = torch.autograd.grad(loss(f(x.detach() + d), target), d)[0]
    d = d.detach()
    if norm == "inf":
        d = d + step * torch.sign(gradient)
        return torch.minimum(torch.maximum(d, torch.full_like(d, -radius)), torch.full_like(d, radius))
    d = d + step * gradient / math.sqrt(float((gradient**2).sum()))
    return d * min(1.0, radius / size(d, "l2"))


def pgd(f: Function, x: Tensor, d: Tensor, target: Tensor, steps: int, **ball: float | str) -> Tensor:
    """L(f(x + d), y) at the point that K steps reach; differentiable in f's weights and in x."""
    for _ in range(steps):
        d = climb(f, x, d, target, **ball)
    return loss(f(x + d), target)


def freelb(f: Function, x: Tensor, d: Tensor, target: Tensor, passes: int, **ball: float | str) -> Tensor:
    """(1 / K) sum over k of L(f(x + d_k), y): its gradient is what algorithm 1 adds up in line 6."""
    terms = []
    for _ in range(passes):
        terms.append(loss(f(x + d), target))
        d = climb(f, x, d, target, **ball)
    return torch.stack(terms).mean()


def r3f(f: Function, x: Tensor, z: Tensor, target: Tensor, weight: float) -> Tensor:
    """Aghajanyan et al. (2020), equation 4."""
    return loss(f(x), target) + weight * both_kl(f(x), f(x + z))


def rdrop(first: Tensor, second: Tensor, target: Tensor, alpha: float) -> Tensor:
    """Half of Liang et al. (2021), equation 4: outputs under two dropout masks."""
    return (loss(first, target) + loss(second, target) + alpha * both_kl(first, second) / 2) / 2
