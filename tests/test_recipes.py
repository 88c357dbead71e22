"""Recipes of the criterion and of the optimizer, and the line that says whether the terms act."""

from pathlib import Path
from typing import Any

import pytest
import torch
from toolkit import NO_DROPOUT, assert_equal, batch, command, set_up, step, train

from smart_fairseq.config.recipes import RECIPES
from smart_fairseq.training.acting import Acting


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
    assert "the smart term is " in paper and "it is not acting yet: look at the next such line" in paper
    assert "and if it says so too, raise --smart-epsilon" in paper
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


def test_it_is_said_again_when_the_updates_have_doubled(caplog: pytest.LogCaptureFixture) -> None:
    """Each time over the updates since the last: a term that comes with update 25 has its whole share from there on."""
    acting = Acting(after=5)
    with caplog.at_level("INFO"):
        for update in range(100):
            terms = {"smart": torch.tensor(0.0 if update < 25 else 0.5), "bregman": torch.tensor(1e-3)}
            acting.note(update, torch.tensor(2.0), terms)
    shares = [line for line in caplog.messages if line.startswith("updates")]
    expected = [("5 to 25", "0"), ("25 to 45", "0.25"), ("45 to 85", "0.25")]
    words = "as shares of the task loss: smart {}, bregman 0.0005"
    assert shares == [f"updates {place}, {words.format(share)}" for place, share in expected]
    idle = [line for line in caplog.messages if "it is not acting" in line]
    assert [line.partition(" of the task loss")[0] for line in idle] == [
        "the smart term is 0.0e+00",
        *["the bregman term is 5.0e-04"] * 3,
    ]
    assert ["acting yet: look at the next" in line for line in idle] == [True, True, False, False]


@pytest.mark.parametrize("name", ["pgd", "freelb", "freeat"])
def test_the_rise_of_an_adversary_has_a_share(
    name: str, class_data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """That of its log; FreeLB's over its passes. FreeAT's is not known."""
    monkeypatch.setattr("smart_fairseq.training.acting.WINDOW", 3)
    flags = [f"--{name}-{key}" for key in ("epsilon", "start", "epsilon-unit")]
    flags = [part for pair in zip(flags, ("1e-6", "0", "absolute")) for part in pair]
    task, model, criterion = set_up(class_data, *NO_DROPOUT, *flags, criterion=f"{name}_sentence_prediction")
    logs = []
    with caplog.at_level("INFO"):
        for update in range(4):
            criterion.link.update_num, sample = update, batch(task, 2, start=2 * update)
            for loss, _, log in criterion.passes(model, sample) if name == "freelb" else [criterion(model, sample)]:
                loss.backward()
                logs += [log] if update < 3 else []
    rise, task_loss = (sum(float(log.get(key, 0)) for log in logs) for key in (f"{name}_rise", "task_loss"))
    shares = [line for line in caplog.messages if "as shares of" in line]
    idle = [line for line in caplog.messages if "it is not acting" in line]
    if name == "freeat":
        assert not shares and not idle
        return
    assert shares == [f"updates 0 to 3, as shares of the task loss: {name} {rise / task_loss:.2g}"]
    assert len(idle) == 1 and f"raise --{name}-epsilon" in idle[0]


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
