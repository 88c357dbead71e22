"""Through what runs meet: overflow, kill -9, files cut short, a full disk, a dead worker, more or fewer workers."""

import functools
import itertools
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.file_io import PathManager
from fairseq.optim import FP16Optimizer
from fairseq.optim.fp16_optimizer import MemoryEfficientFP16Optimizer
from processes import FORKS, break_smoothness, finish, join, start, updates
from toolkit import (
    DEVICE,
    FIXED,
    HALF,
    assert_close_states,
    assert_equal,
    assert_same_state,
    batch,
    build,
    command,
    tensors,
    train,
    write_data,
)

from smart_fairseq.errors import explain


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)


def count(out: Path) -> int:
    """Updates taken so far by the first worker."""
    return len(updates(out)) if Path(f"{out}.0").exists() else 0


# --- overflow --------------------------------------------------------------------------------------


def take_update(optimizer: Any, model: Any, criterion: Any, task: Any) -> None:
    """As fairseq's trainer takes one, on the first batch."""
    optimizer.zero_grad()
    loss, size, _ = criterion(model, batch(task, 4))
    optimizer.backward(loss)
    optimizer.multiply_grads(1 / size)
    optimizer.clip_grad_norm(0.0)
    optimizer.step()


@pytest.mark.parametrize("kind", ["fp16-no-flatten-grads", "memory-efficient-fp16"])
def test_overflow_skips_the_update_and_leaves_the_teacher(kind: str, class_data: Path) -> None:
    """On the optimizer: the gradients overflow under the loss scale, fairseq raises and takes no step."""
    cfg, task, model, criterion = build(command(class_data, "--fp16", f"--{kind}", "--fp16-init-scale", "4", *FIXED))
    model.half().train()
    wrapper = MemoryEfficientFP16Optimizer if kind.startswith("memory") else FP16Optimizer
    optimizer = wrapper.build_optimizer(cfg, [p for p in model.parameters() if p.requires_grad])
    mbpp = optimizer.wrapped_optimizer if kind.startswith("memory") else optimizer.fp32_optimizer
    criterion.link.connect(optimizer)

    def update(scale: float) -> None:
        optimizer.scaler.loss_scale = scale
        take_update(optimizer, model, criterion, task)

    update(4.0)
    before = {name: t.clone() for name, t in tensors([mbpp.teacher, list(model.parameters())]).items()}
    version = mbpp.teacher_version
    with pytest.raises(OverflowError):
        update(2.0**30)
    assert (mbpp.updates, mbpp.teacher_version) == (1, version)
    for name, tensor in tensors([mbpp.teacher, list(model.parameters())]).items():
        assert_equal(tensor, before[name])
    update(4.0)
    assert mbpp.updates == 2
    assert any(not torch.equal(tensor, before[name]) for name, tensor in tensors([mbpp.teacher]).items() if name[:2])


# in the order in which they run, and the terms that each of them spoils
PASSES = {"teacher": ["bregman"], "clean": ["smart", "bregman"], "ascent": ["smart"], "adversarial": ["smart"]}


@pytest.mark.parametrize("where", PASSES)
def test_overflow_in_a_pass(where: str, class_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whichever pass overflows in float16: the update is skipped and the teacher stays.

    The first ascent step has no pass of its own; the second one has.
    """
    flags = [*HALF, "--smart-mode", "finite", "--smart-steps", "2", *FIXED]
    cfg, task, model, criterion = build(command(class_data, *flags))
    model.half().train()
    optimizer = FP16Optimizer.build_optimizer(cfg, [p for p in model.parameters() if p.requires_grad])
    criterion.link.connect(optimizer)
    mbpp = optimizer.fp32_optimizer

    update = functools.partial(take_update, optimizer, model, criterion, task)
    update()
    teacher = [average.clone() for average in mbpp.teacher]
    passes = 0

    def overflow(module: Any, args: Any, output: Any) -> Any:
        nonlocal passes
        passes += 1
        return output * 60_000 * 60_000 if passes == 1 + list(PASSES).index(where) else output

    handle = model.classification_heads["sentence_classification_head"].out_proj.register_forward_hook(overflow)
    with pytest.raises(OverflowError):
        update()
    assert mbpp.updates == 1
    for ours, before in zip(mbpp.teacher, teacher):
        assert_equal(ours, before)
    assert passes == 4
    assert [term for term in ("smart", "bregman") if f"{term}_loss is not finite" in caplog.text] == PASSES[where]
    handle.remove()
    update()
    assert mbpp.updates == 2
    assert all(average.isfinite().all() for average in mbpp.teacher)


def pretend_cuda() -> None:
    """fairseq's handler of overflow moves a zero to the GPU, also with --cpu."""
    if DEVICE == "cpu":
        torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


@pytest.mark.slow
def test_overflow_with_two_workers(class_data: Path, tmp_path: Path) -> None:
    """The first updates overflow: both workers skip them, and go on alike when the loss scale has come down."""
    arguments = command(
        class_data, *FIXED, "--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", str(2**22),
        "--save-interval-updates", "1", save_dir=tmp_path / "run", max_update=3,
    )  # fmt: skip
    finish(start(arguments, tmp_path / "run", workers=2, prepare=pretend_cuda), tmp_path / "run")
    # the second worker logs nothing
    assert "gradient overflow detected" in (tmp_path / "run.0.log").read_text()
    assert updates(tmp_path / "run", rank=0) == updates(tmp_path / "run", rank=1)
    state = torch.load(tmp_path / "run" / "checkpoint_last.pt")
    assert state["last_optimizer_state"]["mbpp"]["updates"] == state["optimizer_history"][-1]["num_updates"] == 3
    assert all(t.isfinite().all() for t in state["last_optimizer_state"]["mbpp"]["teacher"])


def break_smoothness_once() -> None:
    """The third smoothness term of the first worker is not a number, as if its pass had overflowed."""
    pretend_cuda()
    calls = itertools.count(1)
    break_smoothness(lambda _: next(calls) == 3 and torch.distributed.get_rank() == 0)


def test_overflow_in_the_adversarial_pass_of_one_of_two_workers(class_data: Path, tmp_path: Path) -> None:
    """Both skip the update, and the same updates follow on both."""
    arguments = command(
        class_data, *FIXED, *HALF, save_dir=tmp_path / "run",
        max_update=4,
    )  # fmt: skip
    finish(start(arguments, tmp_path / "run", workers=2, prepare=break_smoothness_once), tmp_path / "run")
    text = (tmp_path / "run.0.log").read_text()
    assert "smart_loss is not finite: its pass overflowed in float16, so this update is skipped" in text
    assert text.count("gradient overflow detected") == 1
    first, second = (updates(tmp_path / "run", rank=rank) for rank in (0, 1))
    assert first == second and all(math.isfinite(value) for update in first for value in update.values())
    state = torch.load(tmp_path / "run" / "checkpoint_last.pt")
    # four updates from five batches
    assert state["last_optimizer_state"]["mbpp"]["updates"] == state["optimizer_history"][-1]["num_updates"] == 4
    assert state["extra_state"]["train_iterator"]["iterations_in_epoch"] == 2
    assert all(t.isfinite().all() for t in state["last_optimizer_state"]["mbpp"]["teacher"])


# --- a killed process, files cut short, a full disk ------------------------------------------------


def test_kill_9_and_the_same_command_again(tmp_path: Path) -> None:
    """Ends bit-equal to a run that nobody killed; dropout on."""
    data = write_data(tmp_path / "data", train=64)

    def arguments(name: str) -> list[str]:
        return command(
            data, "--save-interval-updates", "2", "--keep-interval-updates", "1", "--mbpp-warmup-ratio", "0.5",
            save_dir=tmp_path / name, max_update=24,
        )  # fmt: skip

    straight = start(arguments("straight"), tmp_path / "straight")
    (killed,) = start(arguments("killed"), tmp_path / "killed")
    last = tmp_path / "killed" / "checkpoint_last.pt"
    for goal in (5, 11):  # twice, at whatever moment it is
        wait_for(lambda goal=goal: count(tmp_path / "killed") >= goal and last.exists())
        killed.kill()
        killed.join()
        assert killed.exitcode == -9
        kept = torch.load(last)
        assert kept["last_optimizer_state"]["mbpp"]["updates"] == kept["optimizer_history"][-1]["num_updates"] > 0
        (killed,) = start(arguments("killed"), tmp_path / "killed")
    finish([killed, *straight], tmp_path / "killed")
    assert_same_state(last, tmp_path / "straight" / "checkpoint_last.pt")


def test_what_a_cut_write_leaves_behind_is_not_read(class_data: Path, tmp_path: Path) -> None:
    """fairseq writes to checkpoint_last.pt.tmp and renames."""
    train(command(class_data, save_dir=tmp_path, max_update=3))
    whole = (tmp_path / "checkpoint_last.pt").read_bytes()
    for name in ("checkpoint_last.pt", "checkpoint1.pt"):
        (tmp_path / f"{name}.tmp").write_bytes(whole[: len(whole) // 2])
    log = train(command(class_data, save_dir=tmp_path, max_update=4))
    assert [line["num_updates"] for line in log["train_inner"]] == [4]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_checkpoint_is_one_clear_line(share: float, class_data: Path, tmp_path: Path) -> None:
    train(command(class_data, save_dir=tmp_path, max_update=2))
    path = tmp_path / "checkpoint_last.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(Exception) as raised:
        train(command(class_data, save_dir=tmp_path, max_update=3))
    line = explain(raised.value) or ""
    assert str(path) in line and "cut short" in line and "\n" not in line


def small_disk() -> None:
    """No file may grow beyond 80 kB: the log has room, a checkpoint has not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, 80_000))


def copy_on_a_small_disk(source: str, target: str) -> None:
    small_disk()
    PathManager.copy(source, target, overwrite=True)


def test_a_full_disk_keeps_the_previous_checkpoint(class_data: Path, tmp_path: Path) -> None:
    """The run stops with an error; the same command goes on when there is room again."""
    run = tmp_path / "run"
    train(command(class_data, *FIXED, save_dir=run, max_update=3))
    before = (run / "checkpoint_last.pt").read_bytes()
    assert len(before) > 90_000
    arguments = command(class_data, *FIXED, save_dir=run, max_update=6)
    assert join(start(arguments, tmp_path / "full", prepare=small_disk)) == [1]
    log = (tmp_path / "full.0.log").read_text()
    assert "Preparing to save checkpoint" in log and "Error" in log.splitlines()[-1], log
    assert (run / "checkpoint_last.pt").read_bytes() == before
    assert len(train(arguments)["train_inner"]) == 3


def test_a_full_disk_while_copying_to_checkpoint_last(tmp_path: Path) -> None:
    """fairseq alone copies in place, which leaves half a file."""
    source, target = tmp_path / "checkpoint_1_3.pt", tmp_path / "checkpoint_last.pt"
    source.write_bytes(b"new" * 40_000)
    target.write_bytes(b"old" * 40_000)
    process = FORKS.Process(target=copy_on_a_small_disk, args=(str(source), str(target)))
    process.start()
    assert join([process]) == [1]
    assert target.read_bytes() == b"old" * 40_000
    assert PathManager.copy(str(source), str(target), overwrite=True)
    assert target.read_bytes() == b"new" * 40_000
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name, target.name]


# --- workers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dying", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_dying_worker_stops_the_other(dying: int, class_data: Path, tmp_path: Path) -> None:
    """With an error and within a minute, whichever of the two it is; the checkpoint of before loads."""
    arguments = command(
        class_data, *FIXED, "--save-interval-updates", "2", save_dir=tmp_path / "run", max_update=10_000
    )
    workers = start(arguments, tmp_path / "run", workers=2)
    wait_for(lambda: count(tmp_path / "run") >= 4)
    workers[dying].kill()
    codes = join(workers, timeout=60)
    assert codes[dying] == -9 and codes[1 - dying] == 1
    assert "Error" in Path(f"{tmp_path / 'run'}.{1 - dying}.log").read_text()
    assert torch.load(tmp_path / "run" / "checkpoint_last.pt")["last_optimizer_state"]["mbpp"]["updates"] >= 2


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@pytest.mark.slow
def test_another_number_of_workers_keeps_the_teacher(before: int, after: int, class_data: Path, tmp_path: Path) -> None:
    """Three updates with some workers and three with others equal six with one."""

    def run(name: str, workers: int, max_update: int) -> dict[str, Any]:
        # the teacher's momentum must not depend on --max-update, which differs between the two halves
        arguments = command(
            class_data, *FIXED, "--mbpp-warmup-ratio", "0", "--batch-size", str(8 // workers),
            save_dir=tmp_path / name, max_update=max_update,
        )  # fmt: skip
        finish(start(arguments, tmp_path / f"{name}{max_update}", workers), tmp_path / name)
        return torch.load(tmp_path / name / "checkpoint_last.pt")  # type: ignore[no-any-return]

    straight = run("straight", 1, 6)
    assert run("changed", before, 3)["last_optimizer_state"]["mbpp"]["updates"] == 3
    changed = run("changed", after, 6)
    assert changed["last_optimizer_state"]["mbpp"]["updates"] == 6
    assert_close_states(changed, straight)
