"""Several backward passes over a batch: the seam in training/link.py, with the criterion of k_passes.py."""

import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq import optim
from fairseq.distributed import LegacyDistributedDataParallel
from fairseq.optim.fp16_optimizer import FP16Optimizer
from k_passes import L2, NAME, KPassesSentencePrediction
from toolkit import NO_DROPOUT, ROOT, assert_close, assert_close_states, assert_equal, batch, build, command, train

from smart_fairseq.method.adversary import normalize
from smart_fairseq.training.link import TrainingLink

sys.path.insert(0, str(ROOT / "benchmarks"))
from peak_memory import PeakMemory

START = ["--smart-noise-std", "1e-2", "--smart-step-size", "0.1"]
HALF = ["--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", "128"]


class Parts(SimpleNamespace):
    """Task, model in training mode, criterion and optimizer."""

    task: Any
    model: Any
    criterion: Any
    optimizer: Any

    def step(self, sample: Any, **more: Any) -> Any:
        """The task's train_step, as fairseq's trainer calls it."""
        torch.manual_seed(3)
        arguments = dict(model=self.model, criterion=self.criterion, optimizer=self.optimizer, update_num=0)
        return self.task.train_step(sample=sample, **{**arguments, **more})

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


def set_up(data: Path, *flags: str, optimizer: str = "adam") -> Parts:
    cfg, task, model, criterion = build(command(data, *flags, criterion=NAME, optimizer=optimizer))
    torch.nn.init.normal_(model.classification_heads["sentence_classification_head"].out_proj.weight, std=1.0)
    if cfg.common.fp16:
        model.half()
        # what an update starts from, in either precision, is what half precision holds
        built: Any = FP16Optimizer.build_optimizer(cfg, list(model.parameters()))
    else:
        built = optim.build_optimizer(cfg.optimizer, list(model.parameters()))
    built.zero_grad()
    return Parts(task=task, model=model.train(), criterion=criterion.train(), optimizer=built)


def run(data: Path, folder: Path, *flags: str, criterion: str = NAME, **options: Any) -> tuple[Any, Any]:
    """Log lines of fairseq-train, and its last checkpoint."""
    log = train(command(data, *flags, criterion=criterion, save_dir=folder, **options))
    return log, torch.load(folder / "checkpoint_last.pt")


# --- what it equals -------------------------------------------------------------------------------


def test_one_pass_from_zero_is_sentence_prediction(class_data: Path, tmp_path: Path) -> None:
    """Update by update, bit for bit, dropout on."""
    logs, states = zip(
        run(class_data, tmp_path / "plain", criterion="sentence_prediction", optimizer="adam"),
        run(class_data, tmp_path / "passes", "--test-passes", "1", "--smart-noise-std", "0", optimizer="adam"),
    )
    assert len(logs[0]["train_inner"]) == 6
    same = ("num_updates", "loss", "nll_loss", "accuracy", "gnorm")
    for plain, ours in zip(*(log["train_inner"] for log in logs)):
        assert {key: ours[key] for key in same} == {key: plain[key] for key in same}
    for name, weight in states[0]["model"].items():
        assert_equal(states[1]["model"][name], weight)


def test_gradients_are_the_mean_of_the_passes(class_data: Path) -> None:
    """Two passes, each by an autograd of its own; the second where the first one's gradient leads."""
    parts = set_up(class_data, *START)
    sample = batch(parts.task, 6)
    parts.step(sample)
    found, (first, second) = parts.gradients(), parts.criterion.perturbations

    def by_autograd(perturbation: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        leaf = perturbation.detach().requires_grad_()
        parts.criterion.perturbations = [leaf]
        torch.manual_seed(3)  # the same dropout masks in each pass
        loss, _, _ = parts.criterion.forward(parts.model, sample)
        parameters = dict(parts.model.named_parameters())
        *gradients, ascent = torch.autograd.grad(loss, [*parameters.values(), leaf], allow_unused=True)
        return {name: g for name, g in zip(parameters, gradients) if g is not None}, ascent

    one, ascent = by_autograd(first)
    mask = parts.criterion.encoder_for(parts.model).mask(sample["net_input"]["src_tokens"])
    assert_close(second, first + 0.1 * normalize(ascent * mask, L2))
    assert float((second - first).detach().norm()) > 0.1
    two, _ = by_autograd(second)
    assert found.keys() == one.keys() == two.keys() and len(found) > 30
    for name, gradient in found.items():
        assert_close(gradient, (one[name] + two[name]) / 2)
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_update_freq_2_with_batch_4_equals_batch_8(class_data: Path, tmp_path: Path) -> None:
    """Through fairseq-train, three updates: weights and teacher to 1e-6."""
    # sgd, because adam turns a gradient of rounding into a whole step
    flags = [*NO_DROPOUT, *START, "--curriculum", "9", "--mbpp-base", "sgd", "--lr", "0.1"]
    flags += ["--required-batch-size-multiple", "1", "--mbpp-warmup-momentum", "0.5", "--mbpp-warmup-ratio", "1"]
    states = []
    for size, frequency in (("8", "1"), ("4", "2")):
        more = ["--batch-size", size, "--update-freq", frequency]
        log, state = run(class_data, tmp_path / size, *flags, *more, max_update=3)
        assert len(log["train_inner"]) == 3 and log["train_inner"][2]["bregman_loss"] > 1e-6
        states.append(state)
    assert_close_states(states[1], states[0])


# --- what it costs --------------------------------------------------------------------------------


def test_memory_is_that_of_one_pass(class_data: Path) -> None:
    """No two graphs at once: K = 3 holds at most 1.1 times what K = 1 holds."""
    deep = ["--encoder-layers", "8", "--encoder-embed-dim", "64", "--encoder-ffn-embed-dim", "256"]
    peaks = []
    for passes in ("1", "3"):
        parts = set_up(class_data, *deep, *START, "--test-passes", passes)
        sample = batch(parts.task, 24)
        parts.step(sample)
        with PeakMemory() as memory:
            parts.step(sample)  # into the gradients that are there
        peaks.append(memory.peak)
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize("passes", [1, 3])
def test_one_update_of_the_teacher_and_evaluation_by_one_forward(passes: int, class_data: Path, tmp_path: Path) -> None:
    flags = [*START, "--test-passes", str(passes), "--mbpp-warmup-ratio", "0"]
    _, state = run(class_data, tmp_path, *flags, max_update=4)
    assert state["last_optimizer_state"]["mbpp"]["updates"] == 4
    parts = set_up(class_data, *flags, optimizer="mbpp")
    forwards: list[int] = []
    parts.model.encoder.sentence_encoder.layers[0].register_forward_hook(lambda *_: forwards.append(1))
    sample = batch(parts.task, 4)
    with torch.no_grad():
        parts.task.valid_step(sample, parts.model, parts.criterion)
    assert len(forwards) == 1
    parts.step(sample)
    assert len(forwards) == 1 + 2 * passes  # the model's and the teacher's


# --- what fairseq makes of the loss -----------------------------------------------------------------


def test_a_dummy_batch_gives_no_gradient(class_data: Path) -> None:
    parts = set_up(class_data, *START, "--test-passes", "3")
    parts.step(batch(parts.task, 4), ignore_grad=True)
    assert len(parts.criterion.perturbations) == 3
    assert all(not leaf.grad.any() for leaf in parts.criterion.perturbations)
    gradients = parts.gradients()
    assert len(gradients) > 30 and not any(gradient.any() for gradient in gradients.values())


def test_float16_with_loss_scaling_agrees_with_float32(class_data: Path) -> None:
    """Directions of the ascent and the gradients that the update takes."""
    perturbations, updates = [], []
    for flags in ([], HALF):
        parts = set_up(class_data, *NO_DROPOUT, *START, *flags, "--test-passes", "3")
        parts.step(batch(parts.task, 8))
        perturbations.append([leaf.detach().float() for leaf in parts.criterion.perturbations])
        parts.optimizer.multiply_grads(1 / 8)
        parts.optimizer.clip_grad_norm(0)
        if flags:
            parts.optimizer._unscale_grads()
        wide = parts.optimizer.fp32_params if flags else list(parts.model.parameters())
        updates.append(torch.cat([p.grad.flatten() for p in wide if p.grad is not None and p.grad.any()]))
    start, *later = zip(*perturbations)
    assert_equal(*start)
    for exact, ours in later:
        steps = (exact - start[0]).flatten(1), (ours - start[0]).flatten(1)
        assert float(torch.nn.functional.cosine_similarity(*steps).min()) > 0.999
    assert float((updates[1] - updates[0]).norm() / updates[0].norm()) < 1e-2


@pytest.mark.parametrize("number", [1, 2])
def test_an_overflow_in_any_pass_skips_the_update(
    number: int, class_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and teacher stand still; the updates after it are taken."""
    forward, batches, before = KPassesSentencePrediction.forward, [], []

    def overflowing(self: Any, model: Any, sample: Any, reduce: bool = True) -> Any:
        loss, size, log = forward(self, model, sample, reduce)
        if len(self.perturbations) == 1:
            batches.append(1)
            teacher = self.link.weights(model)
            before.append([*(p.detach().clone() for p in model.parameters()), *(t.clone() for t in teacher.values())])
        return loss * (1e6 if len(batches) == 3 and len(self.perturbations) == number else 1), size, log

    monkeypatch.setattr(KPassesSentencePrediction, "forward", overflowing)
    # fairseq's handler of overflow moves a zero to the GPU, also with --cpu
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    flags = [*START, *HALF, "--lr", "0.1", "--mbpp-momentum", "0.5", "--mbpp-warmup-ratio", "0"]
    log, state = run(class_data, tmp_path, *flags, max_update=4)
    assert sum("gradient overflow detected" in line for line in log["text"]) == 1
    assert len(batches) == 5 and state["last_optimizer_state"]["mbpp"]["updates"] == 4
    stood_still = [all(torch.equal(*pair) for pair in zip(*states)) for states in pairwise(before)]
    assert stood_still == [False, False, True, False]


# --- what may go wrong ------------------------------------------------------------------------------


def test_out_of_memory_in_a_pass_skips_the_update(
    class_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fairseq's trainer clears the gradients of the passes before, and goes on."""
    passes, batches, closed = KPassesSentencePrediction.passes, [], []

    def running_out(self: Any, model: Any, sample: Any) -> Any:
        batches.append(1)
        try:
            for result in passes(self, model, sample):
                if len(batches) == 2 and len(self.perturbations) == 2:
                    result[0].register_hook(fail)  # in the second pass's backward
                yield result
        finally:
            closed.append(len(self.perturbations))

    def fail(gradient: torch.Tensor) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(KPassesSentencePrediction, "passes", running_out)
    log, state = run(class_data, tmp_path, *START, "--test-passes", "3", max_update=3)
    assert len(batches) == 4 and state["last_optimizer_state"]["mbpp"]["updates"] == 3
    assert closed == [3, 2, 3, 3]
    assert any("attempting to recover from OOM" in line for line in log["text"])


class Wrapped(torch.nn.Module):
    """legacy_ddp as far as no_sync goes."""

    no_sync = LegacyDistributedDataParallel.no_sync

    def __init__(self) -> None:
        super().__init__()
        self.accumulate_grads = False


class Scripted:
    """A criterion whose passes do as they are told."""

    def __init__(self, *results: Any, num_passes: int = 2) -> None:
        self.results, self.num_passes, self.name = results, num_passes, "scripted"

    def passes(self, model: Any, sample: Any) -> Any:
        yield from self.results


def link(train_step: Any) -> Any:
    """A task's train_step, listened to."""
    task = SimpleNamespace(train_step=train_step, begin_epoch=lambda epoch, model: None)
    TrainingLink().listen(task)
    return task.train_step


def call(train_step: Any, criterion: Any, model: Any = None) -> Any:
    return train_step(sample={}, model=model, criterion=criterion, optimizer=None, update_num=0, ignore_grad=False)


def test_only_the_last_pass_synchronises() -> None:
    model, seen = Wrapped(), []

    def train_step(sample: Any, model: Any, criterion: Any, **_: Any) -> Any:
        seen.append(model.accumulate_grads)
        return criterion(model, sample)

    assert call(link(train_step), Scripted(1, 2, 3, num_passes=3), model) == 3
    assert seen == [True, True, False] and not model.accumulate_grads
    # within fairseq's own, for a batch that is not the last of an update
    with model.no_sync():
        call(link(train_step), Scripted(1, 2), model)
    assert seen[3:] == [True, True] and not model.accumulate_grads


def test_after_an_exception_workers_synchronise_again() -> None:
    """The no_sync of legacy_ddp is not restored by itself."""
    model = Wrapped()

    def train_step(**_: Any) -> Any:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        call(link(train_step), Scripted(1, 2), model)
    assert not model.accumulate_grads


def test_a_task_of_ones_own() -> None:
    """Its train_step may take arguments as it likes, look at the criterion and hand it another sample."""
    seen = []

    class Noting(Scripted):
        def passes(self, model: Any, sample: Any) -> Any:
            seen.append((model, sample))
            yield from self.results

    def train_step(sample: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        criterion = args[0] if args else kwargs["criterion"]
        return criterion(model, {"own": criterion.name})

    linked = link(train_step)
    assert call(linked, Noting("first", "second")) == "second"
    # fairseq's trainer looks for the source of a gradient that is not finite by such a call
    assert linked({}, None, Noting("first", "second"), None, 0, ignore_grad=False) == "second"
    assert seen == [(None, {"own": "scripted"})] * 2


@pytest.mark.parametrize(
    ("criterion", "calls", "message"),
    [
        (Scripted(1, 2, 3, 4), 2, "whose train_step calls the criterion once"),
        (Scripted(1, 2), 0, "whose train_step calls the criterion once"),
        (Scripted(1), 1, "Scripted.passes ended before pass 2"),
    ],
)
def test_passes_that_do_not_come_out_even_are_errors(criterion: Any, calls: int, message: str) -> None:
    def train_step(sample: Any, model: Any, criterion: Any, **_: Any) -> Any:
        return [criterion(model, sample) for _ in range(calls)]

    with pytest.raises(RuntimeError, match=message):
        call(link(train_step), criterion)


def test_autocast_is_around_every_pass() -> None:
    """It is entered by the task's train_step, within which a pass runs; a backward runs outside."""
    seen = []

    class Looking(Scripted):
        def passes(self, model: Any, sample: Any) -> Any:
            for result in self.results:
                seen.append(torch.is_autocast_enabled("cpu"))
                yield result

    def train_step(sample: Any, model: Any, criterion: Any, **_: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = criterion(model, sample)
        seen.append(torch.is_autocast_enabled("cpu"))
        return result

    call(link(train_step), Looking(1, 2))
    assert seen == [True, False, True, False]
