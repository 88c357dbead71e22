"""Recipes of the criterion and of the optimizer, and the line that says whether the terms act."""

from pathlib import Path
from typing import Any

import pytest
import torch
from toolkit import NO_DROPOUT, assert_equal, batch, command, set_up, step, train

from smart_fairseq.training.acting import Acting
from smart_fairseq.training.recipes import RECIPES


def taken(data: Path, *flags: str) -> Any:
    """The configuration that the criterion works with."""
    return set_up(data, *flags)[2].cfg


def test_every_recipe_names_the_same_flags() -> None:
    """A flag that one recipe sets has a value in all of them."""
    assert len({frozenset(values) for values in RECIPES.values()}) == 1


def test_the_default_acts_and_is_relative(class_data: Path) -> None:
    cfg = taken(class_data, "--smart-recipe", "smart")
    assert (cfg.smart_epsilon_unit, cfg.smart_weight) == ("relative", 1.0)
    assert cfg.smart_step_size / cfg.smart_epsilon == pytest.approx(100)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_flag_that_is_given_wins(recipe: str, class_data: Path) -> None:
    given = taken(class_data, "--smart-recipe", recipe, "--smart-epsilon", "0.25", "--smart-embedding", "input")
    own = RECIPES[recipe]
    assert (given.smart_epsilon, str(given.smart_embedding)) == (0.25, "input")
    assert given.smart_step_size == own["smart_step_size"] and str(given.smart_dropout) == own["smart_dropout"]


def test_a_weight_of_0_wins_too(class_data: Path) -> None:
    assert taken(class_data, "--smart-weight", "0").smart_weight == 0


def test_the_papers_recipe_is_its_printed_constants(class_data: Path) -> None:
    """Bit for bit what the same values give when they are spelled out."""
    spelled = ["--smart-epsilon-unit", "absolute", "--smart-epsilon", "1e-5", "--smart-noise-std", "1e-5"]
    spelled += ["--smart-step-size", "1e-3", "--smart-norm-scope", "example", "--smart-projection", "ball"]
    spelled += ["--smart-embedding", "token", "--smart-dropout", "shared", "--smart-weight", "1"]
    steps = []
    for flags in (["--smart-recipe", "paper"], ["--smart-recipe", "smart", *spelled]):
        task, model, criterion = set_up(class_data, *NO_DROPOUT, *flags)
        steps.append(step(model, criterion, batch(task, 8)))
    assert_equal(steps[0].loss, steps[1].loss)
    for name, gradient in steps[0].gradients.items():
        assert_equal(gradient, steps[1].gradients[name])


@pytest.mark.parametrize(
    ("flags", "total", "words"),
    [
        (["smart"], 1000, "0.99, a memory of 100 updates"),  # a tenth of them, 100
        (["smart"], 50, "0.9, a memory of 10 updates"),  # never less than 10
        # a tenth of them however seldom it moves; 0 where it moves less often than that
        (["smart", "--mbpp-inner-steps", "5"], 1000, "0.95, a memory of 100 updates"),
        (["smart", "--mbpp-inner-steps", "200"], 1000, "0, a memory of 200 updates"),
        (["smart", "--mbpp-momentum", "0.5"], 50, "0.5, a memory of 2 updates"),
        (["paper"], 50, "0.99 for the first 0.1 of training, then 0.999"),
        (["paper", "--mbpp-momentum", "0.5"], 50, "0.99 for the first 0.1 of training, then 0.5"),
    ],
)
def test_the_teachers_momentum(
    flags: list[str], total: int, words: str, class_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        set_up(class_data, "--mbpp-recipe", *flags, optimizer="mbpp", max_update=total)
    assert f"the teacher's momentum is {words}" in caplog.text


# --- whether the terms act ---------------------------------------------------------------------------


def said(log: Any) -> str:
    return "\n".join(line for line in log["text"] if "task loss" in line)


def test_the_log_says_what_acts_and_what_does_not(class_data: Path) -> None:
    flags = ["--lr-scheduler", "polynomial_decay", "--total-num-update", "40", "--warmup-updates", "4"]
    paper = said(train(command(class_data, *flags, max_update=30)))
    assert "updates 4 to 24, as shares of the task loss: smart " in paper and "bregman " in paper
    assert "the smart term is " in paper and "it is not acting; raise --smart-epsilon" in paper
    assert "Where the task loss has not fallen yet, look again later" in paper
    smart = said(train(command(class_data, *flags, "--smart-recipe", "smart", "--smart-epsilon", "0.3", max_update=30)))
    assert "as shares of the task loss: smart 0." in smart and "the smart term" not in smart


def test_a_share_is_of_the_weighted_sums(caplog: pytest.LogCaptureFixture) -> None:
    """(0.2 + 0.4) / (2 + 4) over the updates of the window; those before the warm-up ends do not count."""
    acting = Acting(after=2)
    with caplog.at_level("INFO"):
        for update in range(30):
            value = 100.0 if update < 2 else 0.2 if update % 2 else 0.4
            acting.note(update, torch.tensor(10 * value if update >= 2 else 1.0), {"smart": torch.tensor(value)})
    assert [record.getMessage() for record in caplog.records] == [
        "updates 2 to 22, as shares of the task loss: smart 0.1"
    ]


def test_a_term_of_every_fifth_update_has_its_share_of_all(
    class_data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Twenty times it comes, five times as heavy, among the task losses of a hundred updates."""
    weighted = []
    flags = ["--smart-epsilon", "0.3", "--smart-epsilon-unit", "relative", "--smart-every", "5"]
    task, model, criterion = set_up(class_data, *flags)
    with caplog.at_level("INFO"):
        for update in range(101):
            criterion.link.update_num = update
            log = criterion(model, batch(task, 2))[2]
            weighted.append((log["task_loss"].item(), 5 * log["smart_loss"].item() if "smart_loss" in log else 0.0))
    assert sum(smart > 0 for _, smart in weighted) == 21
    task_loss, smart = (sum(column) for column in zip(*weighted[:100]))
    assert f"updates 0 to 100, as shares of the task loss: smart {smart / task_loss:.2g}" in caplog.text
