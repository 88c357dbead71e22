"""The adversary: the small perturbation that changes the model's output most.

Paper: Jiang et al. (2020), section 3.1 and Algorithm 1, lines 4 to 8.

| paper | here | meaning |
| --- | --- | --- |
| x~ - x | perturbation | what is added to the embeddings, B x T x C |
| epsilon, p | radius, norm | the ball ||x~ - x||_p <= epsilon |
| sigma | (scale of ``noise``) | standard deviation of the starting point |
| eta | step_size | ascent step along the normalised gradient |
| T_x~ | steps | number of ascent steps |

Open in the paper, settled here: the norm of the gradient is taken over an example ("example"; over the
batch, examples would depend on their neighbours) or a token ("token"); it is the norm that also defines
the ball. The clean output is held fixed during the ascent.

The authors' release has no ball: "normalize" divides the perturbation by its own norm after each step,
so that its size is 1 and the radius plays no part.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .divergence import Divergence

# perturbation [B, T, C] -> gradient [B, T, C]
GradientFn = Callable[[Tensor], Tensor]
# perturbation [B, T, C] -> outputs [B, K]
LogitsFn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Adversary:
    """Algorithm 1's constants; the defaults are the paper's (section 4.1).

    radius: size of the ball, in the units of the embeddings; above 0.
    step_size: length of an ascent step in the same units; above 0.
    steps: number of ascent steps; 1 or more.
    norm: "inf" or "l2".
    scope: "example" (over T x C) or "token" (over C).
    projection: "ball" (Algorithm 1) or "normalize" (the authors' release).
    signed: with the norm "inf", a step follows the gradient's sign (Madry et al. 2018, section 2.1), not the gradient.

    >>> Adversary(radius=0.1).size, Adversary(radius=0.1, projection="normalize").size
    (0.1, 1.0)
    """

    radius: float = 1e-5
    step_size: float = 1e-3
    steps: int = 1
    norm: str = "inf"
    scope: str = "example"
    projection: str = "ball"
    signed: bool = False

    @property
    def size(self) -> float:
        """What the projection makes of a large perturbation's norm."""
        return self.radius if self.projection == "ball" else 1.0


def norm(tensor: Tensor, adversary: Adversary) -> Tensor:
    """The norm of each example or token, kept broadcastable.

    Args:
        tensor: [B, T, C], float32 or wider.
    Returns:
        [B, 1, 1] (scope "example") or [B, T, 1] (scope "token").

    >>> one = torch.tensor([[[3.0, -4.0]]])
    >>> norm(one, Adversary(norm="inf")).item(), norm(one, Adversary(norm="l2")).item()
    (4.0, 5.0)
    """
    over: tuple[int, ...] = (1, 2) if adversary.scope == "example" else (2,)
    largest = tensor.abs().amax(dim=over, keepdim=True)
    if adversary.norm == "inf":
        return largest
    # squares of 1e-20 and below vanish in float32, so the largest entry is taken out first
    scaled = tensor / largest.clamp_min(torch.finfo(tensor.dtype).tiny)
    return largest * scaled.square().sum(dim=over, keepdim=True).sqrt()


def normalize(tensor: Tensor, adversary: Adversary) -> Tensor:
    """``tensor`` divided by its norm; where that is 0 (padding, a flat output), 0. [B, T, C] -> [B, T, C].

    >>> normalize(torch.tensor([[[3.0, -4.0]]]), Adversary(norm="l2"))
    tensor([[[ 0.6000, -0.8000]]])
    >>> normalize(torch.tensor([[[3.0, -4.0]]]), Adversary(signed=True))
    tensor([[[ 1., -1.]]])
    """
    if adversary.signed and adversary.norm == "inf":
        return tensor.sign()
    return tensor / norm(tensor, adversary).clamp_min(torch.finfo(tensor.dtype).tiny)


def project(perturbation: Tensor, adversary: Adversary) -> Tensor:
    """The nearest point of the ball (Algorithm 1) or the perturbation at unit norm (the release).

    Args:
        perturbation: [B, T, C], float32 or wider.
    Returns:
        [B, T, C]; in the ball, its norm is at most ``adversary.radius``.

    >>> project(torch.tensor([[[3.0, -0.5]]]), Adversary(radius=1.0))
    tensor([[[ 1.0000, -0.5000]]])
    """
    if adversary.projection == "normalize":
        return normalize(perturbation, adversary)
    if adversary.norm == "inf":
        return perturbation.clamp(-adversary.radius, adversary.radius)
    size = norm(perturbation, adversary).clamp_min(torch.finfo(perturbation.dtype).tiny)
    return perturbation * (adversary.radius / size).clamp_max(1.0)


def ascent_step(perturbation: Tensor, gradient: Tensor, mask: Tensor, adversary: Adversary) -> Tensor:
    """One projected step along the normalised gradient; arguments and result as for `ascend`.

    >>> gradient, mask = torch.tensor([[[4.0, 2.0]]]), torch.ones(1, 1, 1)
    >>> ascent_step(torch.tensor([[[0.1, 0.0]]]), gradient, mask, Adversary(radius=1.0, step_size=0.5))
    tensor([[[0.6000, 0.2500]]])
    """
    return project(perturbation + adversary.step_size * normalize(gradient * mask, adversary), adversary)


def ascend(
    gradient_fn: GradientFn, noise: Tensor, mask: Tensor, adversary: Adversary, first_gradient: Tensor | None = None
) -> Tensor:
    """Algorithm 1, lines 4 to 8: from the noise, one projected gradient step at a time.

    Args:
        gradient_fn: perturbation [B, T, C] -> gradient of the divergence with respect to it, up to a positive
            factor for each example, which the normalisation takes out.
        noise: [B, T, C], float32 or wider: the starting point nu ~ N(0, sigma^2 I).
        mask: [B, T, 1], 1 at real tokens, 0 at padding, which is never perturbed.
        first_gradient: [B, T, C], the gradient at the noise, where the caller has it already: where outputs come in a
            precision that does not resolve the noise, that of `linearized` ones.
    Returns:
        [B, T, C], dtype of ``noise``, detached. Not finite where a gradient was not.

    The gradient of d^2 / 2 is d, here (0.1, -0.05), normalised (1, -0.5):

    >>> noise, mask = torch.tensor([[[0.1, -0.05]]]), torch.ones(1, 1, 1)
    >>> ascend(lambda d: d, noise, mask, Adversary(radius=1.0, step_size=0.5))
    tensor([[[ 0.6000, -0.3000]]])
    """
    perturbation = noise * mask
    for step in range(adversary.steps):
        known = first_gradient if step == 0 else None
        gradient = (gradient_fn(perturbation) if known is None else known).to(noise.dtype)
        perturbation = ascent_step(perturbation, gradient, mask, adversary)
    return perturbation


def _unit(tensor: Tensor) -> Tensor:
    """Each example divided by its largest entry."""
    over = tuple(range(1, tensor.dim()))
    return tensor / tensor.abs().amax(dim=over, keepdim=True).clamp_min(torch.finfo(tensor.dtype).tiny)


def _cotangent(loss_of: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """The gradient of a loss [B] at outputs [B, K], at size 1: so that it cannot underflow on its way."""
    point = point.detach().to(torch.promote_types(point.dtype, torch.float32)).requires_grad_()
    with torch.enable_grad():
        # a sum, not a mean: each example's gradient is its own
        value = loss_of(point).sum()
    return _unit(torch.autograd.grad(value, point)[0])


def gradient_of(logits_fn: LogitsFn, loss_of: Callable[[Tensor], Tensor]) -> GradientFn:
    """The gradient, for `ascend`, of a loss or divergence of the outputs.

    Args:
        logits_fn: perturbation [B, T, C] -> outputs [B, K]; differentiable in the perturbation. To spend
            nothing on weight gradients, its weights must not require gradients.
        loss_of: outputs [B, K], in float32 or wider -> one number per example, [B].

    With outputs f(d) = d, the gradient of f(d)^2 is 2 d, here divided by its largest entry:

    >>> gradient_of(lambda d: d[:, 0], lambda outputs: outputs.square().sum(1))(torch.tensor([[[3.0, -1.5]]]))
    tensor([[[ 1.0000, -0.5000]]])
    """

    def gradient(perturbation: Tensor) -> Tensor:
        perturbation = perturbation.detach().requires_grad_()
        with torch.enable_grad():
            logits = logits_fn(perturbation)
        cotangent = _cotangent(loss_of, logits)
        return torch.autograd.grad(logits, perturbation, cotangent.to(logits.dtype))[0]

    return gradient


def away_from(clean_logits: Tensor, divergence: Divergence) -> Callable[[Tensor], Tensor]:
    """For `gradient_of`: the divergence of outputs from those without perturbation, [B, K], which are held fixed.

    >>> from .divergence import squared_error
    >>> away_from(torch.tensor([[1.0, 2.0]]), squared_error)(torch.tensor([[1.0, 5.0]]))
    tensor([9.])
    """
    fixed = clean_logits.detach()
    return lambda outputs: divergence(outputs, fixed.to(outputs.dtype))


def linearized(outputs: Tensor, inputs: Tensor) -> LogitsFn:
    """The outputs to first order in the inputs: d -> f(x) + J d, with no forward at all.

    J comes from the graph of ``outputs``, which stays, by one backward pass for each class but the last: only the
    differences of logits count, those to the last one, which itself is given no change.

    Args:
        outputs: [B, K], raw model outputs; an example's own depend on its own inputs alone.
        inputs: [B, T, C], what they were computed from.
    Returns:
        A function from [B, T, C] to [B, K], float64, in which small changes of the outputs are not lost.

    f(x) = x^2 at 3, where it is 9 and its slope 6:

    >>> x = torch.tensor([[[3.0]]], requires_grad=True)
    >>> linearized(x[:, 0] ** 2, x)(torch.tensor([[[0.5]]]))
    tensor([[12.]], dtype=torch.float64)
    """
    single = outputs.shape[1] == 1
    differences = outputs if single else outputs[:, :-1] - outputs[:, -1:]
    rows = [
        torch.autograd.grad(difference.sum(), inputs, retain_graph=True)[0] for difference in differences.unbind(dim=1)
    ]
    jacobian = torch.stack(rows).to(torch.promote_types(inputs.dtype, torch.float32))
    reference = outputs.detach().double()

    def logits(step: Tensor) -> Tensor:
        change = torch.einsum("kbtc,btc->bk", jacobian, step.to(jacobian.dtype)).double()
        return reference + (change if single else torch.nn.functional.pad(change, (0, 1)))

    return logits


def gradient_to_first_order(
    products_fn: Callable[[Tensor], tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]], divergence_of_change: Divergence
) -> GradientFn:
    """The gradient of the divergence's second-order form, for `ascend`; right in any precision.

    Near the clean point f(x + d) = f(x) + J d, and the gradient of the divergence is J' H J d with its
    curvature H in the output (for the symmetric KL, 2 (diag p - p p')). It is linear in d, so d is handed
    over at size 1 and the cotangent likewise: nothing comes near the edge of the number format. A row is an example
    here: not for rankings, whose rows depend on each other and would lose their sizes.

    Args:
        products_fn: direction d [B, T, C] -> outputs [B, K], change J d [B, K], and the function from a
            cotangent [B, K] to J' cotangent [B, T, C].
        divergence_of_change: of (outputs, change), one number per example.

    With J = 2, J' H J d has the direction of d:

    >>> from .divergence import squared_change
    >>> def products(d: Tensor):
    ...     return torch.zeros(1, 2), 2 * d[:, 0], lambda cotangent: 2 * cotangent[:, None]
    >>> gradient_to_first_order(products, squared_change)(torch.tensor([[[3.0, -1.5]]]))
    tensor([[[ 2., -1.]]])
    """

    def gradient(perturbation: Tensor) -> Tensor:
        outputs, change, pull_back = products_fn(_unit(perturbation))
        # small enough for the second order to hold, large enough for float32
        small = _unit(change.detach().to(perturbation.dtype)) * 1e-3
        fixed = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))
        return pull_back(_cotangent(lambda found: divergence_of_change(fixed, found.to(fixed.dtype)), small))

    return gradient
