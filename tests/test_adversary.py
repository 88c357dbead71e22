"""The adversary as a function: analytic cases, the ball, padding, what a pass leaves behind."""

import itertools

import pytest
import torch
from toolkit import assert_close, assert_equal

from smart_fairseq.method.adversary import Adversary, ascend, away_from, gradient_of, linearized, norm, project
from smart_fairseq.method.divergence import Divergence, squared_error, symmetric_kl

EVERY_BALL = [
    Adversary(radius=0.3, step_size=10.0, steps=steps, norm=kind, scope=scope)
    for steps, kind, scope in itertools.product([1, 3], ["inf", "l2"], ["example", "token"])
]


def find_perturbation(
    f, clean: torch.Tensor, noise: torch.Tensor, mask: torch.Tensor, divergence: Divergence, adversary: Adversary
) -> torch.Tensor:
    """The ascent away from clean outputs."""
    return ascend(gradient_of(f, away_from(clean, divergence)), noise, mask, adversary)


def a_network(seed: int = 0):
    """A small nonlinear map from [B, T, C] = [3, 4, 5] to [3, 2] logits, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    first = torch.randn(20, 8, generator=generator, dtype=torch.float64) / 4
    second = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    return lambda perturbation: torch.tanh((x + perturbation).flatten(1) @ first) @ second


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.float64)[..., None]


def start(scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize("adversary", EVERY_BALL, ids=str)
def test_the_perturbation_stays_in_the_ball_and_reaches_its_edge(adversary: Adversary) -> None:
    """With a step much longer than the radius the projection binds, for each example or real token."""
    f = a_network()
    found = find_perturbation(f, f(0 * start()), start(), MASK, symmetric_kl, adversary)
    sizes = norm(found, adversary)
    assert (sizes <= 0.3 * (1 + 1e-12)).all()
    real = MASK if adversary.scope == "token" else torch.ones_like(sizes)
    assert_close(sizes[real.bool()], torch.full_like(sizes[real.bool()], 0.3))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12])
@pytest.mark.parametrize("kind", ["inf", "l2"])
def test_projection_at_any_scale(kind: str, scale: float) -> None:
    adversary = Adversary(radius=0.5 * scale, norm=kind)
    tensor = scale * torch.randn(4, 3, 2)
    assert (norm(project(tensor, adversary), adversary) <= 0.5 * scale * (1 + 1e-6)).all()
    inside = tensor * 1e-3
    assert_equal(project(inside, adversary), inside)


@pytest.mark.parametrize("scope", ["example", "token"])
@pytest.mark.parametrize("kind", ["inf", "l2"])
def test_the_release_has_unit_norm(kind: str, scope: str) -> None:
    adversary = Adversary(radius=1e-5, norm=kind, scope=scope, projection="normalize")
    f = a_network()
    found = find_perturbation(f, f(0 * start()), start(1e-5), torch.ones_like(MASK), symmetric_kl, adversary)
    sizes = norm(found, adversary)
    assert_close(sizes, torch.ones_like(sizes))


def test_the_adversary_beats_random_signs_of_the_same_size() -> None:
    f = a_network()
    clean = f(0 * start())
    adversary = Adversary(radius=1e-2, step_size=1.0)
    found = find_perturbation(f, clean, start(1e-3), MASK, symmetric_kl, adversary)
    random = 1e-2 * start().sign() * MASK
    assert symmetric_kl(f(found), clean).sum() > 3 * symmetric_kl(f(random), clean).sum()


def test_l2_direction_on_a_linear_regression_is_the_weight_vector() -> None:
    """f(d) = <w, d>: the gradient of <w, d>^2 is along w from any start, so the solution is +-radius w / |w|."""
    w = torch.randn(1, 2, 3, dtype=torch.float64)
    adversary = Adversary(radius=0.1, step_size=1e6, norm="l2")
    noise = torch.randn(1, 2, 3, dtype=torch.float64)
    found = find_perturbation(
        lambda d: (w * d).sum((1, 2))[:, None],
        torch.zeros(1, 1, dtype=torch.float64),
        noise,
        torch.ones(1, 2, 1, dtype=torch.float64),
        squared_error,
        adversary,
    )
    sign = (w * noise).sum().sign()
    assert_close(found, sign * 0.1 * w / w.norm(), rtol=1e-5, atol=1e-7)


def test_second_order_value_for_a_linear_softmax() -> None:
    """Logits z + W d: to second order the symmetric KL is t' (diag p - p p') t with t = W d."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    logits = torch.randn(4, generator=generator, dtype=torch.float64)
    p = torch.softmax(logits, 0)
    fisher = torch.diag(p) - torch.outer(p, p)
    adversary = Adversary(radius=1e-4, step_size=1.0)
    f = lambda d: logits + d.flatten(1) @ weights.T  # noqa: E731
    found = find_perturbation(
        f,
        logits[None],
        1e-4 * torch.randn(1, 2, 3, generator=generator, dtype=torch.float64),
        torch.ones(1, 2, 1, dtype=torch.float64),
        symmetric_kl,
        adversary,
    )
    t = weights @ found.flatten()
    assert_close(symmetric_kl(f(found), logits[None]), (t @ fisher @ t)[None], rtol=1e-3, atol=0)


def test_padding_is_never_perturbed_and_does_not_count() -> None:
    """Even where the model reacts to it; and a norm over an example ignores it."""
    f = a_network()
    for adversary in (*EVERY_BALL, Adversary(projection="normalize", scope="token")):
        found = find_perturbation(f, f(0 * start()), start(), MASK, symmetric_kl, adversary)
        assert_equal(found * (1 - MASK), torch.zeros_like(found))


def test_examples_do_not_depend_on_their_neighbours() -> None:
    f = a_network()
    clean = f(0 * start())
    adversary = Adversary(radius=0.1, step_size=0.05, steps=2)
    together = find_perturbation(f, clean, start(), MASK, symmetric_kl, adversary)
    alone = find_perturbation(
        lambda d: f(
            torch.cat([torch.zeros(1, 4, 5, dtype=torch.float64), d, torch.zeros(1, 4, 5, dtype=torch.float64)])
        )[1:2],
        clean[1:2],
        start()[1:2],
        MASK[1:2],
        symmetric_kl,
        adversary,
    )
    assert_close(together[1:2], alone)


def test_a_flat_output_gives_no_nan() -> None:
    """A zero gradient has no direction: the noise stays, projected."""
    adversary = Adversary(radius=0.5, step_size=1.0)
    found = find_perturbation(
        lambda d: d.sum((1, 2))[:, None] * 0,
        torch.zeros(3, 1, dtype=torch.float64),
        start(),
        MASK,
        squared_error,
        adversary,
    )
    assert_equal(found, (start() * MASK).clamp(-0.5, 0.5))


def test_a_gradient_that_is_not_finite_shows() -> None:
    found = find_perturbation(
        lambda d: d.sum((1, 2))[:, None] / 0.0,
        torch.zeros(3, 1, dtype=torch.float64),
        start(),
        MASK,
        squared_error,
        Adversary(),
    )
    assert not torch.isfinite(found).all()


def test_nothing_is_left_behind() -> None:
    """No graph on the result, no gradient on the weights, none through the clean output."""
    weight = torch.randn(20, 2, requires_grad=True)
    clean = torch.randn(3, 20) @ weight
    with torch.no_grad():  # even where gradients are switched off around it
        found = find_perturbation(
            lambda d: d.flatten(1) @ weight.detach(), clean, start().float(), MASK.float(), symmetric_kl, Adversary()
        )
    assert not found.requires_grad and found.dtype == torch.float32
    assert weight.grad is None


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_linearized_outputs(outputs: int) -> None:
    """Against the Jacobian written out; of several outputs only their differences are promised."""
    weight = torch.randn(4 * 3, outputs, dtype=torch.float64)
    inputs = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    logits = torch.tanh(inputs).reshape(2, -1) @ weight
    step = torch.randn(2, 4, 3, dtype=torch.float64)
    expected = ((1 - torch.tanh(inputs.detach()).square()) * step).reshape(2, -1) @ weight
    change = linearized(logits, inputs)(step) - logits.detach()
    if outputs > 1:
        change, expected = (x - x[:, -1:] for x in (change, expected))
    assert_close(change, expected)
    logits.sum().backward()  # the graph is still there
    assert inputs.grad is not None
