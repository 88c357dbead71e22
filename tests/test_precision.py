"""Both forms of the smoothness term, and the Bregman term: in every precision, against float64."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from toolkit import (
    DEVICE,
    HALF_TYPES,
    HEAD,
    KINDS,
    NO_DROPOUT,
    assert_close,
    batch,
    command,
    flops,
    in_float64,
    represented,
    set_up,
    step,
    train,
    watch_terms,
    write_data,
)

from smart_fairseq.encoder import Forward, encoder_of
from smart_fairseq.method.divergence import (
    squared_change,
    squared_change_of_classes,
    squared_error,
    squared_error_of_classes,
    symmetric_kl,
    symmetric_kl_of_change,
)
from smart_fairseq.method.teacher import average_
from smart_fairseq.terms.bregman import bregman
from smart_fairseq.terms.precision import Form, FormOfTerm, Search

WIDER = ["--encoder-embed-dim", "64", "--encoder-ffn-embed-dim", "128", "--encoder-layers", "3"]
TWO_FORWARDS = (FormOfTerm.TWO_FORWARDS, Search.CLEAN_PASS)
TANGENT, FINITE = ["--smart-mode", "tangent"], ["--smart-mode", "finite"]


def set_up_wider(data: Path, *flags: str, **options: Any) -> tuple[Any, Any, Any]:
    """Task, model and criterion with weights of the size that trained encoders have, the same on every device."""
    task, model, criterion = set_up(data, *WIDER, *flags, **options)
    generator = torch.Generator().manual_seed(4)
    stds = {module.weight: 0.08 for module in model.modules() if isinstance(module, torch.nn.Linear)}
    for weight, std in {**stds, model.encoder.sentence_encoder.embed_tokens.weight: 0.1}.items():
        weight.data.copy_(std * torch.randn(weight.shape, generator=generator))
    return task, model, criterion


def term_and_gradient(
    model: Any, criterion: Any, sample: Any, seed: int = 3
) -> tuple[float, dict[str, torch.Tensor], Any]:
    """R_s per example, and the gradient of R_s over the squared radius, which every precision can hold."""
    seen = watch_terms(criterion)
    torch.manual_seed(seed)
    _, size, log = criterion(model, sample)
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    scaled = seen[0].value / criterion.settings.adversary.size**2
    gradients = torch.autograd.grad(scaled, parameters, allow_unused=True)
    kept = {name: gradient.double() for name, gradient in zip(names, gradients) if gradient is not None}
    return float(log["smart_loss"]) / size, kept, log


def cosine(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    names = sorted(set(a) & set(b))
    first, second = (torch.cat([gradients[name].flatten() for name in names]) for gradients in (a, b))
    return float(first @ second / first.norm() / second.norm())


@pytest.mark.parametrize(
    ("dtype", "radius", "kind"),
    represented([*HALF_TYPES, torch.float32], ["1e-5", "1e-4", "1e-3"], [*KINDS, "pairs"]),
)
def test_against_finite_perturbations_in_float64(
    dtype: torch.dtype, radius: str, kind: str, class_data: Path, regression_data: Path, pair_data: Path
) -> None:
    """R_s within 5 %, its parameter gradient at cosine 0.99 and within 5 % in norm."""
    data = {"classes": class_data, "regression": regression_data, "pairs": pair_data}[kind]
    flags = [*NO_DROPOUT, "--smart-epsilon", radius, "--smart-step-size", "1"]
    task, model, criterion = set_up_wider(data, *flags, *TANGENT, kind=kind)
    model.to(dtype)
    sample = batch(task, 8)
    term, gradient, log = term_and_gradient(model, criterion, sample)
    _, _, exact_criterion = set_up_wider(data, *flags, *FINITE, kind=kind)
    exact, exact_gradient, _ = term_and_gradient(in_float64(model), exact_criterion, sample)
    assert exact > 0
    assert term == pytest.approx(exact, rel=0.05)
    assert cosine(gradient, exact_gradient) > 0.99
    norms = [torch.cat([g.flatten() for g in gs.values()]).norm() for gs in (gradient, exact_gradient)]
    assert float(norms[0] / norms[1]) == pytest.approx(1, abs=0.05)
    assert float(log["smart_delta"]) == pytest.approx(8 * float(radius), rel=1e-3)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Of two gradients, relative to the second; one may lack what is 0."""
    differences = [gradient - a.get(name, 0) for name, gradient in b.items()]
    norms = [torch.cat([g.flatten() for g in gradients]).norm() for gradients in (differences, b.values())]
    return float(norms[0] / norms[1])


def both(model: Any, criterion: Any, exact_criterion: Any, sample: Any) -> tuple[float, float, float, Any]:
    """R_s, the same in float64, the cosine of their parameter gradients, and the log."""
    term, gradient, log = term_and_gradient(model, criterion, sample)
    exact, exact_gradient, _ = term_and_gradient(in_float64(model), exact_criterion, sample)
    return term, exact, cosine(gradient, exact_gradient), log


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("radius", "relative"), [("1e-5", 2e-3), ("1e-4", 2e-4), ("1e-3", 1e-5)])
def test_two_forwards_in_float32(
    radius: str, relative: float, kind: str, class_data: Path, regression_data: Path
) -> None:
    """The relative error is the rounding of the outputs over their change: seen 5e-9 over the radius."""
    data = class_data if kind == "classes" else regression_data
    flags = [*NO_DROPOUT, "--smart-epsilon", radius, "--smart-step-size", "1"]
    task, model, criterion = set_up_wider(data, *flags, kind=kind)
    term, exact, aligned, _ = both(model, criterion, set_up_wider(data, *flags, kind=kind)[2], batch(task, 8))
    assert criterion.forms[""][:2] == TWO_FORWARDS
    assert term == pytest.approx(exact, rel=relative) and aligned > 1 - 1e-5


WAYS = [
    [],
    ["--smart-steps", "2", "--smart-noise-std", "1e-7"],
    ["--smart-norm", "l2", "--smart-epsilon", "0.2"],
    ["--smart-divergence", "squared"],
    ["--smart-divergence", "js"],
    ["--smart-dropout", "off"],
]


@pytest.mark.parametrize(("dtype", "flags"), represented(HALF_TYPES, WAYS, together=1), ids=str)
def test_two_forwards_in_half_precision(dtype: torch.dtype, flags: list[str], class_data: Path) -> None:
    """At a radius that half precision resolves, from noise that it does not: every example goes up all the way."""
    shared = [*NO_DROPOUT, "--smart-epsilon", "2e-2", "--smart-step-size", "1", *flags]
    task, model, criterion = set_up_wider(class_data, *shared)
    term, exact, aligned, log = both(model.to(dtype), criterion, set_up_wider(class_data, *shared)[2], batch(task, 8))
    assert criterion.forms[""][:2] == TWO_FORWARDS
    assert term == pytest.approx(exact, rel=0.05) and aligned > 0.99
    assert float(log["smart_delta"]) == pytest.approx(8 * criterion.cfg.smart_epsilon, rel=1e-3)


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_the_release_in_half_precision_follows_the_gradient(dtype: torch.dtype, class_data: Path) -> None:
    """Normalised to size 1 the noise alone would pass for a perturbation, were its gradient lost in rounding."""
    flags = [*NO_DROPOUT, "--smart-projection", "normalize", "--smart-norm", "l2", "--smart-step-size", "1"]
    task, model, criterion = set_up_wider(class_data, *flags)
    term, exact, aligned, _ = both(model.to(dtype), criterion, set_up_wider(class_data, *flags)[2], batch(task, 8))
    assert term == pytest.approx(exact, rel=0.05) and aligned > 0.99


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*HALF_TYPES, torch.float32])
def test_bregman_term(dtype: torch.dtype, kind: str, class_data: Path, regression_data: Path) -> None:
    """After a few updates of float32 weights and their average; from its half-precision copies against float64.

    5 % of the value (float32: 1e-5), cosine 0.99 of its parameter gradient.
    """
    data = class_data if kind == "classes" else regression_data
    task, model, criterion = set_up_wider(data, *NO_DROPOUT, kind=kind)
    sample = batch(task, 8)
    weights = [p for p in model.parameters() if p.requires_grad]
    teacher = [p.detach().clone() for p in weights]
    base = torch.optim.Adam(weights, lr=1e-4)
    for _ in range(5):
        base.zero_grad()
        task_criterion_loss(model, criterion, sample).backward()
        base.step()
        average_(teacher, [p.detach() for p in weights], 0.99)
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def term(dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
        student = copy.deepcopy(model).to(dtype)
        forward = Forward(encoder_of(student), student, sample["net_input"], HEAD, "token")
        weights = {name: tensor.to(dtype) for name, tensor in zip(names, teacher)}
        with bregman(forward, weights, criterion.divergence) as found:
            value = found(forward()).value / 8
        # at a size that float16 can hold
        (1e2 * value).backward()
        return float(value.detach()), {n: p.grad.double() for n, p in student.named_parameters() if p.grad is not None}

    (value, gradient), (exact, exact_gradient) = term(dtype), term(torch.float64)
    assert exact > 1e-2
    relative = 1e-5 if dtype == torch.float32 else 0.05
    assert value == pytest.approx(exact, rel=relative) and cosine(gradient, exact_gradient) > 0.99


def task_criterion_loss(model: Any, criterion: Any, sample: Any) -> torch.Tensor:
    """The loss of `sentence_prediction` alone."""
    loss: torch.Tensor = super(type(criterion), criterion).forward(model, sample)[0]
    return loss


@pytest.mark.parametrize("place", ["token", "normalized", "input"])
@pytest.mark.parametrize("flags", [["--smart-steps", "3"], ["--smart-norm", "l2", "--smart-norm-scope", "token"]])
def test_steps_norms_and_places(flags: list[str], place: str, class_data: Path) -> None:
    """In float64 both forms agree to second order for every way to ascend."""
    shared = [*NO_DROPOUT, "--smart-epsilon", "1e-5", "--smart-step-size", "1e-5", "--smart-embedding", place, *flags]
    results = []
    for mode in ("tangent", "finite"):
        task, model, criterion = set_up_wider(class_data, *shared, "--smart-mode", mode)
        results.append(term_and_gradient(model.double(), criterion, batch(task, 6)))
    (term, gradient, _), (exact, exact_gradient, _) = results
    assert term == pytest.approx(exact, rel=1e-3)
    # a token with next to no gradient may go either way
    assert cosine(gradient, exact_gradient) > 0.999


def test_with_dropout_the_masks_are_those_of_the_clean_pass(class_data: Path) -> None:
    """In float32, dropout on: the finite form with shared masks gives the same number."""
    heavy = ["--dropout", "0.2", "--attention-dropout", "0.2", "--pooler-dropout", "0.2", "--smart-epsilon", "1e-3"]
    results = []
    for mode in ("tangent", "finite"):
        task, model, criterion = set_up_wider(class_data, *heavy, "--smart-mode", mode)
        if DEVICE == "cuda":  # where the attention that is written out draws other masks than the fused one
            for layer in model.encoder.sentence_encoder.layers:
                layer.self_attn.dropout_module.p = 0.0
        results.append(term_and_gradient(model, criterion, batch(task, 6)))
    assert results[0][0] == pytest.approx(results[1][0], rel=0.02)
    assert cosine(results[0][1], results[1][1]) > 0.999


def test_the_task_loss_and_its_gradient_stay(class_data: Path) -> None:
    """Written-out attention and LayerNorm compute what fairseq's do."""
    outputs = []
    for mode in ("tangent", "finite"):
        task, model, criterion = set_up_wider(class_data, *NO_DROPOUT, "--smart-mode", mode)
        before = [(module, "forward" in vars(module)) for module in model.modules()]
        _, log, gradients = step(model, criterion, batch(task, 6), seed=1)
        outputs.append((log["task_loss"], list(gradients.values())))
        assert before == [(module, "forward" in vars(module)) for module in model.modules()]
    assert_close(outputs[0][0], outputs[1][0])
    assert len(outputs[0][1]) == len(outputs[1][1])
    for ours, theirs in zip(outputs[0][1], outputs[1][1]):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "flags", "classes", "expected"),
    [
        (torch.float32, TANGENT, 2, 8),
        (torch.float32, TANGENT, 3, 9),
        (torch.float32, TANGENT, 4, 9),
        (torch.float32, TANGENT, 6, 9),
        (torch.bfloat16, [*FINITE, "--smart-epsilon", "2e-2", "--smart-step-size", "1"], 2, 7),
        (torch.float32, FINITE, 2, 7),
    ],
    ids=str,
)
def test_cost(dtype: torch.dtype, flags: list[str], classes: int, expected: float, class_data: Path) -> None:
    """Without the teacher: 2 forward-equivalents for the direction, or 3 in any number of classes; 2 and 4 for the
    pass with its change. By two forwards in half precision no more than in float32."""

    def cost(dtype: torch.dtype, *flags: str, **options: Any) -> float:
        wide = ["--encoder-embed-dim", "128", "--encoder-ffn-embed-dim", "512"]
        task, model, criterion = set_up_wider(class_data, *wide, *flags, **options)
        return flops(model.to(dtype), criterion, batch(task, 4))

    forward = cost(torch.float32, criterion="sentence_prediction") / 3
    assert cost(dtype, *flags, num_classes=classes) / forward == pytest.approx(expected, abs=0.25)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("radius", ["1e-5", "1e-2"])
def test_a_first_step_from_the_clean_pass(radius: str, kind: str, class_data: Path, regression_data: Path) -> None:
    """What the first order changes, seen in float64: next to nothing."""
    data = class_data if kind == "classes" else regression_data
    flags = [*NO_DROPOUT, "--smart-epsilon", radius, "--smart-step-size", radius]
    values, gradients = [], []
    for search in (Search.FORWARD, Search.CLEAN_PASS):
        task, model, criterion = set_up_wider(data, *flags, kind=kind)
        criterion.forms[""] = Form(FormOfTerm.TWO_FORWARDS, search)
        value, gradient, _ = term_and_gradient(in_float64(model), criterion, batch(task, 8))
        values.append(value)
        gradients.append(gradient)
    assert 0 < abs(values[1] / values[0] - 1) < 1e-4 and distance(gradients[1], gradients[0]) < 2e-4


def test_products_are_the_jacobian_and_its_transpose(class_data: Path) -> None:
    """<c, J d> = <J' c, d>, and J d is the central difference."""
    task, model, _ = set_up_wider(class_data, *NO_DROPOUT, "--activation-fn", "tanh")
    model.double()
    sample = batch(task, 4)
    encoder = encoder_of(model)
    forward = Forward(encoder, model, sample["net_input"], HEAD, "token")
    weights = encoder.frozen_weights()
    direction = torch.randn(*sample["net_input"]["src_tokens"].shape, 64, dtype=torch.float64, device=DEVICE)
    logits, change, pull_back = forward.products(weights, direction)
    assert_close(logits, forward(weights))
    cotangent = torch.randn_like(logits)
    assert_close((cotangent * change).sum(), (pull_back(cotangent) * direction).sum())
    difference = (forward(weights, 1e-6 * direction) - forward(weights, -1e-6 * direction)) / 2e-6
    assert_close(change, difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0])
def test_divergences_of_a_change(size: float) -> None:
    logits, change = torch.randn(2, 20, 4, dtype=torch.float64)
    expected = symmetric_kl(logits + size * change, logits)
    assert_close(symmetric_kl_of_change(logits, size * change), expected, rtol=1e-6, atol=1e-22)
    # in float32 too, where logits + change rounds to logits
    assert_close(symmetric_kl_of_change(logits.float(), size * change.float()), expected, rtol=1e-4, atol=1e-22)
    assert_close(squared_change(logits, size * change), squared_error(logits + size * change, logits), rtol=1e-6)
    expected = squared_error_of_classes(logits + size * change, logits)
    assert_close(squared_change_of_classes(logits, size * change), expected, rtol=1e-6, atol=1e-22)
    changed = squared_change_of_classes(logits.float(), size * change.float())
    assert_close(changed, expected, rtol=1e-4, atol=1e-22)


@pytest.mark.slow
def test_two_hundred_updates_end_where_float32_ends(tmp_path: Path) -> None:
    """In accuracy, on 256 examples of which a fifth are labelled wrongly (standard error 2.4), and in the loss."""
    data = write_data(tmp_path / "data", train=256, valid=256, wrong=0.2)
    arguments = command(
        data, "--smart-epsilon", "1e-2", "--smart-step-size", "1e-2", "--mbpp-momentum", "0.9",
        "--mbpp-warmup-momentum", "0.9", "--lr", "3e-3", "--warmup-updates", "20", "--batch-size", "16",
        "--fp16-init-scale", "16", max_update=200, validate=True,
    )  # fmt: skip
    ends = {}
    for precision in ("float32", "bf16", "fp16"):
        common = {} if precision == "float32" else {precision: True, "fp16_no_flatten_grads": precision == "fp16"}
        log = train(arguments, **common)
        assert len(log["train_inner"]) == 200
        assert all(
            math.isfinite(value) for line in log["train_inner"] for value in line.values() if value != "two_forwards"
        )
        assert not any("smart_dropped" in line or "bregman_dropped" in line for line in log["train_inner"])
        ends[precision] = log["valid"][-1]["valid_accuracy"], log["train"][-1]["train_task_loss"]
    assert ends["float32"][0] > 75
    for precision in ("bf16", "fp16"):
        assert ends[precision][0] == pytest.approx(ends["float32"][0], abs=4)
        assert ends[precision][1] == pytest.approx(ends["float32"][1], rel=0.1)
