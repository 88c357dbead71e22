"""The teacher: its schedule, its average, its precision, its place in the optimizer's state, its way to a forward."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import optim
from toolkit import NO_DROPOUT, assert_close, assert_equal, batch, build, capture_log, command, parse

from smart_fairseq.method.teacher import average_, momentum_at
from smart_fairseq.optim.mbpp import MBPP
from smart_fairseq.training.link import TrainingLink


def optimizer_for(data: Path, parameters: list[torch.Tensor], *flags: str, **options: Any) -> MBPP:
    return optim.build_optimizer(parse(command(data, *flags, **options)).optimizer, parameters)


def some_parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((3, 4), (5,), (1, 2, 3))
    ]


def take_steps(optimizer: MBPP, parameters: list[torch.nn.Parameter], count: int) -> list[list[torch.Tensor]]:
    """The weights after each of ``count`` steps along made-up gradients."""
    history = []
    for _ in range(count):
        generator = torch.Generator().manual_seed(optimizer.updates)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()
        history.append([parameter.detach().clone() for parameter in parameters])
    return history


# --- the schedule and the average ------------------------------------------------------------------


def test_schedule_of_the_paper() -> None:
    """0.99 up to and with 10 % of the updates, then 0.999."""
    betas = [
        momentum_at(t, total_updates=30, momentum=0.999, warmup_momentum=0.99, warmup_ratio=0.1) for t in range(1, 31)
    ]
    assert betas == [0.99] * 3 + [0.999] * 27


@pytest.mark.parametrize("mode", [0.0, 1.0])
def test_zero_and_one_hold_from_the_start(mode: float) -> None:
    assert momentum_at(1, total_updates=100, momentum=mode, warmup_momentum=0.99, warmup_ratio=0.1) == mode


def test_closed_form_with_the_schedule(class_data: Path) -> None:
    """theta~_n = prod(beta) theta_0 + sum_t (1 - beta_t) prod_{s > t}(beta_s) theta_t, worked out in float64."""
    parameters = some_parameters()
    start = [p.detach().double() for p in parameters]
    flags = ["--mbpp-warmup-ratio", "0.3", "--mbpp-warmup-momentum", "0.5", "--mbpp-momentum", "0.9"]
    optimizer = optimizer_for(class_data, parameters, *flags, max_update=10)
    history = take_steps(optimizer, parameters, 10)
    betas = [0.5] * 3 + [0.9] * 7
    for index, average in enumerate(optimizer.teacher):
        expected = math.prod(betas) * start[index]
        for t, weights in enumerate(history):
            expected = expected + (1 - betas[t]) * math.prod(betas[t + 1 :]) * weights[index].double()
        assert_close(average, expected.float())
        assert not torch.allclose(average, history[-1][index])


def test_three_inner_steps(class_data: Path) -> None:
    """The teacher stands still for two updates and moves at every third."""
    parameters = some_parameters()
    start = [p.detach().clone() for p in parameters]
    optimizer = optimizer_for(
        class_data, parameters, "--mbpp-inner-steps", "3", "--mbpp-warmup-ratio", "0", "--mbpp-momentum", "0.75"
    )
    for t in range(1, 8):
        weights = take_steps(optimizer, parameters, 1)[0]
        if t % 3 == 0:
            start = [0.75 * a + 0.25 * w for a, w in zip(start, weights)]
        for average, expected in zip(optimizer.teacher, start):
            assert_close(average, expected)


def test_momentum_one_freezes_the_teacher(class_data: Path) -> None:
    parameters = some_parameters()
    start = [p.detach().clone() for p in parameters]
    optimizer = optimizer_for(class_data, parameters, "--mbpp-momentum", "1")
    take_steps(optimizer, parameters, 5)
    for average, weight, first in zip(optimizer.teacher, parameters, start):
        assert_equal(average, first)
        assert not torch.equal(weight, first)


def test_what_is_said_of_the_momentum(class_data: Path) -> None:
    def said(*flags: str, updates: int = 10) -> str:
        with capture_log() as log:
            optimizer_for(class_data, some_parameters(), *flags, max_update=updates)
        return " ".join(line for line in log["text"] if "mbpp" in line)

    # the modes hold from the start, whatever the recipe has for the first part
    assert "the teacher's momentum is 1" in said("--mbpp-recipe", "paper", "--mbpp-momentum", "1")
    assert "is 0.99 for the first 0.1 of training, then 0.999," in said("--mbpp-recipe", "paper")
    # the same momentum throughout needs no length, and has no first part
    assert "the teacher's momentum is 0.9, a memory of 10" in said(
        "--mbpp-recipe", "smart", "--mbpp-momentum", "0.9", updates=0
    )
    unused = ["--mbpp-recipe", "smart", "--mbpp-momentum", "0.9", "--mbpp-warmup-ratio", "0.5"]
    assert "--mbpp-warmup-ratio 0.5 changes nothing" in said(*unused)
    assert "changes nothing" not in said(*unused, "--mbpp-warmup-momentum", "0.5")
    for mode in ("0", "1"):
        both = ["--mbpp-momentum", mode, "--mbpp-warmup-momentum", "0.9"]
        assert f"--mbpp-warmup-momentum 0.9 changes nothing with --mbpp-momentum {mode}" in said(*both)
    assert "the teacher does not move in it" in said("--mbpp-inner-steps", "10")
    assert "does not move" not in said("--mbpp-inner-steps", "9")


def test_momentum_zero_is_the_student(class_data: Path) -> None:
    parameters = some_parameters()
    optimizer = optimizer_for(class_data, parameters, "--mbpp-momentum", "0")
    take_steps(optimizer, parameters, 5)
    for average, weight in zip(optimizer.teacher, parameters):
        assert_equal(average, weight.detach())
        assert average.data_ptr() != weight.data_ptr()


def test_vbpp_is_the_previous_outer_iterate(class_data: Path) -> None:
    parameters = some_parameters()
    optimizer = optimizer_for(class_data, parameters, "--mbpp-momentum", "0", "--mbpp-inner-steps", "2")
    history = take_steps(optimizer, parameters, 5)
    for average, weights in zip(optimizer.teacher, history[3]):
        assert_equal(average, weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_average_is_float32_and_does_not_stall(dtype: torch.dtype, class_data: Path) -> None:
    """1,000 steps of beta 0.999 towards a weight 0.1 away: in half precision the average would stand still."""
    teacher, weight = [torch.full((4,), 0.5)], [torch.full((4,), 0.625, dtype=dtype)]
    for _ in range(1000):
        average_(teacher, weight, 0.999)
    assert_close(teacher[0], torch.full((4,), 0.625 - 0.125 * 0.999**1000), rtol=1e-4)
    parameters = some_parameters(dtype)
    optimizer = optimizer_for(class_data, parameters)
    take_steps(optimizer, parameters, 1)
    assert all(average.dtype == torch.float32 for average in optimizer.teacher)


# --- the base optimizer -----------------------------------------------------------------------------


def reference_steps(make: Any, count: int = 4) -> list[torch.nn.Parameter]:
    parameters = some_parameters()
    optimizer = make(parameters)
    for update in range(count):
        generator = torch.Generator().manual_seed(update)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return parameters


@pytest.mark.parametrize(
    ("base", "make"),
    [
        ("adam", lambda ps: torch.optim.AdamW(ps, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)),
        (
            "radam",
            lambda ps: torch.optim.RAdam(
                ps, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, decoupled_weight_decay=True
            ),
        ),
        ("sgd", lambda ps: torch.optim.SGD(ps, lr=1e-3, weight_decay=0.1)),
    ],
)
def test_base_optimizers_with_the_flags_of_adam(base: str, make: Any, class_data: Path) -> None:
    parameters = some_parameters()
    flags = ["--adam-betas", "(0.9, 0.98)", "--adam-eps", "1e-6", "--weight-decay", "0.1", "--mbpp-base", base]
    optimizer = optimizer_for(class_data, parameters, *flags)
    take_steps(optimizer, parameters, 4)
    for ours, theirs in zip(parameters, reference_steps(make)):
        # fairseq's adam divides by sqrt(v) + eps before the bias correction, torch's after it
        assert_close(ours.detach(), theirs.detach(), atol=2e-5 if base == "adam" else 1e-7)


@pytest.mark.parametrize("base", ["adamax", "adagrad", "adadelta", "nag", "lamb", "adafactor"])
def test_other_registered_optimizers(base: str, class_data: Path) -> None:
    parameters = some_parameters()
    try:
        optimizer = optimizer_for(class_data, parameters, "--mbpp-base", base)
    except ImportError:
        pytest.skip(f"{base} needs apex")
    before = [p.detach().clone() for p in parameters]
    take_steps(optimizer, parameters, 2)
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters))
    copy_ = optimizer_for(class_data, some_parameters(), "--mbpp-base", base)
    copy_.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert copy_.updates == 2


# --- state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["adam", "adamw_fused", "radam"])
def test_state_goes_on_where_it_stopped(base: str, class_data: Path) -> None:
    """6 steps equal 3 + save + load + 3, bit for bit; the schedule's switch lies behind the stop."""
    flags = ["--mbpp-base", base, "--mbpp-warmup-ratio", "0.5", "--mbpp-inner-steps", "2"]
    straight = some_parameters()
    whole = optimizer_for(class_data, straight, *flags, max_update=8)
    take_steps(whole, straight, 6)

    first = some_parameters()
    half = optimizer_for(class_data, first, *flags, max_update=8)
    take_steps(half, first, 3)
    saved = copy.deepcopy(half.state_dict())
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    resumed = optimizer_for(class_data, second, *flags, max_update=8)
    resumed.load_state_dict(saved)
    take_steps(resumed, second, 3)
    for a, b in zip([*straight, *whole.teacher], [*second, *resumed.teacher]):
        assert_equal(a.detach(), b.detach())


def test_state_saved_before_the_first_update(class_data: Path) -> None:
    optimizer = optimizer_for(class_data, some_parameters())
    fresh = optimizer_for(class_data, some_parameters())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert fresh.teacher is None and fresh.updates == 0


def test_a_loaded_teacher_is_a_copy_in_float32(class_data: Path) -> None:
    parameters = some_parameters(torch.float16)
    optimizer = optimizer_for(class_data, parameters)
    take_steps(optimizer, parameters, 1)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    assert optimizer.teacher[0].dtype == torch.float32
    optimizer.teacher[0].zero_()
    assert state["mbpp"]["teacher"][0].abs().sum() > 0


# --- the seam ----------------------------------------------------------------------------------------


def test_before_the_first_update_the_teacher_is_the_weights(class_data: Path) -> None:
    cfg, task, model, criterion = build(command(class_data, *NO_DROPOUT))
    criterion.link.connect(optim.build_optimizer(cfg.optimizer, list(model.parameters())))
    weights = criterion.link.weights(model)
    assert {n for n, _ in model.named_parameters()} == set(weights)
    assert all(not weight.requires_grad for weight in weights.values())
    _, _, log = criterion(model.train(), batch(task, 4))
    assert log["bregman_loss"] == 0


@pytest.mark.parametrize(
    "precision",
    [[], ["--fp16", "--fp16-no-flatten-grads"], ["--memory-efficient-fp16", "--fp16"]],
    ids=["fp32", "fp16", "memory-efficient-fp16"],
)
def test_the_teacher_by_name_in_every_precision(precision: list[str], class_data: Path) -> None:
    """Names fit tensors, in the model's precision, through fairseq's wrappers; a frozen parameter stays out."""
    cfg, _, model, _ = build(command(class_data, *precision, "--mbpp-momentum", "0.5", "--mbpp-warmup-ratio", "0"))
    if precision:
        model.half()
    model.encoder.lm_head.bias.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    if "--memory-efficient-fp16" in precision:
        optimizer = optim.MemoryEfficientFP16Optimizer.build_optimizer(cfg, trained)
    elif precision:
        optimizer = optim.FP16Optimizer.build_optimizer(cfg, trained)
    else:
        optimizer = optim.build_optimizer(cfg.optimizer, trained)
    start = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    def update() -> None:
        optimizer.zero_grad()
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        optimizer._needs_sync = True
        optimizer.step()

    update()
    link = TrainingLink()
    link.connect(optimizer)
    weights = link.weights(model)
    assert set(weights) == set(start) - {"encoder.lm_head.bias"}
    for name, parameter in model.named_parameters():
        if name in weights:
            assert weights[name].dtype == parameter.dtype
            assert_close(
                weights[name], (start[name] + parameter.detach().float()) / 2, atol=2e-3 if precision else 1e-6
            )
    assert link.weights(model) is weights, "a copy in the model's precision is made once per update"
    places = [weight.data_ptr() for weight in weights.values()]
    update()
    moved = link.weights(model)
    assert moved is not weights
    mbpp = getattr(optimizer, "fp32_optimizer", getattr(optimizer, "wrapped_optimizer", optimizer))
    for weight, average in zip(moved.values(), mbpp.teacher):
        assert_equal(weight, average.to(weight.dtype))
    assert [weight.data_ptr() for weight in moved.values()] == places, "into the same memory"


def test_amp_unscales_once_and_keeps_the_teacher(class_data: Path) -> None:
    """fairseq's AMPOptimizer, its scaler on the CPU: the step gets the loss's own gradient, none after an overflow."""
    flags, given = ["--amp", "--fp16-init-scale", "128", "--optimizer", "mbpp"], torch.tensor([1.0, 2.0, 3.0])

    def build_one(weight: torch.nn.Parameter) -> optim.AMPOptimizer:
        optimizer = optim.AMPOptimizer.build_optimizer(parse(command(class_data, *flags)), [weight])
        optimizer._grad_scaler = torch.amp.GradScaler("cpu", init_scale=128)
        return optimizer

    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = build_one(weight)
    optimizer.backward((weight * given).sum())
    assert_equal(weight.grad, 128 * given)
    assert float(optimizer.clip_grad_norm(0.0)) == pytest.approx(14**0.5)
    optimizer.step()
    assert_equal(weight.grad, given)
    after = weight.detach().clone()
    assert optimizer.fp32_optimizer.updates == 1 and bool((after < 1).all())

    optimizer.zero_grad()
    optimizer.backward((weight * torch.inf).sum())
    optimizer.clip_grad_norm(0.0)
    optimizer.step()
    assert_equal(weight.detach(), after)
    assert optimizer.fp32_optimizer.updates == 1 and optimizer.scaler.get_scale() == 64

    other = build_one(torch.nn.Parameter(after))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.fp32_optimizer.updates == 1
    assert_equal(other.fp32_optimizer.teacher[0], optimizer.fp32_optimizer.teacher[0])
    assert not torch.equal(other.fp32_optimizer.teacher[0], after)


def test_one_flat_tensor_is_cut_in_the_order_of_the_parameters(class_data: Path) -> None:
    """As with --fp16 on a GPU, where FP16Optimizer hands over a single tensor."""
    cfg, _, model, _ = build(command(class_data, "--mbpp-momentum", "1"))
    parameters = list(model.parameters())
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    flat.grad = torch.ones_like(flat)

    class Flat:
        fp16_params = parameters
        fp32_optimizer = optim.build_optimizer(cfg.optimizer, [flat])

    Flat.fp32_optimizer.step()
    link = TrainingLink()
    link.connect(Flat())
    for name, parameter in model.named_parameters():
        assert_equal(link.weights(model)[name], parameter.detach())


def test_another_models_optimizer_is_refused(class_data: Path) -> None:
    parameters = some_parameters()
    optimizer = optimizer_for(class_data, parameters)
    take_steps(optimizer, parameters, 1)
    _, _, model, _ = build(command(class_data))
    link = TrainingLink()
    link.connect(optimizer)
    with pytest.raises(RuntimeError, match="not this model's"):
        link.weights(model)


def test_a_criterion_that_never_met_an_optimizer_says_so(class_data: Path) -> None:
    _, task, model, criterion = build(command(class_data))
    with pytest.raises(RuntimeError, match="needs --optimizer mbpp"):
        criterion(model.train(), batch(task, 2))


def test_two_runs_in_one_process_keep_their_teachers_apart(class_data: Path) -> None:
    """The link hears the optimizer of its own task's step, whichever was built last."""
    runs = []
    for _ in range(2):
        cfg, task, model, criterion = build(command(class_data, *NO_DROPOUT, "--mbpp-momentum", "1"))
        runs.append((task, model, criterion, optim.build_optimizer(cfg.optimizer, list(model.parameters()))))
    for task, model, criterion, optimizer in runs:
        task.train_step(batch(task, 4), model, criterion, optimizer, 0)
        optimizer.step()
    for _, model, criterion, optimizer in runs:
        held = criterion.link.weights(model)
        for (name, _), average in zip(model.named_parameters(), optimizer.teacher):
            assert held[name].data_ptr() == average.data_ptr()
