"""The criterion on a real RoBERTa against the literal Algorithm 1 of reference.py, in float64."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from fairseq import optim
from fairseq.criterions.sentence_prediction import SentencePredictionCriterion
from toolkit import NO_DROPOUT, assert_close, batch, build, command, watch_perturbations

from smart_fairseq.method.noise import example_noise

SETTINGS = list(
    itertools.product(["classes", "regression"], [1, 3], ["inf", "l2"], ["example", "token"], ["ball", "normalize"])
)


def as_function_of_embeddings(model: Any, tokens: torch.Tensor, place: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """One example's output as a function of its embeddings, by the encoder's own parts and no hook."""
    head = model.classification_heads["sentence_classification_head"]
    encoder = model.encoder.sentence_encoder

    def from_token_embeddings(x: torch.Tensor) -> torch.Tensor:
        features, _ = model.encoder.extract_features(tokens[None], token_embeddings=x[None])
        return head(features)[0]

    def from_layer_input(x: torch.Tensor) -> torch.Tensor:
        padding = tokens[None].eq(encoder.padding_idx)
        hidden = (x * ~padding[0][:, None]).unsqueeze(1)
        for layer in encoder.layers:
            hidden = layer(hidden, encoder_padding_mask=padding if padding.any() else None)
        return head(hidden.transpose(0, 1))[0]

    return from_token_embeddings if place == "token" else from_layer_input


def embeddings_of(model: Any, tokens: torch.Tensor, place: str) -> torch.Tensor:
    encoder = model.encoder.sentence_encoder
    return encoder.embed_tokens(tokens) if place == "token" else encoder.forward_embedding(tokens[None])[0][0]


def prepared(data: Path, kind: str, *flags: str) -> tuple[Any, ...]:
    """A float64 model two updates away from its teacher, a batch, and the teacher as a model of its own."""
    regression = ["--regression-target"] if kind == "regression" else []
    arguments = command(
        # not gelu, which fairseq computes in float32 whatever the model's precision
        data,
        *NO_DROPOUT,
        "--activation-fn",
        "tanh",
        *regression,
        *flags,
        "--mbpp-warmup-ratio",
        "0",
        "--mbpp-momentum",
        "0.7",
        num_classes=1 if regression else 2,
    )
    cfg, task, model, criterion = build(arguments)
    model.double().train()
    # an output that is not flat: at initialisation the head hardly reacts to anything
    torch.nn.init.normal_(model.classification_heads["sentence_classification_head"].out_proj.weight, std=1.0)
    optimizer = optim.build_optimizer(cfg.optimizer, list(model.parameters()))
    generator = torch.Generator().manual_seed(5)
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
    criterion.teacher.connect(optimizer)
    sample = batch(task, 4)
    if regression:
        sample["target"] = sample["target"].double()
    return criterion, model, teacher, sample


@pytest.mark.parametrize("place", ["token", "input"])
@pytest.mark.parametrize(("kind", "steps", "norm", "scope", "projection"), SETTINGS)
def test_against_the_literal_algorithm(
    kind: str,
    steps: int,
    norm: str,
    scope: str,
    projection: str,
    place: str,
    class_data: Path,
    regression_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """x~, R_s, D_Breg and all gradients; a ball small enough to bind and a noise that partly leaves it."""
    settings = dict(radius=2e-2, step_size=3e-2, steps=steps, norm=norm, scope=scope, projection=projection)
    criterion, model, teacher, sample = prepared(
        class_data if kind == "classes" else regression_data,
        kind,
        *("--smart-weight", "3", "--smart-bregman-weight", "2", "--smart-embedding", place),
        *("--smart-epsilon", "2e-2", "--smart-step-size", "3e-2", "--smart-noise-std", "1e-2"),
        *(
            "--smart-steps",
            str(steps),
            "--smart-norm",
            norm,
            "--smart-norm-scope",
            scope,
            "--smart-projection",
            projection,
        ),
    )
    regression = kind == "regression"
    tokens = sample["net_input"]["src_tokens"]
    seen = []
    watch_perturbations(monkeypatch, seen)
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
    noise = 1e-2 * example_noise(sample["id"], tokens.shape[1], 16, seed=77).double()
    students = [as_function_of_embeddings(model, row, place) for row in tokens]
    teachers = [as_function_of_embeddings(teacher, row, place) for row in tokens]
    xs = [embeddings_of(model, row, place) for row in tokens]
    # the teacher has embeddings of its own: its function takes the offset from the student's
    teacher_xs = [embeddings_of(teacher, row, place) for row in tokens]
    lengths = tokens.ne(1).sum(1).tolist()
    assert min(lengths) < tokens.shape[1], "the batch has no padding to leave alone"
    x_tildes = [
        reference.perturb(f, x.detach(), length, row_noise, regression=regression, **settings)
        for f, x, length, row_noise in zip(students, xs, lengths, noise)
    ]
    rows = range(len(tokens))
    terms = [
        reference.objective(
            students[i],
            lambda _, i=i: teachers[i](teacher_xs[i]),
            [xs[i]],
            [x_tildes[i]],
            sample["target"].view(-1)[i : i + 1],
            regression,
        )
        for i in rows
    ]
    task_loss, smooth, bregman = (torch.stack(column).mean() for column in zip(*terms))
    (3 * smooth + 2 * bregman).backward()

    assert smooth > 1e-4 and bregman > 1e-8
    assert_close(seen[0], torch.stack(x_tildes) - torch.stack(xs).detach())
    assert_close(log["task_loss"] / sample_size, task_loss.detach().float())
    assert_close(log["smart_loss"] / sample_size, smooth.detach())
    assert_close(log["bregman_loss"] / sample_size, bregman.detach())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(gradients[name], parameter.grad)
    assert len(gradients) > 30
