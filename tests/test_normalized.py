"""`--smart-embedding normalized` and the recipe sift: against SiFT as its code has it, and what it must not change."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from toolkit import (
    BOLD,
    HALF_TYPES,
    HEAD,
    LIKE_ROBERTA,
    NO_DROPOUT,
    assert_close,
    assert_equal,
    assert_same_gradients,
    batch,
    command,
    in_float64,
    set_up,
    step,
    train,
    watch_terms,
)
from torch import Tensor

from smart_fairseq.config.recipes import RECIPES
from smart_fairseq.encoder import encoder_of
from smart_fairseq.errors import UsageError
from smart_fairseq.terms.precision import measure_place

# for the own LayerNorm, which divides padding's zeros by its root
NEXT_TO_NOTHING = 1e-12
NORMALIZED = [*BOLD, "--smart-embedding", "normalized"]


@contextmanager
def sift(model: Any, perturbation: Tensor | float) -> Iterator[None]:
    """As in DeBERTa's code: a LayerNorm without parameters, the perturbation, and then the encoder's own LayerNorm."""
    own = model.encoder.sentence_encoder.layernorm_embedding

    def before(module: Any, args: Any) -> Tensor:
        (x,) = args
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-7) + perturbation

    with own.register_forward_pre_hook(before):
        yield


def inputs_of(task: Any, size: int) -> dict[str, Any]:
    return {**batch(task, size)["net_input"], "classification_head_name": HEAD}


def test_it_is_what_sifts_code_computes(class_data: Path) -> None:
    """Logits and their gradients with respect to perturbation and weights, in float64.

    But for the own LayerNorm's epsilon: SiFT's embeddings have another size before it.
    """
    task, model, _ = set_up(class_data, *NO_DROPOUT)
    model = in_float64(model)
    model.encoder.sentence_encoder.layernorm_embedding.eps = NEXT_TO_NOTHING
    inputs = inputs_of(task, 4)
    perturbation = 0.1 * torch.randn(*inputs["src_tokens"].shape, 16, dtype=torch.float64)
    perturbation = (perturbation * inputs["src_tokens"].ne(1)[:, :, None]).requires_grad_()
    found = []
    for perturbed in (encoder_of(model).perturbed(perturbation, "normalized"), sift(model, perturbation)):
        with perturbed:
            logits = model(**inputs)[0]
        wanted = {"": perturbation, **{n: p for n, p in model.named_parameters() if "embed" in n or "layers.0" in n}}
        found.append([logits, *torch.autograd.grad(logits.square().sum(), list(wanted.values()))])
    for ours, theirs in zip(*found):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-9)
    with sift(model, 0.0):
        assert float((model(**inputs)[0] - found[0][0]).abs().min()) > 1e-3


def test_a_perturbation_that_leaves_the_direction_does_nothing(class_data: Path) -> None:
    """The sum is normalised once more, and nothing is left of a shift and of a stretch of a token's embedding.

    A perturbation between the normalisation and the LayerNorm's weight would move the output.
    """
    task, model, _ = set_up(class_data, *NO_DROPOUT)
    model = in_float64(model)
    model.encoder.sentence_encoder.layernorm_embedding.eps = NEXT_TO_NOTHING
    encoder, inputs = encoder_of(model), inputs_of(task, 4)
    embeddings = encoder.embeddings("normalized", {k: inputs[k] for k in ("src_tokens", "src_lengths")})
    with torch.no_grad():
        clean = model(**inputs)[0]
        for nothing in (torch.full_like(embeddings, 0.3), 0.3 * embeddings):
            with encoder.perturbed(nothing, "normalized"):
                assert_close(model(**inputs)[0], clean, rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=str)
@pytest.mark.parametrize("flags", [[], ["--smart-linear-search"], ["--smart-recompute"]], ids=" ".join)
def test_the_clean_pass_stays_the_models_own(flags: list[str], dtype: torch.dtype, class_data: Path) -> None:
    """Bit for bit, watched or not: its task loss is that of plain fine-tuning."""
    losses = []
    for criterion in ("smart_sentence_prediction", "sentence_prediction"):
        more = [*NORMALIZED, "--smart-epsilon", "0.1", *flags] if criterion.startswith("smart") else []
        task, model, ours = set_up(class_data, *LIKE_ROBERTA, *more, criterion=criterion)
        log = step(model.to(dtype), ours, batch(task, 6)).log
        losses.append(log.get("task_loss", log["loss"]))
    assert_equal(*losses)


@pytest.mark.parametrize("unit", ["absolute", "relative"])
@pytest.mark.parametrize("norm", ["inf", "l2"])
def test_a_radius_is_one_of_the_normalised_embeddings(norm: str, unit: str, class_data: Path) -> None:
    """Whose root mean square is 1: in the norm inf relative and absolute sizes are the same."""
    flags = [*NO_DROPOUT, *NORMALIZED, "--smart-epsilon-unit", unit, "--smart-norm", norm]
    task, model, criterion = set_up(class_data, *flags)
    sample, seen = batch(task, 6), watch_terms(criterion)
    log = step(model, criterion, sample).log
    real = sample["net_input"]["src_tokens"].ne(1)
    entries = 16 * real.sum(1)
    for index, perturbation in enumerate(seen[0].perturbation):
        size = perturbation.abs().max() if norm == "inf" else perturbation.norm()
        unit_size = float(entries[index]) ** 0.5 if (norm, unit) == ("l2", "relative") else 1.0
        assert float(size) == pytest.approx(1e-2 * unit_size, rel=1e-3)
        assert not perturbation[~real[index]].any()
    assert float(log["smart_delta"]) / 6 == pytest.approx(1e-2, rel=1e-4)


def test_the_scale_of_the_embeddings_does_not_count(class_data: Path) -> None:
    """What SiFT is for: tables ten times as large, the same term for the same absolute radius."""
    values = {"token": [], "normalized": []}
    for place, found in values.items():
        for factor in (10.0, 100.0):
            task, model, criterion = set_up(class_data, *NO_DROPOUT, *BOLD, "--smart-embedding", place)
            inner = model.encoder.sentence_encoder
            with torch.no_grad():
                inner.embed_tokens.weight *= factor
                inner.embed_positions.weight *= factor
            found.append(float(step(model, criterion, batch(task, 6)).log["smart_loss"]))
    (small, large), (small_token, large_token) = values["normalized"], values["token"]
    assert small == pytest.approx(large, rel=1e-3) and small > 1e-4
    assert small_token > 10 * large_token


def test_the_place_is_measured_as_a_layer_norm_without_parameters_makes_it(class_data: Path) -> None:
    task, model, _ = set_up(class_data, *LIKE_ROBERTA)
    sample = batch(task, 6)
    tokens, inner = sample["net_input"]["src_tokens"], model.encoder.sentence_encoder
    found = measure_place(encoder_of(model), "normalized", sample["net_input"])
    with torch.no_grad():
        summed = inner.embed_tokens(tokens) + inner.embed_positions(tokens)
    real = torch.nn.functional.layer_norm(summed, [64], eps=1e-7)[tokens.ne(1)]
    assert found.median == pytest.approx(float(real.abs().median()), rel=1e-5)
    assert found.root_mean_square == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize(("epsilon", "form"), [("0.05", "two_forwards"), ("1e-3", "first_order")])
def test_in_half_precision(epsilon: str, form: str, dtype: torch.dtype, class_data: Path) -> None:
    """R_s and its perturbation as in float32, in both forms."""
    found = []
    for precision in (torch.float32, dtype):
        flags = [*NORMALIZED, "--smart-epsilon", epsilon, "--smart-step-size", "5"]
        task, model, criterion = set_up(class_data, *NO_DROPOUT, *flags)
        sample, seen = batch(task, 8), watch_terms(criterion)
        model = model.to(dtype).to(precision)  # the same weights
        result = step(model, criterion, sample)
        found.append((result.log["smart_loss"].float(), seen[0].perturbation.float()))
    assert criterion.forms[""].term.value == form
    assert result.gradients["encoder.sentence_encoder.embed_tokens.weight"].isfinite().all()
    (exact, direction), (half, half_direction) = found
    assert_close(half, exact, rtol=0.1)
    assert torch.nn.functional.cosine_similarity(direction.flatten(1), half_direction.flatten(1)).median() > 0.98


def test_recomputing_changes_nothing(class_data: Path) -> None:
    """Of loss and gradients, with dropout on."""
    steps = []
    for flags in ([], ["--smart-recompute"]):
        task, model, criterion = set_up(class_data, *LIKE_ROBERTA, *NORMALIZED, *flags)
        steps.append(step(model.double(), criterion, batch(task, 4)))
    assert_close(steps[0].log["smart_loss"], steps[1].log["smart_loss"], rtol=1e-6)
    assert_same_gradients(steps[0], steps[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("flags", [["--smart-embedding", "normalized"], ["--smart-recipe", "sift"]], ids=" ".join)
def test_an_encoder_without_that_layer_norm_is_refused(flags: list[str], class_data: Path) -> None:
    """Before the first update; roberta_prenorm has none on its embeddings."""
    with pytest.raises(UsageError) as caught:
        train(command(class_data, *BOLD, "--arch", "roberta_prenorm", *flags))
    assert str(caught.value) == (
        "--smart-embedding is normalized, and this model's embeddings enter no LayerNorm (--smart-recipe sift has that "
        "value); use token or input"
    )


def test_the_recipe_of_sift_is_sifts(class_data: Path) -> None:
    """Noise of 1e-2 cut at twice that, by absolute sizes; it trains, and the term is there."""
    sizes = [RECIPES["sift"][f"smart_{name}"] for name in ("epsilon", "noise_std", "step_size", "epsilon_unit")]
    assert sizes == [2e-2, 1e-2, 1e-4, "absolute"] and RECIPES["sift"]["smart_embedding"] == "normalized"
    run = train(command(class_data, "--smart-recipe", "sift", max_update=3))
    assert "--smart-embedding normalized" in "\n".join(run["text"])
    # of the mean token: the largest of 16 entries of a normal distribution, 1.97 deviations, cut at two
    assert all(1.4e-2 < line["smart_delta"] <= 2e-2 and line["smart_loss"] > 0 for line in run["train_inner"])
    task, model, criterion = set_up(class_data, "--smart-recipe", "sift", *NO_DROPOUT)
    seen = watch_terms(criterion)
    step(model, criterion, batch(task, 8))
    noise = seen[0].perturbation[seen[0].perturbation.abs().sum(2) > 0]
    # a normal distribution cut at two deviations has 0.95 of them
    assert float(noise.std()) == pytest.approx(0.0096, rel=0.1) and float(noise.abs().max()) == pytest.approx(2e-2)


def test_the_recipe_of_sift_in_half_precision(class_data: Path) -> None:
    """Its sizes are resolved in float16, and at the edge of it in bfloat16, which refuses them."""
    for dtype in HALF_TYPES:
        task, model, criterion = set_up(class_data, "--smart-recipe", "sift", *LIKE_ROBERTA)
        if dtype == torch.float16:
            assert float(step(model.to(dtype), criterion, batch(task, 6)).log["smart_loss"]) > 0
        else:
            with pytest.raises(UsageError, match=r"= 0\.0101 is below what bfloat16 resolves here \(1e-02\)"):
                step(model.to(dtype), criterion, batch(task, 6))
