"""The criterion inside fairseq: what it costs, what it moves, what it leaves alone, what it says."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from toolkit import (
    BOLD,
    HALF,
    HEAD,
    NO_DROPOUT,
    assert_close,
    assert_equal,
    assert_same_gradients,
    batch,
    command,
    count_forwards,
    flops,
    set_up,
    step,
    train,
)

from smart_fairseq.encoder import encoder_of
from smart_fairseq.errors import UsageError
from smart_fairseq.method.dropout import RandomState
from smart_fairseq.terms import bregman, smoothness

# --- what it costs --------------------------------------------------------------------------------


NOISE = ["--smart-noise-std", "1e-3"]
INDEPENDENT = ["--smart-dropout", "independent"]


@pytest.mark.parametrize(
    ("flags", "optimizer", "classes", "expected"),
    [
        (["--smart-weight", "0"], "mbpp", 2, 2),  # clean, teacher
        # the first step takes its gradient from the clean pass, whatever the noise
        ([], "adam", 2, 2),  # clean, adversarial
        (NOISE, "adam", 2, 2),
        ([], "mbpp", 2, 3),
        (["--smart-steps", "3"], "mbpp", 2, 5),  # and one for each later step
        (["--smart-steps", "3", "--smart-linear-search"], "mbpp", 2, 3),
        (["--smart-dropout", "off"], "mbpp", 2, 4),  # and clean without dropout
        ([], "mbpp", 4, 3),
        # a pass of the first step's own
        ([], "mbpp", 5, 4),
        (["--smart-recompute"], "mbpp", 2, 4),
        (INDEPENDENT, "mbpp", 2, 4),
        ([*INDEPENDENT, *NO_DROPOUT], "mbpp", 2, 3),  # where the clean pass's would do
        (["--smart-mode", "tangent"], "mbpp", 2, 3),  # teacher, first step, clean with its change
    ],
)
def test_number_of_forwards(flags: list[str], optimizer: str, classes: int, expected: int, class_data: Path) -> None:
    task, model, criterion = set_up(class_data, *flags, optimizer=optimizer, num_classes=classes)
    passes = count_forwards(model)
    step(model, criterion, batch(task, 4))
    assert len(passes) == expected


@pytest.mark.parametrize(
    ("flags", "optimizer", "classes", "expected"),
    [
        (["--smart-weight", "0"], "mbpp", 2, 4),
        ([], "adam", 2, 7),
        ([], "mbpp", 2, 8),
        (NOISE, "mbpp", 2, 8),
        ([], "mbpp", 3, 9),
        ([], "mbpp", 4, 10),
        (["--smart-steps", "2"], "mbpp", 2, 10),
        (["--smart-steps", "3"], "mbpp", 2, 12),
        (["--smart-steps", "3", "--smart-linear-search"], "mbpp", 2, 8),
        (INDEPENDENT, "mbpp", 2, 9),
        ([*INDEPENDENT, *NO_DROPOUT], "mbpp", 2, 8),
        ([], "mbpp", 5, 10),
        ([], "mbpp", 9, 10),
        (["--smart-recompute"], "mbpp", 2, 10),
    ],
    ids=str,
)
def test_arithmetic_is_at_the_floor(
    flags: list[str], optimizer: str, classes: int, expected: int, class_data: Path
) -> None:
    """In forward-equivalents F, of which plain training takes 3 and MBPP alone 4.

    Up to four classes the first ascent step costs a backward pass to the embeddings for each class but one, through
    the clean pass's own graph: with the clean pass (3), the adversarial one (3) and the teacher (1) that is 6 + C with
    C classes. Each later step takes a forward and such a backward, 2. With more classes the first step has a pass of
    its own, a forward that carries its change along (2) and one backward (1), whatever their number: 10. So has
    --smart-recompute, of a forward and a backward for each class but one, and the clean pass's forward once more.
    Fresh dropout masks take that first step by a forward and a backward as well, 9.
    """

    def cost(*flags: str, **options: Any) -> int:
        # wide enough that attention, whose backward costs twice its forward in any case, weighs little
        wide = ["--encoder-embed-dim", "128", "--encoder-ffn-embed-dim", "512"]
        task, model, criterion = set_up(class_data, *wide, *flags, **options)
        return flops(model, criterion, batch(task, 4))

    forward = cost(criterion="sentence_prediction") / 3
    # a little below is possible: the teacher's attention, without gradients, is one fused operation
    assert expected - 0.5 < cost(*flags, optimizer=optimizer, num_classes=classes) / forward <= expected + 0.05


# --- what it moves --------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["token", "normalized", "input"])
def test_a_perturbation_moves_the_logits_with_dropout_off(place: str, class_data: Path) -> None:
    """fairseq's R3F passes `token_embeddings`, which RoBERTa ignores: a difference of exactly 0."""
    task, model, _ = set_up(class_data)
    model.eval()
    inputs = {**batch(task, 4)["net_input"], "classification_head_name": HEAD}
    noise = torch.randn(*inputs["src_tokens"].shape, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        clean = model(**inputs)[0]
        assert_equal(model(**inputs, token_embeddings=100 * noise)[0], clean)
        with encoder_of(model).perturbed(1e-3 * noise, place):
            moved = model(**inputs)[0]
        assert_equal(model(**inputs)[0], clean)
    assert float((moved - clean).abs().min()) > 0
    # from zero, the change grows in proportion
    with torch.no_grad(), encoder_of(model).perturbed(1e-4 * noise, place):
        assert_close(10 * (model(**inputs)[0] - clean), moved - clean, rtol=0.2, atol=1e-2)


def test_a_forward_that_misses_the_perturbation_is_an_error(class_data: Path) -> None:
    task, model, _ = set_up(class_data)
    with pytest.raises(RuntimeError, match="0 times"):
        with encoder_of(model).perturbed(torch.zeros(1), "token"):
            pass


def test_the_term_grows_with_the_square_of_the_radius(class_data: Path) -> None:
    """In float32 from 1e-4 to 1e-2, with a step that saturates the ball: near the clean point all is second order."""
    values = {}
    for radius in (1e-4, 1e-3, 1e-2):
        flags = ["--smart-epsilon", str(radius), "--smart-step-size", "1e3", "--smart-noise-std", "1e-4"]
        task, model, criterion = set_up(class_data, *NO_DROPOUT, *flags)
        _, log, _ = step(model, criterion, batch(task, 8))
        values[radius] = float(log["smart_loss"])
        assert float(log["smart_delta"]) == pytest.approx(8 * radius, rel=1e-5)
    assert values[1e-3] / values[1e-4] == pytest.approx(100, rel=0.1)
    assert values[1e-2] / values[1e-3] == pytest.approx(100, rel=0.5)


def test_training_lowers_the_term(class_data: Path) -> None:
    """60 updates with a heavy weight end with a smaller term than the same updates without it."""

    def sensitivity(weight: str) -> float:
        task, model, criterion = set_up(class_data, *NO_DROPOUT, *BOLD, "--smart-weight", weight)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for index in range(60):
            model.zero_grad()
            torch.manual_seed(index)
            loss, size, _ = criterion(model, batch(task, 8, start=8 * (index % 3)))
            (loss / size).backward()
            optimizer.step()
        criterion.weights["smart"] = 1.0
        return float(step(model, criterion, batch(task, 24))[1]["smart_loss"])

    assert sensitivity("100") < 0.5 * sensitivity("0")


@pytest.mark.parametrize("optimizer", ["adam", "mbpp"])
def test_gradients_are_the_loss_and_nothing_of_the_ascent(optimizer: str, class_data: Path) -> None:
    """After a batch, a parameter's gradient is that of the returned loss: the inner passes leave no trace."""
    task, model, criterion = set_up(class_data, *BOLD, optimizer=optimizer)
    sample = batch(task, 4)
    torch.manual_seed(3)
    loss, _, _ = criterion(model, sample)
    assert all(parameter.grad is None for parameter in model.parameters())
    names, wanted = zip(*model.named_parameters())
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    expected = {name: gradient for name, gradient in zip(names, found) if gradient is not None}
    ours = step(model, criterion, sample)
    assert_same_gradients(ours, ours._replace(gradients=expected))


def test_the_ascent_computes_no_weight_gradients_and_keeps_no_activation_for_them(
    class_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a later step's graph saves for backward is much less than what an ordinary pass saves."""
    task, model, criterion = set_up(class_data, *NO_DROPOUT, *BOLD, "--smart-steps", "2")
    sample = batch(task, 8)
    saved: dict[str, int] = {}

    def record(label: str) -> Any:
        # storages, so that views of one tensor count once; weights are there in any case
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            saved[label] = sum(seen.values())
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    original = smoothness.ascend

    def watched(*arguments: Any) -> torch.Tensor:
        with record("ascent"):
            return original(*arguments)

    monkeypatch.setattr(smoothness, "ascend", watched)
    step(model, criterion, sample)
    monkeypatch.undo()
    with record("ordinary"):
        criterion.weights["smart"] = 0.0
        step(model, criterion, sample)
    # attention's own intermediates, which any gradient needs, weigh most in a model of 16 channels
    assert 0 < saved["ascent"] < 0.7 * saved["ordinary"]


# --- dropout --------------------------------------------------------------------------------------

HEAVY_DROPOUT = ["--dropout", "0.3", "--attention-dropout", "0.3", "--pooler-dropout", "0.3"]


def term_with(data: Path, mode: str, *flags: str) -> float:
    task, model, criterion = set_up(data, *flags, "--smart-dropout", mode, "--smart-epsilon", "1e-4")
    return float(step(model, criterion, batch(task, 8))[1]["smart_loss"])


def test_dropout_modes(class_data: Path) -> None:
    """With the same masks, or none, the term is of the perturbation's size; with fresh ones it is dropout's."""
    shared, independent, off = (
        term_with(class_data, mode, *HEAVY_DROPOUT) for mode in ("shared", "independent", "off")
    )
    still = term_with(class_data, "shared", *NO_DROPOUT)
    assert independent > 100 * shared
    assert independent > 100 * off
    assert off == pytest.approx(still, rel=1e-3)
    assert 0 < shared != pytest.approx(off, rel=1e-3)


def test_shared_masks_make_equal_passes_bit_equal(class_data: Path) -> None:
    task, model, criterion = set_up(class_data, *HEAVY_DROPOUT)
    inputs = {**batch(task, 4)["net_input"], "classification_head_name": HEAD}
    state = RandomState(torch.device("cpu"))
    first = model(**inputs)[0]
    middle = torch.get_rng_state()
    with state.replayed():
        assert_equal(model(**inputs)[0], first)
    assert_equal(torch.get_rng_state(), middle)
    assert not torch.equal(model(**inputs)[0], first)


def test_the_teacher_pass_has_no_dropout_and_training_goes_on(
    class_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The term depends on the clean pass's masks alone; every module is back in the mode it was in."""
    task, model, criterion = set_up(class_data, *HEAVY_DROPOUT, "--smart-weight", "0", optimizer="mbpp")
    model.encoder.sentence_encoder.layers[1].eval()
    before = [m.training for m in model.modules()]
    outputs = []
    original = bregman.teacher_output
    monkeypatch.setattr(bregman, "teacher_output", lambda *given: outputs.append(original(*given)) or outputs[-1])
    for seed in (1, 2):
        step(model, criterion, batch(task, 4), seed=seed)
    assert_equal(outputs[0], outputs[1])
    assert not outputs[0].requires_grad
    assert [m.training for m in model.modules()] == before


# --- values that are not finite --------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_perturbation_that_is_not_finite_never_reaches_the_weights(
    value: float, class_data: Path, monkeypatch: Any
) -> None:
    task, model, criterion = set_up(class_data, *NO_DROPOUT)
    monkeypatch.setattr(smoothness, "ascend", lambda gradient_fn, noise, *_: torch.full_like(noise, value))
    ours = step(model, criterion, batch(task, 4))
    monkeypatch.undo()
    criterion.weights["smart"] = 0.0
    with encoder_of(model).lean():  # whose backward pass rounds otherwise
        plain = step(model, criterion, batch(task, 4))
    assert ours.log["smart_dropped"] == 1 and ours.log["smart_loss"] == 0
    assert_equal(ours.loss, plain.loss)
    assert_same_gradients(ours, plain)


def test_a_teacher_that_overflows_is_dropped(class_data: Path, monkeypatch: Any) -> None:
    task, model, criterion = set_up(class_data, *NO_DROPOUT, "--smart-weight", "0", optimizer="mbpp")
    monkeypatch.setattr(bregman, "teacher_output", lambda *_: torch.full((4, 2), math.inf))
    loss, log, gradients = step(model, criterion, batch(task, 4))
    assert log["bregman_dropped"] == 1 and torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_dropped_terms_are_counted_in_the_log(class_data: Path, monkeypatch: Any) -> None:
    original = smoothness.ascend
    calls = []

    def sometimes(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        found = original(*arguments)
        return found * math.nan if len(calls) in (2, 3) else found

    monkeypatch.setattr(smoothness, "ascend", sometimes)
    log = train(command(class_data, max_update=5))
    assert [line.get("smart_dropped", 0) for line in log["train_inner"]] == [0, 1, 1, 0, 0]
    assert log["train"][0]["train_smart_dropped"] == 2
    assert all(math.isfinite(line["loss"]) for line in log["train_inner"])


# --- the log --------------------------------------------------------------------------------------


def test_log_lines(class_data: Path) -> None:
    """The terms stand beside fairseq's entries, add up to the loss, and keep their digits at the paper's radius."""
    arguments = [a for a in command(class_data, *NO_DROPOUT, "--smart-weight", "3") if a != "--disable-validation"]
    log = train(arguments)
    first, last = log["train_inner"][0], log["train_inner"][-1]
    assert 0 < first["smart_loss"] < 1e-5
    assert first["smart_delta"] == pytest.approx(1e-5)
    assert first["bregman_loss"] == pytest.approx(0, abs=1e-9)
    assert last["bregman_loss"] > 1e-6
    total = last["task_loss"] + 3 * last["smart_loss"] + last["bregman_loss"]
    assert last["loss"] * math.log(2) == pytest.approx(total, abs=2e-3)
    assert not any("smart" in key or "bregman" in key or "task_loss" in key for key in log["valid"][0])
    assert {"valid_loss", "valid_accuracy"} <= set(log["valid"][0])


def test_the_start_says_what_is_on(class_data: Path) -> None:
    with_teacher, without = (
        "\n".join(train(command(class_data, optimizer=optimizer, max_update=1))["text"])
        for optimizer in ("mbpp", "adam")
    )
    assert (
        "smoothness term by two forwards, its first ascent step from the clean pass, Bregman weight 1;" in with_teacher
    )
    assert all(words in with_teacher for words in ("--smart-weight 1.0", "--smart-epsilon 1e-05", "--smart-norm inf"))
    assert "--mbpp-base adam --mbpp-recipe paper" in with_teacher and "--mbpp-base" not in without
    assert "momentum is 0.99 for the first 0.1 of training, then 0.999" in with_teacher
    assert "--smart-bregman-weight is not set and --optimizer is adam: no Bregman term" in without
    assert "Bregman weight 0" in without


def test_below_the_precision_the_term_is_taken_to_first_order(class_data: Path) -> None:
    """And the log says so; in float32 the same radius takes two forwards."""
    log = train(command(class_data, *HALF, "--smart-epsilon", "1e-6", max_update=2))
    text = "\n".join(log["text"])
    assert "--smart-epsilon 1e-06 is below what float16 resolves here" in text and "to first order (tangent)" in text
    assert all(0 < line["smart_loss"] < 1e-8 for line in log["train_inner"])
    assert "(tangent)" not in "\n".join(train(command(class_data, max_update=1))["text"])
    assert {line["smart_form"] for line in log["train_inner"]} == {"first_order"}
    for precision in ([], HALF):
        for noise in ("1e-5", "1e-3"):
            flags = [*precision, *BOLD, "--smart-noise-std", noise]
            log = train(command(class_data, *flags, max_update=1))
            text = "\n".join(log["text"])
            assert "(tangent)" not in text
            assert "by two forwards, its first ascent step from the clean pass" in text
            assert log["train_inner"][0]["smart_form"] == "two_forwards"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--smart-dropout", "independent"], "--smart-epsilon 1e-05 is below what float16 resolves here .*rounding"),
        (["--smart-dropout", "off"], "does not know --smart-dropout off; use shared, or a larger size"),
        (["--smart-linear-search"], "does not know --smart-linear-search; leave that flag out, or a larger size"),
        (["--smart-divergence", "js"], "does not know --smart-divergence js; use auto, or a larger size"),
    ],
)
def test_what_half_precision_cannot_hold_is_refused(flags: list[str], line: str, class_data: Path) -> None:
    with pytest.raises(UsageError, match=line):
        train(command(class_data, *HALF, *flags, max_update=1))


def test_finite_mode_below_the_precision_is_warned_of(class_data: Path) -> None:
    """Two forwards all the same."""
    log = train(command(class_data, *HALF, "--smart-mode", "finite", max_update=1))
    text = "\n".join(log["text"])
    assert "--smart-mode finite: --smart-epsilon 1e-05 is below what float16 resolves here" in text
    assert "partly rounding" in text and log["train_inner"][0]["smart_form"] == "two_forwards"
    assert "rounding" not in "\n".join(train(command(class_data, "--smart-mode", "finite", max_update=1))["text"])


def test_sensitivity_in_the_log(class_data: Path) -> None:
    """smart_sensitivity is the term over the squared size of the perturbation, in either form."""
    for flags, size in (([], 1e-2), (["--smart-mode", "tangent"], 1e-2), (["--smart-step-size", "2e-3"], None)):
        line = train(command(class_data, *NO_DROPOUT, *BOLD, *flags, max_update=1))["train_inner"][0]
        assert line["smart_delta"] == pytest.approx(size, rel=1e-5) if size else 1e-3 < line["smart_delta"] < 9e-3
        assert line["smart_sensitivity"] == pytest.approx(line["smart_loss"] / line["smart_delta"] ** 2, rel=0.02)
