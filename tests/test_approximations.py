"""Approximations that are off by default: what they save, and that they are what they say."""

from pathlib import Path

import pytest
from toolkit import (
    HALF,
    LIKE_ROBERTA,
    NO_DROPOUT,
    assert_close,
    assert_equal,
    batch,
    capture_log,
    command,
    flops,
    set_up,
    step,
    train,
    watch_terms,
)

from smart_fairseq.errors import UsageError

BOLD = ["--smart-epsilon", "1e-2", "--smart-step-size", "5e-3", "--smart-noise-std", "1e-3"]


def test_a_term_at_every_third_update_is_three_times_as_heavy(class_data: Path) -> None:
    flags = [*NO_DROPOUT, *BOLD, "--smart-weight", "0.5"]
    task, model, criterion = set_up(class_data, *flags, "--smart-every", "3")
    plain_criterion = set_up(class_data, *flags)[2]
    sample = batch(task, 4)
    every = step(model, plain_criterion, sample).log
    for update in range(7):
        criterion.link.update_num = update
        loss, log, _ = step(model, criterion, sample)
        if update % 3:
            assert "smart_loss" not in log
            assert_equal(loss, log["task_loss"])
        else:
            assert_equal(log["smart_loss"], every["smart_loss"])
            assert_close(loss, log["task_loss"] + 3 * 0.5 * every["smart_loss"])


def test_the_term_every_second_update_in_a_run(class_data: Path) -> None:
    """At the updates of even numbers; the teacher's at every one."""
    lines = train(command(class_data, *BOLD, "--smart-every", "2", max_update=6))["train_inner"]
    assert [isinstance(line["smart_loss"], float) for line in lines] == [True, False, True, False, True, False]
    assert lines[1]["smart_loss"] == lines[1]["smart_sensitivity"] == "-"
    assert all(isinstance(line["bregman_loss"], float) for line in lines) and lines[3]["bregman_loss"] > 0


def test_what_is_left_out_costs_nothing(class_data: Path) -> None:
    task, model, criterion = set_up(class_data, *LIKE_ROBERTA, *BOLD, "--smart-every", "2")
    sample = batch(task, 4)
    _, plain_model, plain = set_up(class_data, *LIKE_ROBERTA, criterion="sentence_prediction")
    criterion.link.update_num = 1
    assert flops(model, criterion, sample) == flops(plain_model, plain, sample)


@pytest.mark.parametrize("steps", [1, 3])
def test_cost_of_a_linear_search(steps: int, class_data: Path) -> None:
    """6 F for clean and adversarial pass, and one backward pass whatever the number of steps."""
    flags = [*LIKE_ROBERTA, *BOLD, "--smart-steps", str(steps), "--smart-linear-search"]
    task, model, criterion = set_up(class_data, *flags)
    _, plain_model, plain = set_up(class_data, *LIKE_ROBERTA, criterion="sentence_prediction")
    sample = batch(task, 4)
    assert 3 * flops(model, criterion, sample) / flops(plain_model, plain, sample) == pytest.approx(7, abs=0.1)


@pytest.mark.parametrize("classes", [4, 5])
def test_a_linear_search_of_many_classes_is_warned_of(classes: int, class_data: Path) -> None:
    _, model, criterion = set_up(class_data, "--smart-linear-search", num_classes=classes)
    with capture_log() as log:
        criterion.prepare(criterion.encoder_for(model))
    assert any(f"each of {classes} classes but one" in str(line) for line in log["text"]) == (classes == 5)


@pytest.mark.parametrize("place", ["token", "normalized", "input"])
def test_a_linear_search_finds_what_all_forwards_find(place: str, class_data: Path) -> None:
    """In float64, with dropout: up to the curvature of what is taken to first order."""
    flags = ["--smart-epsilon", "1e-4", "--smart-step-size", "1e-4", "--smart-noise-std", "1e-5", "--smart-steps", "3"]
    flags += ["--dropout", "0.2", "--attention-dropout", "0.2", "--smart-embedding", place]
    found = []
    for more in ([], ["--smart-linear-search"]):
        task, model, criterion = set_up(class_data, *LIKE_ROBERTA, *flags, *more)
        seen = watch_terms(criterion)
        step(model.double(), criterion, batch(task, 4))
        found.append(seen[0])
    exact, ours = found
    assert_close(ours.value, exact.value, rtol=1e-3)
    assert float((ours.perturbation - exact.perturbation).norm() / exact.perturbation.norm()) < 0.01


def test_a_frozen_table_is_searched_all_the_same(class_data: Path) -> None:
    for flags in (["--smart-linear-search"], []):
        task, model, criterion = set_up(class_data, *NO_DROPOUT, *BOLD, *flags)
        before = step(model, criterion, batch(task, 4)).log
        model.encoder.sentence_encoder.embed_tokens.weight.requires_grad_(False)
        assert_equal(step(model, criterion, batch(task, 4)).log["smart_loss"], before["smart_loss"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--smart-linear-search", "--smart-recompute"], "which --smart-recompute does not keep"),
        (["--smart-linear-search", "--smart-dropout", "independent"], "--smart-dropout independent does not keep"),
        (["--smart-every", "0"], "--smart-every is 0; it must be a whole number from 1"),
    ],
)
def test_refusals(flags: list[str], message: str, class_data: Path) -> None:
    with pytest.raises(UsageError, match=message):
        set_up(class_data, *flags)


def test_tangent_mode_knows_no_linear_search(class_data: Path) -> None:
    with pytest.raises(UsageError, match="does not know --smart-linear-search; leave that flag out"):
        train(command(class_data, "--smart-linear-search", "--smart-mode", "tangent"))


def test_the_log_says_what_is_searched(class_data: Path) -> None:
    words = "two forwards, every ascent step from the clean pass, Bregman"
    assert words in "\n".join(train(command(class_data, "--smart-linear-search", max_update=1))["text"])


def test_a_linear_search_in_half_precision(class_data: Path) -> None:
    """From noise that float16 does not see."""
    flags = [*HALF, *BOLD, "--smart-noise-std", "1e-5", "--smart-linear-search"]
    log = train(command(class_data, *flags, max_update=2))
    assert all(line["smart_loss"] > 0 for line in log["train_inner"])
