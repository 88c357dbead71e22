"""The criterion inside fairseq: what it equals, what it costs, what it moves, what it leaves alone."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import optim
from toolkit import BOLD, NO_DROPOUT, assert_close, assert_equal, batch, build, command, flops, train

import smart_fairseq.smoothness as module
from smart_fairseq.errors import UsageError
from smart_fairseq.perturb import perturbed, token_mask


def set_up(data: Path, *flags: str, optimizer: str = "adam", **options: Any) -> tuple[Any, Any, Any]:
    """Task, model in training mode, criterion."""
    cfg, task, model, criterion = build(command(data, *flags, optimizer=optimizer, **options))
    torch.nn.init.normal_(model.classification_heads["sentence_classification_head"].out_proj.weight, std=1.0)
    if optimizer == "mbpp":
        criterion.teacher.connect(optim.build_optimizer(cfg.optimizer, list(model.parameters())))
    return task, model.train(), criterion.train()


def step(
    model: Any, criterion: Any, sample: Any, seed: int = 3
) -> tuple[torch.Tensor, dict[str, Any], list[torch.Tensor]]:
    """Loss, log and gradients of one batch."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss, _, log = criterion(model, sample)
    loss.backward()
    return loss.detach(), log, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def count_forwards(model: Any) -> list[int]:
    """A list that grows by one for every pass through the first layer."""
    passes: list[int] = []
    model.encoder.sentence_encoder.layers[0].register_forward_hook(lambda *_: passes.append(1))
    return passes


# --- what it equals -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classes", "regression"])
def test_weights_zero_is_sentence_prediction(kind: str, class_data: Path, regression_data: Path) -> None:
    """Loss, gradients, log and number of forwards, bit for bit, dropout on."""
    data, flags, classes = (class_data, [], 2) if kind == "classes" else (regression_data, ["--regression-target"], 1)
    results = []
    for criterion_name, more in (("sentence_prediction", []), ("smart_sentence_prediction", ["--smart-weight", "0"])):
        task, model, criterion = set_up(data, *flags, *more, criterion=criterion_name, num_classes=classes)
        passes = count_forwards(model)
        results.append((*step(model, criterion, batch(task, 6)), len(passes)))
    (plain_loss, plain_log, plain_gradients, plain_passes), (loss, log, gradients, passes_) = results
    assert passes_ == plain_passes == 1
    assert_equal(loss, plain_loss)
    assert log == plain_log
    assert len(gradients) == len(plain_gradients) > 30
    for ours, theirs in zip(gradients, plain_gradients):
        assert_equal(ours, theirs)


def test_weights_zero_trains_as_sentence_prediction(class_data: Path) -> None:
    """The log lines of whole runs, validation included."""
    times = {
        "wps",
        "ups",
        "wall",
        "train_wall",
        "valid_wps",
        "train_wps",
        "train_ups",
        "valid_wall",
        "train_train_wall",
    }
    runs = []
    for name, more in (("sentence_prediction", []), ("smart_sentence_prediction", ["--smart-weight", "0"])):
        # with fairseq's own 8, sentence_prediction would leave the last examples out of its validation
        whole = ["--required-batch-size-multiple", "1"]
        arguments = command(class_data, *whole, *more, criterion=name, optimizer="adam")
        arguments.remove("--disable-validation")
        log = train(arguments)
        runs.append(
            [
                {k: v for k, v in line.items() if k not in times}
                for kind in ("train_inner", "valid")
                for line in log[kind]
            ]
        )
    assert runs[0] == runs[1] and len(runs[0]) > 6


@pytest.mark.parametrize("kind", ["classes", "regression"])
def test_evaluation_is_one_forward_and_that_of_sentence_prediction(
    kind: str, class_data: Path, regression_data: Path
) -> None:
    data, flags, classes = (class_data, [], 2) if kind == "classes" else (regression_data, ["--regression-target"], 1)
    task, model, criterion = set_up(data, *flags, optimizer="mbpp", num_classes=classes)
    _, plain_model, plain = set_up(data, *flags, criterion="sentence_prediction", num_classes=classes)
    passes = count_forwards(model)
    model.eval(), criterion.eval(), plain_model.eval(), plain.eval()
    with torch.no_grad():
        loss, size, log = criterion(model, batch(task, 6))
        plain_loss, plain_size, plain_log = plain(plain_model, batch(task, 6))
    assert len(passes) == 1 and size == plain_size and log == plain_log
    assert_equal(loss, plain_loss)


NOISE = ["--smart-noise-std", "1e-3"]


@pytest.mark.parametrize(
    ("flags", "optimizer", "expected"),
    [
        (["--smart-weight", "0"], "mbpp", 2),  # clean, teacher
        (NOISE, "adam", 3),  # clean, ascent, adversarial
        (NOISE, "mbpp", 4),
        ([*NOISE, "--smart-steps", "3"], "mbpp", 6),
        ([*NOISE, "--smart-dropout", "off"], "mbpp", 5),  # and clean without dropout
        # from the paper's noise, the first step takes its gradient from the clean pass
        ([], "adam", 2),
        (["--smart-steps", "3"], "mbpp", 5),
        (["--smart-dropout", "off"], "mbpp", 4),
        (["--smart-dropout", "independent"], "mbpp", 4),
    ],
)
def test_number_of_forwards(flags: list[str], optimizer: str, expected: int, class_data: Path) -> None:
    task, model, criterion = set_up(class_data, *flags, optimizer=optimizer)
    passes = count_forwards(model)
    step(model, criterion, batch(task, 4))
    assert len(passes) == expected


def test_arithmetic_is_at_the_floor(class_data: Path) -> None:
    """In forward-equivalents: 7 + 2 K with the teacher, 6 + 2 K without, 4 for MBPP alone, 3 for plain training.

    A first step from the clean pass has no forward, and a backward for each class but one.
    """

    def cost(*flags: str, optimizer: str, **options: Any) -> int:
        # wide enough that attention, whose backward costs twice its forward in any case, weighs little
        wide = ["--encoder-embed-dim", "128", "--encoder-ffn-embed-dim", "512"]
        task, model, criterion = set_up(class_data, *wide, *flags, optimizer=optimizer, **options)
        return flops(model, criterion, batch(task, 4))

    forward = cost(criterion="sentence_prediction", optimizer="adam") / 3
    # a little below is possible: the teacher's attention, without gradients, is one fused operation
    for expected, found in (
        (9, cost(*NOISE, optimizer="mbpp")),
        (13, cost(*NOISE, "--smart-steps", "3", optimizer="mbpp")),
        (8, cost(*NOISE, optimizer="adam")),
        (8, cost(optimizer="mbpp")),
        (9, cost(optimizer="mbpp", num_classes=3)),
        (9, cost(optimizer="mbpp", num_classes=4)),  # by two forwards
        (4, cost("--smart-weight", "0", optimizer="mbpp")),
    ):
        assert expected - 0.5 < found / forward <= expected + 0.05


# --- what it moves --------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["token", "input"])
def test_a_perturbation_moves_the_logits_with_dropout_off(place: str, class_data: Path) -> None:
    """fairseq's R3F passes `token_embeddings`, which RoBERTa ignores: a difference of exactly 0."""
    task, model, _ = set_up(class_data)
    model.eval()
    inputs = {**batch(task, 4)["net_input"], "classification_head_name": "sentence_classification_head"}
    noise = torch.randn(*inputs["src_tokens"].shape, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        clean = model(**inputs)[0]
        assert_equal(model(**inputs, token_embeddings=100 * noise)[0], clean)
        with perturbed(model, 1e-3 * noise, place):
            moved = model(**inputs)[0]
        assert_equal(model(**inputs)[0], clean)
    assert float((moved - clean).abs().min()) > 0
    # from zero, the change grows in proportion
    with torch.no_grad(), perturbed(model, 1e-4 * noise, place):
        assert_close(10 * (model(**inputs)[0] - clean), moved - clean, rtol=0.2, atol=1e-2)


def test_a_forward_that_misses_the_perturbation_is_an_error(class_data: Path) -> None:
    task, model, _ = set_up(class_data)
    with pytest.raises(RuntimeError, match="0 times"):
        with perturbed(model, torch.zeros(1), "token"):
            pass


def test_padding_changes_nothing(class_data: Path) -> None:
    """The same examples with five more columns of padding: the same terms and gradients."""
    task, model, criterion = set_up(class_data, *NO_DROPOUT, *BOLD)
    sample = batch(task, 4)
    wider = copy.deepcopy(sample)
    tokens = wider["net_input"]["src_tokens"]
    wider["net_input"]["src_tokens"] = torch.cat([tokens, tokens.new_full((4, 5), 1)], dim=1)
    assert token_mask(model, wider["net_input"]["src_tokens"])[:, -5:].sum() == 0
    loss, log, gradients = step(model, criterion, sample)
    wider_loss, wider_log, wider_gradients = step(model, criterion, wider)
    assert log["smart_loss"] > 1e-4
    assert_close(wider_log["smart_loss"], log["smart_loss"])
    for ours, theirs in zip(wider_gradients, gradients):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_term_grows_with_the_square_of_the_radius(class_data: Path) -> None:
    """In float32 from 1e-4 to 1e-2, with a step that saturates the ball: near the clean point all is second order."""
    values = {}
    for radius in (1e-4, 1e-3, 1e-2):
        task, model, criterion = set_up(
            class_data,
            *NO_DROPOUT,
            "--smart-epsilon",
            str(radius),
            "--smart-step-size",
            "1e3",
            "--smart-noise-std",
            "1e-4",
        )
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
        criterion.smart_weight = 1.0
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
    wanted = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss, wanted, allow_unused=True)
    _, _, gradients = step(model, criterion, sample)
    for ours, theirs in zip(gradients, [g for g in expected if g is not None]):
        assert_equal(ours, theirs)


def test_the_ascent_computes_no_weight_gradients_and_keeps_no_activation_for_them(class_data: Path) -> None:
    """What the ascent's graph saves for backward is much less than what an ordinary pass saves."""
    task, model, criterion = set_up(class_data, *NO_DROPOUT, *BOLD)
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

    original = module.find_perturbation

    def watched(logits_fn: Any, *rest: Any) -> torch.Tensor:
        with record("ascent"):
            return original(logits_fn, *rest)

    module.find_perturbation = watched
    try:
        step(model, criterion, sample)
    finally:
        module.find_perturbation = original
    with record("ordinary"):
        criterion.smart_weight = 0.0
        step(model, criterion, sample)
    # attention's own intermediates, which any gradient needs, weigh most in a model of 16 channels
    assert 0 < saved["ascent"] < 0.7 * saved["ordinary"]


# --- dropout --------------------------------------------------------------------------------------

HEAVY_DROPOUT = ["--dropout", "0.3", "--attention-dropout", "0.3", "--pooler-dropout", "0.3"]


def smoothness(data: Path, mode: str, *flags: str) -> float:
    task, model, criterion = set_up(data, *flags, "--smart-dropout", mode, "--smart-epsilon", "1e-4")
    return float(step(model, criterion, batch(task, 8))[1]["smart_loss"])


def test_dropout_modes(class_data: Path) -> None:
    """With the same masks, or none, the term is of the perturbation's size; with fresh ones it is dropout's."""
    shared, independent, off = (
        smoothness(class_data, mode, *HEAVY_DROPOUT) for mode in ("shared", "independent", "off")
    )
    still = smoothness(class_data, "shared", *NO_DROPOUT)
    assert independent > 100 * shared
    assert independent > 100 * off
    assert off == pytest.approx(still, rel=1e-3)
    assert 0 < shared != pytest.approx(off, rel=1e-3)


def test_shared_masks_make_equal_passes_bit_equal(class_data: Path) -> None:
    task, model, criterion = set_up(class_data, *HEAVY_DROPOUT)
    inputs = {**batch(task, 4)["net_input"], "classification_head_name": "sentence_classification_head"}
    state = module.RandomState(torch.device("cpu"))
    first = model(**inputs)[0]
    middle = torch.get_rng_state()
    with state.replayed():
        assert_equal(model(**inputs)[0], first)
    assert_equal(torch.get_rng_state(), middle)
    assert not torch.equal(model(**inputs)[0], first)


def test_the_teacher_pass_has_no_dropout_and_training_goes_on(class_data: Path) -> None:
    """The term depends on the clean pass's masks alone; every module is back in the mode it was in."""
    task, model, criterion = set_up(class_data, *HEAVY_DROPOUT, "--smart-weight", "0", optimizer="mbpp")
    model.encoder.sentence_encoder.layers[1].eval()
    before = [m.training for m in model.modules()]
    outputs = []
    original = criterion._teacher_output
    criterion._teacher_output = lambda forward: outputs.append(original(forward)) or outputs[-1]
    for seed in (1, 2):
        step(model, criterion, batch(task, 4), seed=seed)
    assert_equal(outputs[0], outputs[1])
    assert not outputs[0].requires_grad
    assert [m.training for m in model.modules()] == before


# --- the batch ------------------------------------------------------------------------------------


def test_accumulated_batches_equal_one_large_batch(class_data: Path) -> None:
    """All terms are sums over the examples, and the noise belongs to the example."""
    task, model, criterion = set_up(class_data, *NO_DROPOUT, *BOLD, optimizer="mbpp")
    loss, log, gradients = step(model, criterion, batch(task, 8))
    model.zero_grad()
    torch.manual_seed(3)
    parts = [criterion(model, batch(task, 4, start)) for start in (0, 4)]
    sum(part[0] for part in parts).backward()
    for key in ("task_loss", "smart_loss", "bregman_loss", "smart_delta"):
        assert_close(sum(part[2][key] for part in parts), log[key], atol=1e-6)
    for ours, theirs in zip([p.grad for p in model.parameters() if p.grad is not None], gradients):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_update_freq_2_with_batch_4_equals_batch_8(class_data: Path, tmp_path: Path) -> None:
    """Through fairseq-train, three updates: log lines, weights and teacher to 1e-6."""
    # sgd, because adam turns a gradient of rounding (that of the keys' bias) into a whole step
    flags = [*NO_DROPOUT, *BOLD, "--curriculum", "9", "--mbpp-base", "sgd", "--lr", "0.1"]
    flags += ["--required-batch-size-multiple", "1", "--mbpp-warmup-momentum", "0.5", "--mbpp-warmup-ratio", "1"]
    logs, states = [], []
    for size, freq in (("8", "1"), ("4", "2")):
        run = ["--batch-size", size, "--update-freq", freq]
        logs.append(train(command(class_data, *flags, *run, save_dir=tmp_path / size, max_update=3))["train_inner"])
        states.append(torch.load(tmp_path / size / "checkpoint_last.pt"))
    assert len(logs[0]) == 3 and logs[0][2]["bregman_loss"] > 1e-6
    for large, accumulated in zip(*logs):
        for key in ("loss", "task_loss", "smart_loss", "bregman_loss", "gnorm"):
            # the log shows three digits
            assert accumulated[key] == pytest.approx(large[key], rel=6e-3, abs=1e-6), key
    for name, weight in states[0]["model"].items():
        assert_close(states[1]["model"][name], weight, rtol=0, atol=1e-6)
    for ours, theirs in zip(*(state["last_optimizer_state"]["mbpp"]["teacher"] for state in states)):
        assert_close(ours, theirs, rtol=0, atol=1e-6)


# --- values that are not finite --------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_perturbation_that_is_not_finite_never_reaches_the_weights(
    value: float, class_data: Path, monkeypatch: Any
) -> None:
    task, model, criterion = set_up(class_data, *NO_DROPOUT)
    monkeypatch.setattr(module, "find_perturbation", lambda f, clean, noise, *_: torch.full_like(noise, value))
    loss, log, gradients = step(model, criterion, batch(task, 4))
    monkeypatch.undo()
    criterion.smart_weight = 0.0
    plain_loss, plain_log, plain_gradients = step(model, criterion, batch(task, 4))
    assert log["smart_dropped"] == 1 and log["smart_loss"] == 0
    assert_equal(loss, plain_loss)
    for ours, theirs in zip(gradients, plain_gradients):
        assert_equal(ours, theirs)


def test_a_teacher_that_overflows_is_dropped(class_data: Path, monkeypatch: Any) -> None:
    task, model, criterion = set_up(class_data, *NO_DROPOUT, "--smart-weight", "0", optimizer="mbpp")
    monkeypatch.setattr(criterion, "_teacher_output", lambda forward: torch.full((4, 2), math.inf))
    loss, log, gradients = step(model, criterion, batch(task, 4))
    assert log["bregman_dropped"] == 1 and torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_dropped_terms_are_counted_in_the_log(class_data: Path, monkeypatch: Any) -> None:
    original = module.find_perturbation
    calls = []

    def sometimes(f: Any, clean: Any, noise: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(1)
        found = original(f, clean, noise, *rest)
        return found * math.nan if len(calls) in (2, 3) else found

    monkeypatch.setattr(module, "find_perturbation", sometimes)
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
        "smoothness term by two forwards, the first ascent step to first order from the clean pass, Bregman weight 1;"
        in with_teacher
    )
    assert "--smart-weight 1.0 --smart-epsilon 1e-05" in with_teacher and "--smart-norm inf" in with_teacher
    assert "--mbpp-base adam --mbpp-momentum 0.999" in with_teacher and "--mbpp-base" not in without
    assert "--smart-bregman-weight is not set and --optimizer is adam: no Bregman term" in without
    assert "Bregman weight 0" in without


HALF = ["--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", "4"]


def test_below_the_precision_the_term_is_taken_to_first_order(class_data: Path) -> None:
    """And the log says so; in float32 the same radius takes two forwards."""
    log = train(command(class_data, *HALF, "--smart-epsilon", "1e-6", max_update=2))
    text = "\n".join(log["text"])
    assert "--smart-epsilon 1e-06 is below what float16 resolves here" in text and "to first order (tangent)" in text
    assert all(0 < line["smart_loss"] < 1e-8 for line in log["train_inner"])
    assert "(tangent)" not in "\n".join(train(command(class_data, max_update=1))["text"])
    text = "\n".join(train(command(class_data, *HALF, *BOLD, "--smart-noise-std", "1e-5", max_update=1))["text"])
    assert "(tangent)" not in text
    assert "by two forwards, the first ascent step to first order" in text
    noisy = [*BOLD, "--smart-noise-std", "1e-3"]
    assert "first order" not in "\n".join(train(command(class_data, *noisy, max_update=1))["text"])


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--smart-dropout", "independent"], "--smart-epsilon 1e-05 is below what float16 resolves here .*rounding"),
        (
            ["--smart-mode", "finite", "--smart-dropout", "off"],
            "does not know --smart-dropout off; use shared, or a larger size",
        ),
        (["--smart-divergence", "js"], "does not know --smart-divergence js; use auto, or a larger size"),
    ],
)
def test_what_half_precision_cannot_hold_is_refused(flags: list[str], line: str, class_data: Path) -> None:
    with pytest.raises(UsageError, match=line):
        train(command(class_data, *HALF, *flags, max_update=1))
