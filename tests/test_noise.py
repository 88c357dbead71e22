"""The noise is Gaussian, and belongs to the example rather than to the batch."""

import math

import torch
from scipy import stats
from toolkit import assert_close, assert_equal

from smart_fairseq.method.noise import _mix, example_noise


def test_splitmix64_as_published() -> None:
    """First outputs of SplitMix64 for seed 1234567, as listed with the reference implementation."""
    gamma = 0x9E3779B97F4A7C15
    states = [(1234567 + gamma * i) % 2**64 for i in (1, 2, 3)]
    signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in states])
    outputs = [int(value) % 2**64 for value in _mix(signed)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_it_is_standard_normal() -> None:
    sample = example_noise(torch.arange(64), 32, 48, seed=3).flatten()
    assert abs(float(sample.mean())) < 5 / math.sqrt(sample.numel())
    assert abs(float(sample.std()) - 1) < 5 / math.sqrt(sample.numel())
    assert stats.kstest(sample.numpy(), "norm").pvalue > 1e-3


def test_neighbours_are_uncorrelated() -> None:
    """Across channels, positions, examples and seeds."""
    a, b = (example_noise(torch.arange(40), 20, 30, seed=seed) for seed in (1, 2))
    pairs = [(a, b), (a[1:], a[:-1]), (a[:, 1:], a[:, :-1]), (a[..., 1:], a[..., :-1])]
    for left, right in pairs:
        correlation = torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1]
        assert abs(float(correlation)) < 5 / math.sqrt(left.numel())


def test_it_depends_on_seed_and_example_alone() -> None:
    together = example_noise(torch.tensor([5, 2, 9]), 7, 4, seed=11)
    assert_equal(together[1:2], example_noise(torch.tensor([2]), 7, 4, seed=11))
    # a longer batch, with more padding, begins with the same numbers
    assert_equal(example_noise(torch.tensor([5, 2, 9]), 12, 4, seed=11)[:, :7], together)
    assert not torch.equal(together, example_noise(torch.tensor([5, 2, 9]), 7, 4, seed=12))


def test_any_seed_is_accepted() -> None:
    for seed in (0, -1, 2**64 - 1, 2**63):
        assert torch.isfinite(example_noise(torch.tensor([0]), 3, 4, seed=seed)).all()
    assert_close(
        example_noise(torch.tensor([0]), 3, 4, seed=-1), example_noise(torch.tensor([0]), 3, 4, seed=2**64 - 1)
    )
