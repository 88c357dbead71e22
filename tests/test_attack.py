"""Attacks in embedding space against a model whose worst case is known, and on a tiny RoBERTa."""

from typing import Any

import pytest
import torch
from toolkit import HEAD, assert_equal, batch, in_float64, set_up
from torch import Tensor

from smart_fairseq.encoder import Forward, encoder_of
from smart_fairseq.evaluation.attack import PLACE, attack, worst_point
from smart_fairseq.evaluation.full import RADII
from smart_fairseq.method.divergence import symmetric_kl


def margins(logits: Tensor) -> Tensor:
    return logits[:, 1] - logits[:, 0]


def cross_entropy_of(gold: Tensor) -> Any:
    return lambda outputs, _: torch.nn.functional.cross_entropy(outputs, gold, reduction="none")


@pytest.fixture
def linear():
    """Logits (0, m + slope . u): the margin m can be lowered by radius * |slope|_1 over the real tokens."""
    slope = torch.randn(3, 4, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])[..., None].double()
    clean = torch.stack([torch.zeros(3), torch.tensor([0.5, 0.0, -2.0])], dim=1).double()

    def outputs_fn(u: Tensor) -> Tensor:
        return clean + torch.stack([torch.zeros(3), (slope * u).sum(dim=(1, 2))], dim=1)

    return outputs_fn, clean, mask, (slope.abs() * mask).sum(dim=(1, 2))


@pytest.mark.parametrize("gold, sign", [(1, -1), (0, 1)])
def test_the_worst_point_of_a_linear_model(linear, gold, sign):
    outputs_fn, clean, mask, reach = linear
    start = 0.1 * (2 * torch.rand(3, 4, 5, dtype=torch.float64) - 1)
    damage = cross_entropy_of(torch.full((3,), gold))
    point, outputs = worst_point(outputs_fn, clean, damage, start, mask, radius=0.1)
    torch.testing.assert_close(margins(outputs), margins(clean) + sign * 0.1 * reach)
    assert_equal(point, point * mask)
    torch.testing.assert_close(point.abs().amax(dim=(1, 2)), torch.full((3,), 0.1, dtype=torch.float64))


def test_the_largest_divergence_of_a_linear_model(linear):
    """From a margin of 0, sKL = d (sigmoid(d) - 1/2) = d / 2 tanh(d / 2), with d = radius * |slope|_1 either way."""
    outputs_fn, _, mask, reach = linear
    clean, start = torch.zeros(3, 2, dtype=torch.float64), 0.01 * torch.randn(3, 4, 5, dtype=torch.float64)

    def from_zero(u: Tensor) -> Tensor:
        return outputs_fn(u) - outputs_fn(torch.zeros_like(u))

    _, outputs = worst_point(from_zero, clean, symmetric_kl, start.clamp(-0.1, 0.1), mask, radius=0.1)
    found, d = symmetric_kl(outputs, clean), 0.1 * reach
    torch.testing.assert_close(found, d / 2 * torch.tanh(d / 2))


def test_radius_0_is_the_clean_pass(linear):
    outputs_fn, clean, mask, _ = linear
    damage = cross_entropy_of(torch.zeros(3, dtype=torch.long))
    point, outputs = worst_point(outputs_fn, clean, damage, torch.zeros(3, 4, 5).double(), mask, radius=0.0)
    assert_equal(outputs, clean)
    assert not point.any()


def test_the_worst_point_seen_counts():
    """Damage -(u - 0.05)^2 in steps of 0.025 from -0.1: the way goes past the top and back, and ends beside it."""

    def outputs_fn(u: Tensor) -> Tensor:
        return u[:, 0]

    start, mask = torch.full((1, 1, 1), -0.1, dtype=torch.float64), torch.ones(1, 1, 1)
    clean = torch.zeros(1, 1, dtype=torch.float64)

    def damage(outputs: Tensor, _: Tensor) -> Tensor:
        return -(outputs[:, 0] - 0.05).square()

    point, _ = worst_point(outputs_fn, clean, damage, start, mask, radius=0.1)
    torch.testing.assert_close(point, torch.full_like(point, 0.05))


# A tiny RoBERTa ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(class_data):
    """Task and model in float64, where rounding turns no sign."""
    task, model, _ = set_up(class_data)
    return task, in_float64(model).eval()


def attacked(model: Any, sample: Any, gold: Tensor, **options: Any) -> dict[str, Tensor]:
    inputs = sample["net_input"]
    forward = Forward(encoder_of(model), model, inputs, HEAD, PLACE)
    return attack(forward, inputs["src_tokens"], sample["id"], gold, **{"radii": RADII, **options})


def clean_of(model: Any, sample: Any) -> Tensor:
    with torch.no_grad():
        return model(**sample["net_input"], features_only=True, classification_head_name=HEAD)[0].float()


def test_attacks_do_more_than_random_signs(tiny):
    task, model = tiny
    sample = batch(task, 16)
    clean = clean_of(model, sample)
    gold = clean.argmax(1)  # all right without an attack
    found = attacked(model, sample, gold)

    def right(outputs: Tensor) -> list[float]:
        return [(logits.argmax(1) == gold).float().mean().item() for logits in outputs]

    assert right(found["loss"])[-1] < right(found["random"])[-1]
    losses = torch.stack([torch.nn.functional.cross_entropy(o, gold, reduction="none") for o in found["loss"]])
    assert (losses.diff(dim=0) >= 0).all()  # a larger ball holds the smaller one
    for worst, random in zip(found["divergence"], found["random"]):
        assert (symmetric_kl(worst, clean).mean() > 2 * symmetric_kl(random, clean).mean()).all()


def test_a_rows_result_does_not_depend_on_its_batch(tiny):
    """Neither on the rows beside it nor on the padding that they bring."""
    task, model = tiny
    sample, gold = batch(task, 6), torch.tensor([0, 1, 0, 1, 0, 1])
    together = attacked(model, sample, gold, temperature=1.5)
    sizes = sample["net_input"]["src_lengths"]
    assert sizes.min() < sizes.max()
    for place in range(6):
        alone = attacked(model, batch(task, 1, place), gold[place : place + 1], temperature=1.5)
        for one, other in zip(together.values(), alone.values()):
            for radius_one, radius_other in zip(one, other):
                torch.testing.assert_close(radius_one[place], radius_other[0], atol=1e-5, rtol=1e-5)


def test_a_tiny_radius_is_the_clean_pass(tiny):
    task, model = tiny
    sample = batch(task, 4)
    found = attacked(model, sample, torch.tensor([0, 1, 0, 1]), radii=(1e-9,))
    for outputs in found.values():
        torch.testing.assert_close(outputs[0], clean_of(model, sample), atol=1e-6, rtol=1e-6)


def test_radii_are_shares_of_the_embeddings_size(tiny):
    """The table twice as large with all that follows the same: LayerNorm takes a factor out, so nothing changes."""
    task, model = tiny
    sample, gold = batch(task, 4), torch.tensor([0, 1, 0, 1])
    inner = model.encoder.sentence_encoder
    torch.nn.init.zeros_(inner.embed_positions.weight)
    inner.layernorm_embedding.eps = 1e-15
    before = attacked(model, sample, gold, radii=(0.03,))
    with torch.no_grad():
        inner.embed_tokens.weight.mul_(2)
    after = attacked(model, sample, gold, radii=(0.03,))
    for one, other in zip(before.values(), after.values()):
        torch.testing.assert_close(one[0], other[0], atol=1e-5, rtol=1e-5)


def test_temperature_does_not_turn_the_attack_on_two_classes(tiny):
    task, model = tiny
    sample, gold = batch(task, 4), torch.tensor([0, 1, 0, 1])
    one, other = (attacked(model, sample, gold, temperature=t, radii=(0.03,)) for t in (1.0, 4.0))
    torch.testing.assert_close(one["loss"][0], other["loss"][0], atol=1e-5, rtol=1e-5)
