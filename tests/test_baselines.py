"""The criteria that SMART competes with, against reference_baselines.py in float64, and what each must equal."""

import contextlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import reference
import reference_baselines as literal
import torch
from toolkit import (
    HEAD,
    KINDS,
    LIKE_ROBERTA,
    NO_DROPOUT,
    ROOT,
    assert_close,
    assert_equal,
    assert_same_gradients,
    batch,
    build,
    command,
    count_forwards,
    represented,
    set_up,
    step,
    take_passes,
    train,
)

from smart_fairseq.criterions.freeat_sentence_prediction import FreeATSentencePrediction
from smart_fairseq.method.noise import example_noise, uniform_noise
from smart_fairseq.training.batches import TASK

sys.path.insert(0, str(ROOT / "benchmarks"))
from peak_memory import PeakMemory

BALL = {"epsilon": "0.4", "step-size": "0.3", "start": "0.2"}


def flags_of(name: str, **more: str) -> list[str]:
    values = {**BALL, **more}
    return [part for key, value in values.items() for part in (f"--{name}-{key.replace('_', '-')}", value)]


def prepared(data: Path, name: str, *flags: str, kind: str = "classes") -> tuple[Any, Any, Any]:
    """Criterion, float64 model and a batch with padding."""
    task, model, criterion = set_up(data, *NO_DROPOUT, *flags, kind=kind, criterion=f"{name}_sentence_prediction")
    model.double()
    for layer in model.encoder.sentence_encoder.layers:
        layer.activation_fn = torch.tanh  # not gelu, which fairseq computes in float32 whatever the model's precision
    sample = batch(task, 4)
    if kind == "regression":
        sample["target"] = sample["target"].double()
    return criterion, model, sample


class Examples:
    """The examples of a batch as the reference takes them, without padding."""

    def __init__(self, model: Any, sample: Any, draw: Any = uniform_noise) -> None:
        tokens = sample["net_input"]["src_tokens"]
        noise = draw(sample["id"], tokens.shape[1], 16, seed=3).double()
        self.targets = sample["target"].view(-1)
        self.lengths = tokens.ne(1).sum(1).tolist()
        assert min(self.lengths) < tokens.shape[1]
        rows = [row[:length] for row, length in zip(tokens, self.lengths)]
        self.functions = [reference.as_function_of_embeddings(model, row, "token") for row in rows]
        self.xs = [reference.embeddings_of(model, row, "token") for row in rows]
        self.noises = [n[:length] for n, length in zip(noise, self.lengths)]

    def units(self, norm: str, relative: bool) -> list[float]:
        """Of a radius: 1, or an example's length or root mean square."""
        if not relative:
            return [1.0] * len(self.xs)
        lengths = [math.sqrt(float((x**2).sum())) for x in self.xs]
        return lengths if norm == "l2" else [n / math.sqrt(x.numel()) for n, x in zip(lengths, self.xs)]

    def starts(self, start: float, norm: str, units: list[float]) -> list[torch.Tensor]:
        roots = [math.sqrt(noise.numel()) if norm == "l2" else 1.0 for noise in self.noises]
        return [start * unit * noise / root for unit, noise, root in zip(units, self.noises, roots)]


def assert_same_step(model: Any, criterion: Any, sample: Any, total: torch.Tensor) -> None:
    """Loss and gradients of the criterion are those of ``total``, the reference's sum over the batch.

    fairseq takes its task loss in float32, so they agree to float32's digits.
    """
    ours = step(model, criterion, sample)
    model.zero_grad()
    total.backward()
    assert_close(ours.loss, total.detach().float())
    assert len(ours.gradients) > 30
    for name, gradient in ours.gradients.items():
        assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize(
    ("kind", "name", "steps", "unit", "norm"),
    represented(KINDS, [("pgd", 1), ("pgd", 3), ("freelb", 1), ("freelb", 3)], ["relative", "absolute"], ["l2", "inf"]),
)
def test_pgd_and_freelb_against_their_equations(
    kind: str, name: str, steps: int, unit: str, norm: str, class_data: Path, regression_data: Path
) -> None:
    scale = 1.0 if unit == "relative" else 0.1
    sizes = {key: str(scale * float(value)) for key, value in BALL.items()}
    sizes = {"epsilon": sizes["epsilon"], "step_size": sizes["step-size"], "start": sizes["start"]}
    flags = flags_of(name, **{"steps": str(steps), "epsilon_unit": unit, "norm": norm}, **sizes)
    data = class_data if kind == "classes" else regression_data
    criterion, model, sample = prepared(data, name, *flags, kind=kind)
    examples = Examples(model, sample)
    units = examples.units(norm, unit == "relative")
    starts = examples.starts(float(sizes["start"]), norm, units)
    objective = getattr(literal, name)
    losses = [
        objective(f, x, d, y, steps, step=u * float(sizes["step_size"]), radius=u * float(sizes["epsilon"]), norm=norm)
        for f, x, d, y, u in zip(examples.functions, examples.xs, starts, examples.targets, units)
    ]
    plain = torch.stack([literal.loss(f(x), y) for f, x, y in zip(examples.functions, examples.xs, examples.targets)])
    total = torch.stack(losses).sum()
    assert abs(float(total - plain.sum())) > 1e-2  # the adversary is seen
    assert_same_step(model, criterion, sample, total)


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_r3f_against_its_equation(distribution: str, class_data: Path) -> None:
    flags = ["--r3f-epsilon", "0.02", "--r3f-weight", "3", "--r3f-noise", distribution]
    criterion, model, sample = prepared(class_data, "r3f", *flags)
    examples = Examples(model, sample, example_noise if distribution == "normal" else uniform_noise)
    parts = zip(examples.functions, examples.xs, examples.noises, examples.targets)
    losses = [literal.r3f(f, x, 0.02 * z, y, weight=3) for f, x, z, y in parts]
    assert_same_step(model, criterion, sample, torch.stack(losses).sum())


def test_r3f_is_our_divergence_at_its_noise_without_an_ascent(class_data: Path) -> None:
    """The term and its gradient, dropout on and shared, beside the divergence of two passes by hand."""
    flags = ["--r3f-epsilon", "0.02", "--r3f-dropout", "shared"]
    task, model, criterion = set_up(class_data, *flags, criterion="r3f_sentence_prediction")
    sample = batch(task, 4)
    ours = step(model, criterion, sample)
    tokens = sample["net_input"]["src_tokens"]
    noise = 0.02 * uniform_noise(sample["id"], tokens.shape[1], 16, seed=3) * tokens.ne(1)[:, :, None]
    outputs = []
    for perturbation in (None, noise):
        torch.manual_seed(3)
        outputs.append(criterion.forward_of(model, sample)(perturbation=perturbation))
    assert_close(ours.log["r3f_loss"], sum(literal.both_kl(*pair) for pair in zip(*outputs)).detach())
    assert ours.log["r3f_loss"] > 1e-6


@pytest.mark.parametrize("alpha", [1.0, 5.0])
def test_rdrop_against_its_equation(alpha: float, class_data: Path) -> None:
    """Two dropout masks, drawn as the criterion draws them."""
    flags = ["--dropout", "0.2", "--rdrop-weight", str(alpha)]
    task, model, criterion = set_up(class_data, *flags, criterion="rdrop_sentence_prediction")
    sample = batch(task, 4)
    ours = step(model, criterion, sample)
    model.zero_grad()
    torch.manual_seed(3)
    forward = criterion.forward_of(model, sample)
    first, second = forward(), forward()
    targets = sample["target"].view(-1)
    total = torch.stack([literal.rdrop(p, q, y, alpha) for p, q, y in zip(first, second, targets)]).sum()
    assert float(ours.log["rdrop_loss"]) > 1e-3
    total.backward()
    assert_close(ours.loss, total.detach())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(ours._replace(gradients=gradients), ours, rtol=1e-4, atol=1e-6)


def test_rdrop_without_dropout_is_plain(class_data: Path) -> None:
    runs = []
    for name, flags in (("sentence_prediction", []), ("rdrop_sentence_prediction", ["--rdrop-weight", "5"])):
        task, model, criterion = set_up(class_data, *NO_DROPOUT, *flags, criterion=name)
        runs.append(step(model, criterion, batch(task, 6)))
    assert_close(runs[1].loss, runs[0].loss)
    assert_same_gradients(runs[1], runs[0], rtol=1e-4, atol=1e-7)


# --- what equals what ------------------------------------------------------------------------------


def updates(data: Path, folder: Path, criterion: str, *flags: str, **options: Any) -> tuple[Any, Any]:
    """Log lines of updates and weights after them, dropout on."""
    options = {"optimizer": "adam", "save_dir": folder, **options}
    log = train(command(data, *flags, criterion=criterion, **options))["train_inner"]
    return log, torch.load(folder / "checkpoint_last.pt")["model"]


def test_freelb_with_one_pass_from_the_embeddings_is_plain(class_data: Path, tmp_path: Path) -> None:
    """Update by update, bit for bit."""
    plain, weights = updates(class_data, tmp_path / "plain", "sentence_prediction")
    flags = flags_of("freelb", steps="1", start="0")
    freelb, ours = updates(class_data, tmp_path / "freelb", "freelb_sentence_prediction", *flags)
    assert len(plain) == 6 and [line["loss"] for line in freelb] == [line["loss"] for line in plain]
    for name, weight in weights.items():
        assert_equal(ours[name], weight)


def test_freelb_with_two_passes_is_the_mean_of_plain_and_of_pgd(class_data: Path) -> None:
    gradients = []
    for name, flags in (
        ("sentence_prediction", []),
        ("pgd_sentence_prediction", flags_of("pgd", steps="1", start="0")),
        ("freelb_sentence_prediction", flags_of("freelb", steps="2", start="0")),
    ):
        task, model, criterion = set_up(class_data, *flags, criterion=name)
        gradients.append(step(model, criterion, batch(task, 6)).gradients)
    plain, pgd, freelb = gradients
    assert any(float((plain[name] - pgd[name]).norm()) > 1e-2 for name in plain)
    for name, gradient in freelb.items():
        assert_close(gradient, (plain[name] + pgd[name]) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("frequency", ["1", "2"])
def test_freeat_at_radius_0_is_so_many_plain_updates_on_each_batch(
    frequency: str, class_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches that fairseq would give, shuffled, each (with --update-freq each pair) three times in a row."""
    forward, seen = FreeATSentencePrediction.forward, []

    def noting(self: Any, model: Any, sample: Any, reduce: bool = True) -> Any:
        seen.append(tuple(sample["id"].tolist()))
        return forward(self, model, sample, reduce)

    monkeypatch.setattr(FreeATSentencePrediction, "forward", noting)
    flags = [*NO_DROPOUT, "--lr", "0.1", "--curriculum", "0"]
    freeat = [*flags, "--freeat-epsilon", "0", "--freeat-steps", "3", "--update-freq", frequency]
    options: Any = dict(optimizer="sgd", max_update=6)
    log, weights = updates(class_data, tmp_path, "freeat_sentence_prediction", *freeat, **options)
    size = int(frequency)
    groups = [seen[first : first + size] for first in range(0, len(seen), size)]
    assert len(log) == len(groups) == 6
    assert groups[0] == groups[1] == groups[2]
    assert groups[3] == groups[4] == groups[5] != groups[0]
    # plain updates on these batches, by hand
    _, task, model, criterion = build(command(class_data, *flags, criterion="sentence_prediction", **options))
    model.train()
    dataset = task.dataset("train")
    for group in groups:
        model.zero_grad()
        for ids in group:
            (criterion(model, dataset.collater([dataset[i] for i in ids]))[0] / (4 * size)).backward()
        descend(model, 0.1)
    for name, parameter in model.named_parameters():
        assert_close(weights[name], parameter.detach())


def plain_and_freeat_at_radius_0(data: Path, *flags: str, updates: int) -> list[Any]:
    """The logs of plain fine-tuning and of FreeAT with two updates on each batch, in the data's order."""
    flags = (*NO_DROPOUT, "--curriculum", "9", "--lr", "1e-9", "--required-batch-size-multiple", "1", *flags)
    logs = []
    for name, more in (("sentence_prediction", []), ("freeat_sentence_prediction", ["--freeat-epsilon", "0"])):
        times = ["--freeat-steps", "2"] if more else []
        arguments = command(data, *flags, *more, *times, criterion=name, optimizer="sgd", max_update=updates)
        logs.append(train(arguments)["train_inner"])
    return logs


def test_freeat_divides_by_what_an_update_of_fewer_batches_holds(class_data: Path) -> None:
    """Six batches with --update-freq 4: the gradient of the last two is their mean, as in plain fine-tuning."""
    plain, freeat = plain_and_freeat_at_radius_0(class_data, "--update-freq", "4", updates=4)
    assert [line["bsz"] for line in plain] == [16, 8, 16, 8] and [line["bsz"] for line in freeat] == [16, 16, 8, 8]
    for ours, theirs in ((freeat[1], plain[0]), (freeat[2], plain[1]), (freeat[3], plain[1])):
        assert ours["gnorm"] == pytest.approx(theirs["gnorm"], rel=2e-3)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)


def test_freeat_is_right_where_fewer_examples_are_left_than_batches_in_an_update(class_data: Path) -> None:
    """24 examples, one a batch, seven an update: the last three are there three times, and their mean is the same."""
    logs = plain_and_freeat_at_radius_0(class_data, "--update-freq", "7", "--batch-size", "1", updates=8)
    plain, freeat = logs[0][3], logs[1][7]
    assert plain["bsz"] == 3 and freeat["bsz"] == 9
    assert freeat["gnorm"] == pytest.approx(plain["gnorm"], rel=2e-3)
    assert freeat["loss"] == pytest.approx(plain["loss"], rel=2e-3)


def test_freeat_climbs_between_its_updates(class_data: Path) -> None:
    """Against algorithm 1 by hand, sgd: the perturbation follows the gradient of the update before it."""
    flags = flags_of("freeat", steps="3", norm="inf", epsilon_unit="absolute", epsilon="0.05", start="0.02")
    flags += ["--freeat-step-size", "0.02"]
    criterion, model, sample = prepared(class_data, "freeat", *flags)
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    torch.manual_seed(3)
    for _ in range(3):
        model.zero_grad()
        criterion(model, sample)[0].backward()
        descend(model)
    ours = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(start[name])
    ds = Examples(model, sample).starts(0.02, "inf", [1.0] * 4)
    for _ in range(3):
        model.zero_grad()
        examples = Examples(model, sample)
        ds = [d.detach().requires_grad_() for d in ds]
        parts = zip(examples.functions, examples.xs, ds, examples.targets)
        torch.stack([literal.loss(f(x + d), y) for f, x, d, y in parts]).sum().backward()
        ds = [(d.detach() + 0.02 * d.grad.sign()).clamp(-0.05, 0.05) for d in ds]
        descend(model)
    for name, weight in model.named_parameters():
        assert_close(ours[name], weight.detach(), rtol=1e-4, atol=1e-6)
    assert len(criterion.held) == 1
    criterion(model, sample)  # the fourth update begins anew
    assert next(iter(criterion.held.values())).taken == 1


@pytest.mark.parametrize("unit", ["absolute", "relative"])
def test_the_size_of_r3fs_noise_is_logged_in_its_unit(unit: str, class_data: Path) -> None:
    """The largest of some 100 uniform entries is nearly the bound."""
    flags = ["--r3f-noise", "uniform", "--r3f-epsilon", "0.2", "--r3f-epsilon-unit", unit]
    criterion, model, sample = prepared(class_data, "r3f", *flags)
    _, size, log = criterion(model, sample)
    assert 0.9 * 0.2 < float(log["r3f_delta"]) / size <= 0.2


def test_freeat_goes_on_after_a_batch_that_ran_out_of_memory(class_data: Path) -> None:
    """fairseq leaves that batch out: there is no gradient to climb by, and the point stays. Tasks have points apart."""
    criterion, model, sample = prepared(class_data, "freeat", *flags_of("freeat", steps="3"))
    criterion(model, sample)
    (held,) = criterion.held.values()
    before = held.entering.detach().clone()
    criterion(model, sample)[0].backward()
    assert held.taken == 2
    assert_equal(held.entering.detach(), before)
    criterion(model, sample)
    assert not torch.equal(held.entering.detach(), before)
    criterion.perturbation(criterion.forward_of(model, sample), {**sample, TASK: 1})
    assert [key[0] for key in criterion.held] == [0, 1]


def descend(model: Any, rate: float = 0.05) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight -= rate * weight.grad


def test_r4f_holds_the_head_at_a_spectral_norm_of_1(class_data: Path) -> None:
    """fairseq's own switch beside the term: the largest singular value of the weight in use is 1, untrained or not."""
    flags = ["--r3f-epsilon", "0.3", "--r3f-epsilon-unit", "relative", "--spectral-norm-classification-head"]
    arguments = command(class_data, *flags, criterion="r3f_sentence_prediction", optimizer="adam")
    _, task, model, criterion = build(arguments)
    model.train()
    for _ in range(10):
        log = step(model, criterion, batch(task, 8)).log
        descend(model, 0.1)
    assert log["r3f_loss"] > 1e-6
    head = model.classification_heads[HEAD].out_proj
    assert float(torch.linalg.matrix_norm(head.weight, 2)) == pytest.approx(1, abs=0.05)
    assert abs(float(torch.linalg.matrix_norm(head.weight_orig, 2)) - 1) > 0.05


# --- the adversary is seen ---------------------------------------------------------------------------


def test_pgd_climbs_with_the_layers_of_its_update(class_data: Path) -> None:
    """At a point next to the start the loss is the start's, though layers are dropped and the teacher has a pass."""
    flags = [*flags_of("pgd", epsilon="1e-6", step_size="1e-6", start="0"), "--encoder-layerdrop", "0.5"]
    log = train(command(class_data, *flags, criterion="pgd_sentence_prediction"))
    assert all(abs(line["pgd_rise"]) < 1e-4 for line in log["train_inner"])


@pytest.mark.parametrize("name", ["pgd", "freelb", "freeat"])
def test_the_ascent_raises_the_loss(name: str, class_data: Path) -> None:
    """By more than a twentieth, over the random start."""
    flags = flags_of(name, steps="3", epsilon_unit="relative")
    task, model, criterion = set_up(class_data, *NO_DROPOUT, *flags, criterion=f"{name}_sentence_prediction")
    sample = batch(task, 8)
    losses = []
    for _ in range(3):
        if name == "freeat":  # the weights stand still here
            torch.manual_seed(3)
            loss, _, log = criterion(model, sample)
            loss.backward()
            losses.append(float(log["task_loss"]))
        else:
            log = step(model, criterion, sample).log
    rise = losses[-1] - losses[0] if name == "freeat" else float(log[f"{name}_rise"])
    assert rise > 0.05 * float(log["task_loss"])
    assert float(log[f"{name}_delta"]) / 8 == pytest.approx(0.4, rel=1e-3)  # the radius, in its own unit


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [("pgd", ["--pgd-steps", "3"], 4), ("freelb", ["--freelb-steps", "3"], 3), ("freeat", [], 1), ("rdrop", [], 2)],
)
def test_forwards_of_an_update(name: str, flags: list[str], expected: int, class_data: Path) -> None:
    """What docs/methods.md says of the cost; radii in relative units look the embeddings up, which is no forward."""
    task, model, criterion = set_up(class_data, *flags, criterion=f"{name}_sentence_prediction")
    passes = count_forwards(model)
    step(model, criterion, batch(task, 4))
    assert len(passes) == expected


def test_freelb_is_not_called_beside_its_passes(class_data: Path) -> None:
    """Before a batch and behind one there is no perturbation that it could take."""
    task, model, criterion = set_up(class_data, criterion="freelb_sentence_prediction")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="through the task's train_step"):
            criterion(model, batch(task, 4))
        with contextlib.closing(criterion.passes(model, batch(task, 4))) as passes:
            for _ in range(criterion.num_passes):
                next(passes)[0].backward()


def test_freelb_holds_one_graph_at_a_time(class_data: Path) -> None:
    """K = 3 takes at most 1.1 times plain's memory."""
    peaks = []
    for name, flags in (("sentence_prediction", []), ("freelb_sentence_prediction", ["--freelb-steps", "3"])):
        task, model, criterion = set_up(class_data, *LIKE_ROBERTA, *flags, criterion=name)
        sample = batch(task, 24)
        step(model, criterion, sample)
        with PeakMemory() as memory:
            take_passes(model, criterion, sample)
        peaks.append(memory.peak)
    assert peaks[1] < 1.1 * peaks[0]


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("pgd", ["--pgd-epsilon", "-1"], "--pgd-epsilon is -1.0; it must be 0 or above"),
        ("pgd", ["--pgd-epsilon", "2"], "--pgd-epsilon is 2.0; it must be at most 1"),
        ("freelb", ["--freelb-start", "1000"], "--freelb-start is 1000.0; it must be at most --freelb-epsilon, 0.01"),
        ("freelb", ["--freelb-step-size", "0"], "--freelb-step-size is 0.0; it must be above 0"),
        ("freeat", ["--freeat-steps", "0"], "--freeat-steps is 0; it must be 1 or more"),
        ("r3f", ["--r3f-epsilon", "0"], "--r3f-epsilon is 0.0; it must be above 0"),
        ("rdrop", ["--rdrop-weight", "-1"], "--rdrop-weight is -1.0; it must be 0 or above"),
    ],
)
def test_bad_values(name: str, flags: list[str], message: str, class_data: Path) -> None:
    with pytest.raises(ValueError, match=message):
        set_up(class_data, *flags, criterion=f"{name}_sentence_prediction")
