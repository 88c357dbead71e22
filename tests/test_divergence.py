"""Divergences against values derived by hand and properties that define them."""

import math

import pytest
import torch
from toolkit import assert_close

from smart_fairseq.method.divergence import (
    DIVERGENCES,
    jensen_shannon,
    kl,
    squared_error,
    squared_error_of_classes,
    symmetric_kl,
)

P = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
Q = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64)


def test_kl_by_hand() -> None:
    """KL = .5 log(.5/.25) + .25 log(1) + .25 log(.25/.5) = .25 log 2; logits may carry any constant."""
    assert_close(kl(P.log() + 3, Q.log() - 1), torch.tensor([0.25 * math.log(2)], dtype=torch.float64))


def test_symmetric_kl_by_hand() -> None:
    """KL(P, Q) = KL(Q, P) = .25 log 2 here, and there is no half: .5 log 2."""
    assert_close(symmetric_kl(P.log(), Q.log()), torch.tensor([0.5 * math.log(2)], dtype=torch.float64))


def test_jensen_shannon_by_hand() -> None:
    """M = (.375, .25, .375): .5 [.5 log(4/3) + .25 log(2/3)] twice = .5 log(4/3) + .25 log(2/3)."""
    expected = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)
    assert_close(jensen_shannon(P.log(), Q.log()), torch.tensor([expected], dtype=torch.float64))


def test_squared_error_by_hand() -> None:
    outputs = torch.tensor([[1.0], [2.0]])
    reference = torch.tensor([[0.5], [4.0]])
    assert_close(squared_error(outputs, reference), torch.tensor([0.25, 4.0]))
    assert_close(squared_error_of_classes(P.log(), Q.log()), torch.tensor([0.125], dtype=torch.float64))


def test_symmetric_kl_is_the_sum_of_both_directions_in_float64() -> None:
    logits, reference = torch.randn(2, 50, 7, dtype=torch.float64) * 3
    assert_close(symmetric_kl(logits, reference), kl(logits, reference) + kl(reference, logits))


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_digits_are_kept_when_the_outputs_are_close(name: str) -> None:
    """At the paper's radius the outputs differ by about 1e-4: float32 must not lose the value in rounding."""
    divergence = DIVERGENCES[name]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 3, generator=generator)
    # steps of 2^-13 are exact in float32, so both precisions see the same numbers
    step = torch.randint(-4, 5, logits.shape, generator=generator) * 2.0**-13
    logits = (logits * 2**10).round() / 2**10
    exact = divergence(logits.double(), (logits + step).double())
    approximate = divergence(logits, logits + step)
    assert approximate.dtype == torch.float32 and (approximate >= 0).all()
    moved = exact > 0
    assert ((approximate - exact)[moved] / exact[moved]).abs().median() < 1e-3


def test_symmetric_kl_of_far_outputs_is_finite_with_finite_gradients() -> None:
    logits = torch.tensor([[300.0, -300.0]], requires_grad=True)
    value = symmetric_kl(logits, -logits.detach())
    assert_close(value, torch.tensor([1200.0]))
    value.sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_zero_at_equality_with_zero_gradient(name: str) -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    value = DIVERGENCES[name](logits, logits.detach().clone())
    assert_close(value, torch.zeros(5, dtype=torch.float64))
    value.sum().backward()
    assert_close(logits.grad, torch.zeros(5, 4, dtype=torch.float64))


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_not_negative_and_rows_are_independent(name: str) -> None:
    logits, reference = torch.randn(2, 40, 5, dtype=torch.float64) * 2
    together = DIVERGENCES[name](logits, reference)
    assert (together >= 0).all()
    alone = torch.cat([DIVERGENCES[name](logits[i : i + 1], reference[i : i + 1]) for i in range(40)])
    assert_close(together, alone)


@pytest.mark.parametrize("name", ["sym_kl", "js", "squared"])
def test_symmetric(name: str) -> None:
    logits, reference = torch.randn(2, 40, 5, dtype=torch.float64)
    assert_close(DIVERGENCES[name](logits, reference), DIVERGENCES[name](reference, logits))


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_gradients_reach_both_sides_and_are_right(name: str) -> None:
    logits, reference = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True).unbind()
    pair = (logits.detach().requires_grad_(), reference.detach().requires_grad_())
    assert torch.autograd.gradcheck(DIVERGENCES[name], pair)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    logits, reference = torch.randn(2, 6, 3).to(dtype)
    value = symmetric_kl(logits, reference)
    assert value.dtype == torch.float32
    assert_close(value, symmetric_kl(logits.double(), reference.double()))


@pytest.mark.parametrize("shapes", [((3, 1), (3,)), ((3,), (3,)), ((3, 1), (4, 1))])
def test_shapes_that_would_broadcast_are_refused(shapes: tuple) -> None:
    """[B, 1] against [B] broadcasts to B x B: the authors' release computes 3.63 for 2.57 that way."""
    with pytest.raises(ValueError, match="both must be"):
        squared_error(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
