"""Gaussian noise that belongs to an example, not to a batch.

Algorithm 1 of Jiang et al. (2020) starts from x + nu, nu ~ N(0, sigma^2 I). Drawn from torch's global
generator, nu would depend on how the examples are grouped: gradient accumulation or a second worker
would change the update. Here each number is a function of (seed, example, position, channel) alone, so
one batch of 8, two of 4 and two workers with 4 each start from the same noise, whatever the padding (but in groups of
candidates, whose positions are counted over rows that are joined at the batch's width).

The generator is SplitMix64 (Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number
generators", figure 17) with one stream per (seed, example), followed by Box and Muller (1958). It is
counter-based, so it runs as a few elementwise operations on any device without waiting for the host.
"""

import math

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The 64-bit pattern of ``value`` as torch's int64 holds it."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift: torch's own keeps the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's output function, int64 -> int64."""
    bits = (bits ^ _shift_right(bits, 30)) * _MULTIPLIER_1
    bits = (bits ^ _shift_right(bits, 27)) * _MULTIPLIER_2
    return bits ^ _shift_right(bits, 31)


def _streams(example_ids: Tensor, length: int, channels: int, seed: int) -> Tensor:
    """64 random bits for every entry, [B, T C] int64: one stream for each (seed, example)."""
    streams = _mix(_mix(torch.full_like(example_ids, _signed(seed)) + _GAMMA) ^ (example_ids * _GAMMA))
    counter = torch.arange(1, length * channels + 1, device=example_ids.device)
    return _mix(streams[:, None] + counter * _GAMMA)


def uniform_noise(example_ids: Tensor, length: int, channels: int, *, seed: int) -> Tensor:
    """Noise from the uniform distribution on (-1, 1); arguments and result as for `example_noise`.

    >>> noise = uniform_noise(torch.arange(100), length=10, channels=10, seed=1)
    >>> noise.shape, bool(noise.abs().max() < 1), round(noise.square().mean().item(), 2)  # 1 / 3
    (torch.Size([100, 10, 10]), True, 0.33)
    """
    bits = _streams(example_ids, length, channels, seed)
    # 23 bits and a half: the middle of one of 2^23 intervals, which float32 holds
    return ((_shift_right(bits, 41).float() + 0.5) * 2.0**-22 - 1).view(-1, length, channels)


def example_noise(example_ids: Tensor, length: int, channels: int, *, seed: int) -> Tensor:
    """Standard normal noise for each example of a batch.

    Args:
        example_ids: [B], int64; the examples' numbers in the data set.
        length: T, tokens in the padded batch; a shorter one gives a prefix of the same numbers.
        channels: C, embedding channels.
        seed: any integer; fairseq's seed plus the update number during training.
    Returns:
        [B, T, C], float32, on the device of ``example_ids``.

    >>> two = example_noise(torch.tensor([4, 7]), length=3, channels=2, seed=1)
    >>> alone = example_noise(torch.tensor([7]), length=2, channels=2, seed=1)
    >>> two.shape, torch.equal(two[1:, :2], alone)
    (torch.Size([2, 3, 2]), True)
    """
    bits = _streams(example_ids, length, channels, seed)
    # two uniform numbers of 24 bits each, the first in (0, 1] because its logarithm is taken
    radius = ((_shift_right(bits, 40) + 1).float() * 2.0**-24).log().mul(-2).sqrt()
    angle = (bits & 0xFFFFFF).float() * (2 * math.pi * 2.0**-24)
    return (radius * angle.cos()).view(-1, length, channels)
