"""The criterion on a real RoBERTa against the literal Algorithm 1 of reference.py, in float64."""

import copy
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from fairseq.criterions.sentence_prediction import SentencePredictionCriterion
from toolkit import HEAD, NO_DROPOUT, assert_close, batch, represented, set_up, watch_terms

from smart_fairseq.method.noise import example_noise

NORMS, SCOPES, PROJECTIONS = ["inf", "l2"], ["example", "token"], ["ball", "normalize"]
PLACES = ["token", "normalized", "input"]


def prepared(data: Path, kind: str, *flags: str, **options: Any) -> tuple[Any, ...]:
    """A float64 model two updates away from its teacher, a batch, and the teacher as a model of its own."""
    teacher_flags = ["--mbpp-warmup-ratio", "0", "--mbpp-momentum", "0.7"]
    task, model, criterion = set_up(data, *NO_DROPOUT, *teacher_flags, *flags, kind=kind, optimizer="mbpp", **options)
    model.double()
    for layer in model.encoder.sentence_encoder.layers:
        layer.activation_fn = torch.tanh  # not gelu, which fairseq computes in float32 whatever the model's precision
    optimizer = criterion.link._optimizer
    generator = torch.Generator().manual_seed(9)
    # a head whose every term is large enough to be seen
    torch.nn.init.normal_(model.classification_heads[HEAD].out_proj.weight, std=1.0, generator=generator)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, average in zip(teacher.parameters(), optimizer.teacher):
            parameter.copy_(average)
    assert any(not torch.equal(a, b) for a, b in zip(teacher.parameters(), model.parameters()))
    optimizer.zero_grad()
    sample = batch(task, 4)
    if kind == "regression":
        sample["target"] = sample["target"].double()
    return criterion, model, teacher, sample


class Literal:
    """What the literal algorithm makes of a batch; means over its examples."""

    def __init__(self, model: Any, teacher: Any, sample: Any, kind: str, place: str, **settings: Any) -> None:
        tokens, regression = sample["net_input"]["src_tokens"], kind == "regression"
        noise = settings.pop("noise_std") * example_noise(sample["id"], tokens.shape[1], 16, seed=77).double()
        students = [reference.as_function_of_embeddings(model, row, place) for row in tokens]
        teachers = [reference.as_function_of_embeddings(teacher, row, place) for row in tokens]
        xs = [reference.embeddings_of(model, row, place) for row in tokens]
        # the teacher has embeddings of its own: its function takes the offset from the student's
        teacher_xs = [reference.embeddings_of(teacher, row, place) for row in tokens]
        lengths = tokens.ne(1).sum(1).tolist()
        assert min(lengths) < tokens.shape[1], "the batch has no padding to leave alone"
        x_tildes = [
            reference.perturb(f, x.detach(), length, row_noise, regression=regression, **settings)
            for f, x, length, row_noise in zip(students, xs, lengths, noise)
        ]
        terms = [
            reference.objective(
                students[i],
                lambda _, i=i: teachers[i](teacher_xs[i]),
                [xs[i]],
                [x_tildes[i]],
                sample["target"].view(-1)[i : i + 1],
                regression,
            )
            for i in range(len(tokens))
        ]
        self.perturbation = torch.stack(x_tildes) - torch.stack(xs).detach()
        self.task_loss, self.smooth, self.bregman = (torch.stack(column).mean() for column in zip(*terms))


@pytest.mark.parametrize(
    ("kind", "steps", "norm", "scope", "projection", "place"),
    represented(["classes", "regression"], [1, 3], NORMS, SCOPES, PROJECTIONS, PLACES, together=3),
)
def test_against_the_literal_algorithm(
    kind: str,
    steps: int,
    norm: str,
    scope: str,
    projection: str,
    place: str,
    class_data: Path,
    regression_data: Path,
) -> None:
    """x~, R_s, D_Breg and all gradients; a ball small enough to bind and a noise that partly leaves it.

    As in the package, the first step follows the gradient of the linearised model; the reference's Jacobian is its own.
    """
    check(class_data if kind == "classes" else regression_data, kind, steps, norm, scope, projection, place)


@pytest.mark.parametrize(
    ("flags", "classes", "place"),
    represented([([], 3), ([], 4), (["--smart-recompute"], 2), (["--smart-recompute"], 3)], PLACES, together=1),
    ids=str,
)
def test_more_classes_and_a_first_step_from_a_pass_of_its_own(
    flags: list[str], classes: int, place: str, class_data: Path
) -> None:
    check(class_data, "classes", 2, "inf", "example", "ball", place, *flags, num_classes=classes)


@pytest.mark.parametrize("place", ["token", "input"])
@pytest.mark.parametrize(("steps", "norm"), [(1, "inf"), (2, "l2")])
@pytest.mark.parametrize("encoder", ["prenorm", "bert"])
def test_other_encoders(encoder: str, steps: int, norm: str, place: str, class_data: Path, pair_data: Path) -> None:
    """Pre-norm RoBERTa, and BERT on pairs: what is perturbed is the lookup, to which token types are added."""
    settings = (steps, norm, "example", "ball", place)
    if encoder == "prenorm":
        check(class_data, "classes", *settings, "--arch", "roberta_prenorm")
    else:
        check(pair_data, "pairs", *settings)


@pytest.mark.parametrize(
    ("norm", "scope", "steps", "classes", "place"), represented(NORMS, SCOPES, [(1, 2), (2, 3), (1, 5)], PLACES)
)
def test_sizes_relative_to_the_embeddings(
    norm: str, scope: str, steps: int, classes: int, place: str, class_data: Path
) -> None:
    options: Any = dict(num_classes=classes, relative=True)
    if classes == 5:  # whose first step is from the second order of the divergence: see below
        options |= dict(noise_std=1e-5, tolerance={"rtol": 5e-3, "atol": 1e-4})
    for projection in ("ball", "normalize") if classes == 2 else ("ball",):
        flags = ("--smart-epsilon-unit", "relative")
        check(class_data, "classes", steps, norm, scope, projection, place, *flags, **options)


def check(
    data: Path,
    kind: str,
    steps: int,
    norm: str,
    scope: str,
    projection: str,
    place: str,
    *flags: str,
    relative: bool = False,
    noise_std: float = 1e-2,
    tolerance: dict[str, float] | None = None,
    **options: Any,
) -> None:
    criterion, model, teacher, sample = prepared(
        data,
        kind,
        *("--smart-weight", "3", "--smart-bregman-weight", "2", "--smart-embedding", place),
        *("--smart-epsilon", "2e-2", "--smart-step-size", "3e-2", "--smart-noise-std", str(noise_std)),
        *("--smart-steps", str(steps), "--smart-norm", norm, "--smart-norm-scope", scope),
        *("--smart-projection", projection, *flags),
        **options,
    )
    seen = watch_terms(criterion)
    torch.manual_seed(77)
    loss, sample_size, log = criterion(model, sample)
    (loss / sample_size).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    # fairseq takes the task loss in float32 whatever the model's precision: that part is compared apart
    model.zero_grad()
    plain_loss, _, _ = SentencePredictionCriterion.forward(criterion, model, sample)
    (plain_loss / sample_size).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] -= parameter.grad
    model.zero_grad()
    settings = dict(radius=2e-2, step_size=3e-2, steps=steps, norm=norm, scope=scope, projection=projection)
    literal = Literal(
        model, teacher, sample, kind, place, noise_std=noise_std, first_step="linearised", relative=relative, **settings
    )
    (3 * literal.smooth + 2 * literal.bregman).backward()

    assert literal.smooth > 1e-4 and literal.bregman > 1e-8
    assert_close(seen[0].perturbation, literal.perturbation, **(tolerance or {}))
    assert_close(log["task_loss"] / sample_size, literal.task_loss.detach().float())
    assert_close(log["smart_loss"] / sample_size, literal.smooth.detach(), **(tolerance or {}))
    assert_close(log["bregman_loss"] / sample_size, literal.bregman.detach())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(gradients[name], parameter.grad, **(tolerance or {}))
    assert len(gradients) > 30


@pytest.mark.parametrize(("steps", "norm", "place", "classes"), represented([1, 2], NORMS, PLACES, [2, 3, 5]))
def test_at_small_noise_the_first_order_is_all_there_is(
    steps: int, norm: str, place: str, classes: int, class_data: Path
) -> None:
    """Against the fully literal algorithm, whose first step runs the model at the noise: R_s to 1e-3.

    Five classes take it from forward-mode products, in which the divergence is its own second order.
    """
    flags = ["--smart-epsilon", "2e-2", "--smart-step-size", "3e-2", "--smart-noise-std", "1e-5", "--smart-norm", norm]
    criterion, model, teacher, sample = prepared(
        class_data, "classes", *flags, "--smart-steps", str(steps), "--smart-embedding", place, num_classes=classes
    )
    settings = dict(radius=2e-2, step_size=3e-2, steps=steps, norm=norm, scope="example", projection="ball")
    literal = Literal(model, teacher, sample, "classes", place, noise_std=1e-5, **settings)
    torch.manual_seed(77)
    _, sample_size, log = criterion(model, sample)
    assert literal.smooth > 1e-4
    assert_close(log["smart_loss"] / sample_size, literal.smooth.detach(), rtol=1e-3)
