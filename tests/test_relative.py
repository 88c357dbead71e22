"""Sizes relative to the embeddings: what rescales them, and what does not reach into another example."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from toolkit import HALF_TYPES, NO_DROPOUT, assert_close, assert_equal, batch, represented, set_up, step, watch_terms

RELATIVE = ["--smart-epsilon-unit", "relative", "--smart-epsilon", "0.05", "--smart-step-size", "5"]
RELATIVE += ["--smart-noise-std", "1e-3"]
ABSOLUTE = ["--smart-epsilon", "1e-2", "--smart-step-size", "1", "--smart-noise-std", "1e-4"]


def rescaled(model: Any, factor: float) -> Any:
    """The same function of the tokens from embeddings ``factor`` times as large.

    The positions' too, so that their sum is; the LayerNorm after it takes the factor out.
    """
    model = copy.deepcopy(model)
    encoder = model.encoder.sentence_encoder
    encoder.layernorm_embedding.eps = 1e-20
    with torch.no_grad():
        encoder.embed_tokens.weight *= factor
        encoder.embed_positions.weight *= factor
    return model


def smoothness(data: Path, flags: list[str], factor: float) -> torch.Tensor:
    task, model, criterion = set_up(data, *NO_DROPOUT, *flags)
    model.encoder.sentence_encoder.layernorm_embedding.eps = 1e-20
    return step(rescaled(model, factor), criterion, batch(task, 6)).log["smart_loss"]


@pytest.mark.parametrize(
    ("mode", "scope", "norm", "steps"),
    represented(["finite", "tangent"], ["example", "token"], ["inf", "l2"], ["1", "2"]),
)
def test_a_larger_table_changes_nothing(mode: str, scope: str, norm: str, steps: str, class_data: Path) -> None:
    flags = [*RELATIVE, "--smart-norm", norm, "--smart-norm-scope", scope, "--smart-steps", steps]
    small, large = (smoothness(class_data, [*flags, "--smart-mode", mode], factor) for factor in (1.0, 10.0))
    assert small > 1e-4
    assert_close(large, small, rtol=1e-4)


def test_an_absolute_radius_is_another_one(class_data: Path) -> None:
    small, large = (smoothness(class_data, ABSOLUTE, factor) for factor in (1.0, 10.0))
    assert small > 50 * large > 0


@pytest.mark.parametrize("place", ["token", "input"])
def test_the_radius_of_an_example_is_its_own(place: str, class_data: Path) -> None:
    """The share of the root mean square over its own real tokens, whatever stands beside it."""
    task, model, criterion = set_up(class_data, *NO_DROPOUT, *RELATIVE, "--smart-embedding", place)
    seen = watch_terms(criterion)
    whole = batch(task, 6)
    step(model, criterion, whole)
    encoder = model.encoder.sentence_encoder
    for index, tokens in enumerate(whole["net_input"]["src_tokens"]):
        real = tokens.ne(1)
        with torch.no_grad():
            x = encoder.embed_tokens(tokens) if place == "token" else encoder.forward_embedding(tokens[None])[0][0]
        root_mean_square = x[real].square().mean().sqrt()
        assert_close(seen[0].perturbation[index].abs().max(), 0.05 * root_mean_square)
        assert not seen[0].perturbation[index][~real].any()
    alone = batch(task, 1, start=2)
    step(model, criterion, alone)
    length = int(alone["net_input"]["src_tokens"].shape[1])
    assert_close(seen[1].perturbation[0], seen[0].perturbation[2, :length], atol=1e-7, rtol=1e-4)


def test_the_log_is_in_the_unit_of_the_flag(class_data: Path) -> None:
    task, model, criterion = set_up(class_data, *RELATIVE)
    assert float(step(model, criterion, batch(task, 4)).log["smart_delta"]) / 4 == pytest.approx(0.05, rel=1e-4)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("epsilon", ["0.05", "1e-3"])
def test_in_half_precision(epsilon: str, dtype: torch.dtype, class_data: Path) -> None:
    """R_s and its perturbation as in float32, by two forwards and, where they cannot resolve it, to first order."""
    found = []
    for precision in (torch.float32, dtype):
        task, model, criterion = set_up(class_data, *NO_DROPOUT, *RELATIVE, "--smart-epsilon", epsilon)
        sample, seen = batch(task, 8), watch_terms(criterion)
        model = model.to(dtype).to(precision)  # the same weights
        log = step(model, criterion, sample).log
        found.append((log["smart_loss"].float(), seen[0].perturbation.float(), criterion.forms[""].term.value))
    (exact, direction, _), (half, half_direction, form) = found
    assert form == ("first_order" if epsilon == "1e-3" else "two_forwards")
    assert_close(half, exact, rtol=0.1)
    cosine = torch.nn.functional.cosine_similarity(direction.flatten(1), half_direction.flatten(1))
    assert cosine.median() > 0.98


def test_absolute_sizes_ask_nothing_of_the_embeddings(class_data: Path) -> None:
    """Bit for bit the sizes that they were: an example's unit is 1."""
    task, model, criterion = set_up(class_data, *NO_DROPOUT, *ABSOLUTE)
    sample, seen = batch(task, 4), watch_terms(criterion)
    step(model, criterion, sample)
    assert_equal(seen[0].perturbation.abs().amax(dim=(1, 2)), torch.full((4,), 1e-2))
