"""Recipes of the methods that SMART is compared with: their authors' constants, by the mechanism of --smart-recipe."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY
from toolkit import HEAD, NO_DROPOUT, assert_close, assert_equal, assert_same_gradients, batch, command, set_up, step
from toolkit import train as run

from smart_fairseq.config.recipes import RECIPES_OF

# as the lines of the launch scripts have them: --adv-lr, --adv-steps, --rand-init-mag, --max-norm
LINES = {
    "pgd": {
        "mnli": "1e-1 2 2e-1 2e-1",
        "qnli": "1e-1 2 1.5e-1 1.5e-1",
        "qqp": "1.5e-1 2 3.2e-1 6.2e-1",
        "sst_2": "1e-1 2 1 6e-1",
        "cola": "5e-2 3 4e-1 2e-1",
        "mrpc": "4e-2 3 0.64 4e-1",
        "sts_b": "1e-1 3 1.6e-1 2.8e-1",
    },
    "freeat": {
        "mnli": "1e-1 2 1e-2 2e-1",
        "qnli": "1e-1 2 1.5e-1 1.5e-1",
        "qqp": "1.5e-1 2 3.2e-1 6.2e-1",
        "sst_2": "1e-1 2 1 6e-1",
        "cola": "5e-2 3 4e-1 2e-1",
        "mrpc": "4e-2 3 0.64 4e-1",
        "sts_b": "1e-1 3 1.6e-1 2.8e-1",
    },
    "freelb": {
        "mnli": "1e-1 2 1e-1 3e-1",
        "qnli": "1e-1 2 2e-1 2e-1",
        "qqp": "2e-1 2 3.2e-1 7e-1",
        "sst_2": "1e-1 2 1 6e-1",
        "cola": "2.5e-2 3 4e-1 3e-1",
        "mrpc": "4e-2 3 6.4e-1 4e-1",
        "sts_b": "1e-1 3 1.6e-1 2.8e-1",
        "rte": "6e-2 3 1.6e-1 1.4e-1",
    },
}
OTHERS = [name for name in RECIPES_OF if name != "smart"]


def criterion_of(method: str, data: Path, *flags: str) -> Any:
    return set_up(data, *flags, criterion=f"{method}_sentence_prediction")[2]


def spelled(values: dict[str, Any]) -> list[str]:
    """A recipe's values as flags."""
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def test_every_method_has_recipes_for_flags_of_its_own() -> None:
    ours = {name for name, cls in CRITERION_DATACLASS_REGISTRY.items() if cls.__module__.startswith("smart_fairseq.")}
    assert {f"{method}_sentence_prediction" for method in RECIPES_OF} == ours
    for method, recipes in RECIPES_OF.items():
        config = CRITERION_DATACLASS_REGISTRY[f"{method}_sentence_prediction"]
        defaults = {field.name: field.default for field in fields(config)}
        assert str(defaults[f"{method}_recipe"]) == next(iter(recipes)), "the first is the default"
        assert len({frozenset(values) for values in recipes.values()}) == 1
        for flag in next(iter(recipes.values())):
            assert flag.startswith(f"{method}_") and defaults[flag] is None


@pytest.mark.parametrize(("method", "task"), [(method, task) for method in LINES for task in LINES[method]])
def test_the_launch_scripts_lines(method: str, task: str, class_data: Path) -> None:
    """In the embeddings' own units, norm l2; FreeLB's K steps there are K + 1 passes."""
    step_size, steps, start, radius = map(float, LINES[method][task].split())
    ball = criterion_of(method, class_data, f"--{method}-recipe", task).ball
    more = 1 if method == "freelb" else 0
    assert ball == (radius, "absolute", step_size, steps + more, start, "l2")


def test_no_other_tasks_are_made_up() -> None:
    for method, lines in LINES.items():
        assert set(RECIPES_OF[method]) == {"relative", *lines}
    assert set(RECIPES_OF["r3f"]) == {"paper", "rte"}


@pytest.mark.parametrize("method", OTHERS)
def test_a_recipe_is_its_values_spelled_out(method: str, class_data: Path) -> None:
    """Loss and gradients, bit for bit, and another recipe's are not these."""
    recipes = RECIPES_OF[method]
    last, first = list(recipes)[-1], next(iter(recipes))
    if method == "rdrop":
        last = "cola"
    steps = []
    for flags in ([f"--{method}-recipe", last], spelled(recipes[last]), []):
        task, model, criterion = set_up(class_data, *flags, criterion=f"{method}_sentence_prediction")
        steps.append(step(model, criterion, batch(task, 8)))
    assert first != last
    assert_equal(steps[0].loss, steps[1].loss)
    assert_same_gradients(steps[0], steps[1])
    assert not torch.equal(steps[0].loss, steps[2].loss)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--pgd-recipe", "cola", "--pgd-steps", "1"],
            "--pgd-recipe cola --pgd-epsilon 0.2 --pgd-epsilon-unit absolute --pgd-step-size 0.05 --pgd-steps 1 "
            "--pgd-start 0.4 --pgd-norm l2",
        ),
        (
            ["--freelb-recipe", "rte"],
            "--freelb-recipe rte --freelb-epsilon 0.14 --freelb-epsilon-unit absolute --freelb-step-size 0.06 "
            "--freelb-steps 4 --freelb-start 0.16 --freelb-norm l2",
        ),
        (
            [],
            "--freeat-recipe relative --freeat-epsilon 0.01 --freeat-epsilon-unit relative --freeat-step-size 0.006 "
            "--freeat-steps 3 --freeat-start 0.004 --freeat-norm l2",
        ),
        (
            ["--r3f-recipe", "rte", "--r3f-noise", "normal"],
            "--r3f-recipe rte --r3f-weight 0.7 --r3f-epsilon 1e-05 --r3f-epsilon-unit absolute --r3f-noise normal "
            "--r3f-dropout independent",
        ),
        (["--rdrop-recipe", "mrpc"], "--rdrop-recipe mrpc --rdrop-weight 8.0"),
        (["--rdrop-recipe", "mrpc", "--rdrop-weight", "2"], "--rdrop-recipe mrpc --rdrop-weight 2.0"),
    ],
)
def test_the_start_of_the_log_has_recipe_and_values(flags: list[str], said: str, class_data: Path) -> None:
    """A flag that is given wins."""
    method = said.split("-")[2]
    log = run(command(class_data, *flags, criterion=f"{method}_sentence_prediction", max_update=1))
    assert said in "\n".join(map(str, log["text"]))


def test_sizes_in_another_unit_are_warned_of(class_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A radius of 0.2 is a fifth of the embeddings then; where all sizes are given, nothing is left to mistake."""
    flags = ["--pgd-recipe", "cola", "--pgd-epsilon-unit", "relative", "--pgd-epsilon", "0.5"]
    criterion_of("pgd", class_data, *flags)
    assert (
        "--pgd-epsilon-unit is relative, but --pgd-step-size 0.05, --pgd-start 0.4 of --pgd-recipe cola are absolute "
        "sizes; give these as well"
    ) in caplog.text
    caplog.clear()
    criterion_of("pgd", class_data, *flags, "--pgd-step-size", "0.01", "--pgd-start", "0")
    criterion_of("pgd", class_data, "--pgd-recipe", "cola")
    criterion_of("r3f", class_data, "--r3f-recipe", "rte")
    assert "sizes" not in caplog.text


@pytest.mark.parametrize("kind", ["classes", "regression"])
def test_rdrops_recipes_are_the_authors_code(kind: str, class_data: Path, regression_data: Path) -> None:
    """modeling_bert.py: two losses as means, and 0.5 times the mean of both KL as sums over the batch of 16.

    For a regression 1.0 times the mean squared difference. Ours is half of it.
    """
    data, recipe = (class_data, "mrpc") if kind == "classes" else (regression_data, "sts_b")
    flags = ["--dropout", "0.3", "--rdrop-recipe", recipe]
    task, model, criterion = set_up(data, *flags, kind=kind, criterion="rdrop_sentence_prediction")
    sample, outputs = batch(task, 16), []
    handle = model.classification_heads[HEAD].register_forward_hook(lambda *call: outputs.append(call[-1].detach()))
    torch.manual_seed(3)
    loss, size, _ = criterion(model, sample)
    handle.remove()
    first, second = (output.float() for output in outputs)
    targets = sample["target"].view(-1)
    if kind == "regression":
        losses = [(output[:, 0] - targets).square().mean() for output in (first, second)]
        whole = losses[0] + losses[1] + (first - second).square().mean()
    else:
        losses = [torch.nn.functional.cross_entropy(output, targets) for output in (first, second)]
        p, q = first.log_softmax(1), second.log_softmax(1)
        sums = [(a.exp() * (a - b)).sum() for a, b in ((p, q), (q, p))]
        whole = losses[0] + losses[1] + 0.5 * (sums[0] + sums[1]) / 2
    assert size == 16 and float((first - second).abs().max()) > 1e-3
    assert_close(loss.detach() / size, whole / 2, rtol=1e-4)


def test_r3f_by_its_recipe_for_rte_is_weighted_less(class_data: Path) -> None:
    losses = []
    for recipe in ("paper", "rte"):
        flags = [*NO_DROPOUT, "--r3f-recipe", recipe, "--r3f-epsilon", "0.1"]
        task, model, criterion = set_up(class_data, *flags, criterion="r3f_sentence_prediction")
        log = step(model, criterion, batch(task, 8)).log
        losses.append(log["loss"] - log["task_loss"])
    assert losses[1] / losses[0] == pytest.approx(0.7, rel=1e-3)
