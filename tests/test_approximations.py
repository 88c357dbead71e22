"""Approximations that are off by default: what they save, and that they are what they say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_cost import set_up
from toolkit import NO_DROPOUT, assert_close, assert_equal, batch, command, flops, train, watch_perturbations

from smart_fairseq.errors import UsageError
from smart_fairseq.method.adversary import Adversary
from smart_fairseq.method.divergence import symmetric_kl
from smart_fairseq.method.reuse import PerturbationMemory
from smart_fairseq.perturb import Forward

BOLD = ["--smart-epsilon", "1e-2", "--smart-step-size", "5e-3", "--smart-noise-std", "1e-3"]


def loss_and_log(criterion: Any, model: Any, sample: Any) -> Any:
    torch.manual_seed(5)
    loss, _, log = criterion(model, sample)
    return loss.detach(), log


def test_a_term_at_every_third_update_is_three_times_as_heavy(class_data: Path) -> None:
    task, model, criterion = set_up(class_data, *NO_DROPOUT, *BOLD, "--smart-every", "3", "--smart-weight", "0.5")
    plain_criterion = set_up(class_data, *NO_DROPOUT, *BOLD, "--smart-weight", "0.5")[2]
    sample = batch(task, 4)
    _, every = loss_and_log(plain_criterion, model, sample)
    for update in range(7):
        criterion.teacher.update_num = update
        loss, log = loss_and_log(criterion, model, sample)
        if update % 3:
            assert "smart_loss" not in log
            assert_equal(loss, log["task_loss"])
        else:
            assert_equal(log["smart_loss"], every["smart_loss"])
            assert_close(loss, log["task_loss"] + 3 * 0.5 * every["smart_loss"])


def test_both_terms_every_second_update_in_a_run(class_data: Path) -> None:
    """At updates of their own numbers, and the same ones after a resumption."""
    shared = [*BOLD, "--smart-every", "2", "--smart-bregman-every", "3"]
    lines = train(command(class_data, *shared, max_update=6))["train_inner"]
    assert [isinstance(line["smart_loss"], float) for line in lines] == [True, False, True, False, True, False]
    assert [isinstance(line["bregman_loss"], float) for line in lines] == [True, False, False, True, False, False]
    assert lines[1]["smart_loss"] == lines[1]["smart_signal"] == "-"
    assert lines[3]["bregman_loss"] > 0


def test_what_is_left_out_costs_nothing(class_data: Path) -> None:
    task, model, criterion = set_up(class_data, *BOLD, "--smart-every", "2")
    sample = batch(task, 4)
    _, plain_model, plain = set_up(class_data, criterion="sentence_prediction")
    criterion.teacher.update_num = 1
    assert flops(model, criterion, sample) == flops(plain_model, plain, sample)


def test_a_reused_perturbation_is_a_projected_step_from_the_last_one(class_data: Path) -> None:
    """Against the step written out: from the first epoch's perturbation along the gradient of R_s there."""
    task, model, criterion = set_up(class_data, *NO_DROPOUT, *BOLD, "--smart-reuse")
    sample = batch(task, 4)
    used: list[torch.Tensor] = []
    watched = criterion.smoothness.memory.watched

    def note(ids: Any, perturbation: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        used.append(perturbation.detach().clone())
        return watched(ids, perturbation, mask)

    criterion.smoothness.memory.watched = note
    for _ in range(2):
        torch.manual_seed(5)
        criterion(model, sample)[0].backward()
    first, second = used
    assert float((second - first).abs().max()) > 1e-3

    forward = Forward(model, sample["net_input"], "sentence_classification_head", "token")
    leaf = first.clone().requires_grad_()
    symmetric_kl(forward(perturbation=leaf), forward().detach()).sum().backward()
    largest = leaf.grad.abs().amax(dim=(1, 2), keepdim=True)
    expected = (first + 5e-3 * leaf.grad / largest).clamp(-1e-2, 1e-2)
    assert_close(second, expected, rtol=0, atol=1e-5)  # kept in half precision, relative to the radius
    with torch.no_grad():
        grown = [symmetric_kl(forward(perturbation=p), forward()).sum() for p in used]
    assert grown[1] > grown[0]


def test_reuse_saves_two_forwards(class_data: Path) -> None:
    task, model, criterion = set_up(class_data, *BOLD, "--smart-reuse")
    sample = batch(task, 4)
    found = [flops(model, criterion, sample) for _ in range(2)]
    assert found[1] / found[0] == pytest.approx(6 / 8, abs=0.01)


def test_perturbations_belong_to_examples(class_data: Path) -> None:
    """Other batches, other padding; unknown examples are found anew."""
    memory = PerturbationMemory(Adversary(radius=1e-2, step_size=1e-2))
    perturbation = 1e-2 * torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    mask = torch.ones(3, 5, 1)
    mask[0, 3:] = 0
    leaf = memory.watched(torch.tensor([7, 8, 9]), perturbation * mask, mask)
    (0 * leaf).sum().backward()
    like = torch.zeros(2, 6, 2, dtype=torch.float16)
    found = memory.recall(torch.tensor([9, 7]), like)
    assert found is not None and found.dtype == torch.float32
    assert_close(found[0, :5], perturbation[2], rtol=1e-3, atol=1e-5)
    assert_close(found[1, :3], perturbation[0, :3], rtol=1e-3, atol=1e-5)
    assert_equal(found[1, 3:], torch.zeros(3, 2))
    assert memory.recall(torch.tensor([7, 10]), like) is None


def test_an_overflow_leaves_the_perturbation(class_data: Path) -> None:
    memory = PerturbationMemory(Adversary(radius=1.0, step_size=1.0))
    leaf = memory.watched(torch.tensor([1]), torch.full((1, 2, 2), 0.5), torch.ones(1, 2, 1))
    (leaf * float("inf")).sum().backward()
    found = memory.recall(torch.tensor([1]), leaf)
    assert found is not None
    assert_equal(found, torch.full((1, 2, 2), 0.5))


@pytest.mark.parametrize(("steps", "layers", "expected"), [(1, 0, 7), (3, 0, 7), (1, 4, 7.5), (3, 4, 9.5), (1, 8, 8)])
def test_cost_of_searching_through_some_layers(steps: int, layers: int, expected: float, class_data: Path) -> None:
    """6 for the rest; of 8 layers those above take a backward pass once, those below two passes a step."""
    flags = [*BOLD, "--smart-steps", str(steps), "--smart-search-layers", str(layers)]
    task, model, criterion = set_up(class_data, *flags)
    _, plain_model, plain = set_up(class_data, criterion="sentence_prediction")
    sample = batch(task, 4)
    assert 3 * flops(model, criterion, sample) / flops(plain_model, plain, sample) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("place", ["token", "input"])
@pytest.mark.parametrize("layers", [0, 3, 8])
def test_searching_through_some_layers_finds_what_all_find(
    layers: int, place: str, class_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, with dropout: up to the curvature of what is taken to first order, which for all 8 is the head's."""
    flags = ["--smart-epsilon", "1e-4", "--smart-step-size", "1e-4", "--smart-noise-std", "1e-5", "--smart-steps", "3"]
    flags += ["--dropout", "0.2", "--attention-dropout", "0.2", "--smart-embedding", place]
    found = []
    for more in ([], ["--smart-search-layers", str(layers)]):
        task, model, criterion = set_up(class_data, *flags, *more)
        seen: list[torch.Tensor] = []
        watch_perturbations(monkeypatch, seen)
        _, log = loss_and_log(criterion, model.double(), batch(task, 4))
        found.append((seen[0], log["smart_loss"]))
    (exact, value), (ours, ours_value) = found
    assert_close(ours_value, value, rtol=1e-3)
    assert float((ours - exact).norm() / exact.norm()) < 0.01


def test_a_frozen_table_is_searched_all_the_same(class_data: Path) -> None:
    task, model, criterion = set_up(class_data, *NO_DROPOUT, *BOLD, "--smart-search-layers", "0")
    _, before = loss_and_log(criterion, model, batch(task, 4))
    model.encoder.sentence_encoder.embed_tokens.weight.requires_grad_(False)
    loss, log = loss_and_log(criterion, model, batch(task, 4))
    assert_equal(log["smart_loss"], before["smart_loss"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--smart-search-layers", "-1"], "--smart-search-layers is -1; it must be a whole number from 0"),
        (["--smart-search-layers", "2", "--smart-recompute"], "which --smart-recompute does not keep"),
        (["--smart-search-layers", "2", "--smart-dropout", "independent"], "--smart-dropout independent does not keep"),
        (["--smart-search-layers", "2", "--smart-mode", "tangent"], "does not know --smart-search-layers; leave that"),
        (["--smart-every", "0"], "--smart-every is 0; it must be a whole number from 1"),
        (["--smart-bregman-every", "-1"], "--smart-bregman-every is -1"),
        (
            ["--smart-reuse", "--smart-mode", "tangent"],
            "does not know --smart-reuse; leave that flag out, or use",
        ),
    ],
)
def test_refusals(flags: list[str], message: str, class_data: Path) -> None:
    with pytest.raises(UsageError, match=message):
        set_up(class_data, *flags)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("0", "two forwards, every ascent step to first order from the clean pass, Bregman"),
        ("1", "two forwards, the ascent through 1 layer(s) and to first order from the clean pass above them, Bregman"),
    ],
)
def test_the_log_says_what_is_searched(layers: str, words: str, class_data: Path) -> None:
    assert words in "\n".join(train(command(class_data, "--smart-search-layers", layers, max_update=1))["text"])


def test_finite_mode_says_where_it_is_not_exact(class_data: Path) -> None:
    def log(*flags: str) -> str:
        return "\n".join(train(command(class_data, "--smart-mode", "finite", *flags, max_update=1))["text"])

    assert "by the exact change that a forward carries along" in log() and "two forwards" not in log()
    assert "does not know --smart-recompute; leave that flag out; two forwards are taken" in log("--smart-recompute")


def test_more_layers_than_there_are(class_data: Path) -> None:
    with pytest.raises(
        UsageError, match="--smart-search-layers is 3; it must be at most 2, the model's number of layers"
    ):
        train(command(class_data, "--smart-search-layers", "3"))


def test_half_precision_does_not_see_the_noise_after_some_layers(class_data: Path) -> None:
    half = ["--fp16", "--fp16-no-flatten-grads", *BOLD, "--smart-noise-std", "1e-5", "--smart-search-layers"]
    with pytest.raises(UsageError, match=r"--smart-search-layers is 1 .* use 0"):
        train(command(class_data, *half, "1"))
    log = train(command(class_data, *half, "0", "--fp16-init-scale", "4", max_update=2))
    assert all(line["smart_loss"] > 0 for line in log["train_inner"])
