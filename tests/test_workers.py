"""Two workers over gloo on the CPU against one worker with the same examples in each update."""

import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.distributed import ModuleProxyWrapper
from fairseq_cli import train as fairseq_train
from processes import FORKS, assert_same_run, finish, free_port, join, start, updates
from toolkit import FIXED, assert_close, batch, build, command, parse, set_up, slow_but, write_data

from smart_fairseq.encoder import encoder_of
from smart_fairseq.errors import UsageError, explain
from smart_fairseq.terms.precision import FormOfTerm, Search

CASES = {
    "linear search": (24, "4", "1", ["--smart-steps", "2", "--smart-linear-search"]),
    "clean pass without dropout": (24, "4", "1", ["--smart-dropout", "off"]),
    "the clean pass recomputed": (24, "4", "1", ["--smart-recompute"]),
    "regression": (24, "4", "1", ["--regression-target", "--num-classes", "1"]),
    "--update-freq": (24, "2", "2", []),
    "uneven last batches": (22, "4", "1", []),
    "a worker with an empty batch": (20, "4", "1", []),
    "an empty batch, --update-freq": (18, "2", "2", []),
    "no_c10d, its old name": (24, "4", "1", ["--ddp-backend", "no_c10d"]),
}
# fairseq starts torch's wrapper on CUDA alone
DDP = {
    "pytorch_ddp": (24, "4", "1", ["--ddp-backend", "pytorch_ddp", "--find-unused-parameters"]),
    "pytorch_ddp, tangent": (
        24, "4", "1", ["--ddp-backend", "pytorch_ddp", "--find-unused-parameters", "--smart-mode", "tangent"]
    ),
    "pytorch_ddp, --update-freq": (24, "2", "2", ["--ddp-backend", "pytorch_ddp", "--find-unused-parameters"]),
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        *slow_but(["regression", "an empty batch, --update-freq"], CASES),
        *(pytest.param(name, marks=pytest.mark.gpu) for name in DDP),
    ],
)
def test_two_workers_equal_one(case: str, tmp_path: Path) -> None:
    """`legacy_ddp`: 2 workers x 4 examples, one x 8; two epochs of three updates.

    Every criterion as it is: test_every_criterion.py.
    """
    train, size, frequency, flags = {**CASES, **DDP}[case]
    data = write_data(tmp_path / "data", kind="regression" if case == "regression" else "classes", train=train)
    shared = [*FIXED, *flags, "--mbpp-warmup-ratio", "0.5"]

    def arguments(name: str, *more: str) -> list[str]:
        return command(data, *shared, *more, save_dir=tmp_path / name, max_update=6)

    whole = str(2 * int(size) * int(frequency))
    one = start(arguments("one", "--batch-size", whole), tmp_path / "one")
    two = start(arguments("two", "--batch-size", size, "--update-freq", frequency), tmp_path / "two", workers=2)
    finish([*one, *two], tmp_path / "two")
    assert_same_run(tmp_path, ["one", "two"], count=6)


HALF = {
    "fp16-no-flatten-grads": {"fp16": True, "fp16_no_flatten_grads": True},
    "memory-efficient-fp16": {"fp16": True, "memory_efficient_fp16": True},
    "bf16": {"bf16": True},
    "memory-efficient-bf16": {"bf16": True, "memory_efficient_bf16": True},
}
HALF_ON_CUDA = {"fp16": {"fp16": True}, "amp": {"amp": True}}


@pytest.mark.parametrize(
    ("precision", "mode"),
    [
        ("fp16-no-flatten-grads", "finite"),
        pytest.param("bf16", "tangent", marks=pytest.mark.slow),
        *(pytest.param(name, "finite", marks=pytest.mark.slow) for name in HALF if name != "fp16-no-flatten-grads"),
        pytest.param("fp16-no-flatten-grads", "tangent", marks=pytest.mark.slow),
        *(pytest.param(name, mode, marks=pytest.mark.gpu) for name in HALF_ON_CUDA for mode in ("finite", "tangent")),
    ],
)
def test_two_workers_equal_one_in_half_precision(precision: str, mode: str, tmp_path: Path) -> None:
    """Losses, R_s, D_Breg, weights and teacher within 1e-2.

    In finite mode R_s within 0.1: an example whose noise hardly moves the output may go up either way, in one run
    this way and in the other run that way, and at a finite radius the two ways are not equally high.
    """
    data = write_data(tmp_path / "data")
    shared = [*FIXED, "--mbpp-warmup-ratio", "0.5", "--fp16-init-scale", "4", "--smart-mode", mode]
    processes = []
    for name, workers in (("one", 1), ("two", 2)):
        arguments = command(data, *shared, "--batch-size", str(8 // workers), save_dir=tmp_path / name, max_update=6)
        processes += start(arguments, tmp_path / name, workers, common={**HALF, **HALF_ON_CUDA}[precision])
    finish(processes, tmp_path / "two")
    one, two = (updates(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 6 and updates(tmp_path / "two", rank=1) == two
    assert two[0] == pytest.approx(one[0], rel=1e-2, abs=1e-6)
    for ours, theirs in zip(two, one):
        for key in ("task_loss", "loss", "smart_delta"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-2), key
        assert ours["smart_loss"] == pytest.approx(theirs["smart_loss"], rel=0.1 if mode == "finite" else 1e-2)
        # the sum of eight examples, where weights that differ in their last bit are 5e-4 apart
        assert ours["bregman_loss"] == pytest.approx(theirs["bregman_loss"], rel=1e-2, abs=2e-3)
        assert ours["smart_dropped"] == ours["bregman_dropped"] == 0
    assert one[0]["smart_loss"] > 0.1 and one[1]["bregman_loss"] > 5e-3
    states = [torch.load(tmp_path / name / "checkpoint_last.pt") for name in ("one", "two")]
    teachers = [state["last_optimizer_state"]["mbpp"] for state in states]
    assert [teacher["updates"] for teacher in teachers] == [6, 6]
    assert all(average.dtype == torch.float32 for average in teachers[1]["teacher"])
    for parts in ([state["model"].values() for state in states], [teacher["teacher"] for teacher in teachers]):
        first, second = (torch.cat([tensor.double().flatten() for tensor in part]) for part in parts)
        assert float((first - second).norm() / first.norm()) < 1e-2


def test_a_term_dropped_on_one_worker(class_data: Path, tmp_path: Path) -> None:
    """The term of one batch is not finite: it alone is left out, as by one worker that accumulates both batches."""
    runs = [
        start(
            command(class_data, *FIXED, "--update-freq", str(2 // workers), save_dir=tmp_path / name),
            tmp_path / name,
            workers,
            break_at=5,
        )
        for name, workers in (("one", 1), ("two", 2))
    ]
    finish([process for run in runs for process in run], tmp_path / "two")
    assert_same_run(tmp_path, ["one", "two"], count=6)
    # once in each of the two epochs
    assert sorted(update["smart_dropped"] for update in updates(tmp_path / "two")) == [0, 0, 0, 0, 1, 1]


# --- torch's DistributedDataParallel, which fairseq's pytorch_ddp does not get to run on a CPU ---------


WAYS = {
    "two forwards": ([], FormOfTerm.TWO_FORWARDS, Search.CLEAN_PASS),
    "first order": (["--smart-mode", "tangent"], FormOfTerm.FIRST_ORDER, Search.OWN_PASS),
    "recompute": (["--smart-recompute"], FormOfTerm.TWO_FORWARDS, Search.OWN_PASS),
    "linear search": (["--smart-linear-search"], FormOfTerm.TWO_FORWARDS, Search.EVERY_STEP),
}


def prepared(data: Path, way: str, unused: bool) -> Any:
    """Task, model and criterion with a teacher that is not the student."""
    task, model, criterion = set_up(data, *FIXED, *WAYS[way][0], optimizer="mbpp")
    for parameter_name, parameter in model.encoder.lm_head.named_parameters():
        # the LM head plays no part in classification; its weight is the embeddings'
        parameter.requires_grad_(unused or parameter_name == "weight")
    optimizer = criterion.link._optimizer
    trained = list(optimizer.params)
    generator = torch.Generator().manual_seed(2)
    optimizer.teacher = [p.detach() + 0.05 * torch.randn(p.shape, generator=generator).to(p.device) for p in trained]
    optimizer.teacher_version += 1
    return task, model, criterion


def gradients(model: Any, criterion: Any, samples: Sequence[Any], seed: int) -> dict[str, torch.Tensor]:
    """Of the loss over all samples; a distributed wrapper reduces with the last one, as fairseq's trainer does it."""
    model.zero_grad()
    torch.manual_seed(seed)
    for index, sample in enumerate(samples):
        accumulate = hasattr(model, "no_sync") and index < len(samples) - 1
        with model.no_sync() if accumulate else contextlib.nullcontext():
            loss, _, _ = criterion(model, sample)
            loss.backward()
    return {name: p.grad.clone() for name, p in encoder_of(model).model.named_parameters() if p.grad is not None}


def in_ddp(rank: int, port: int, data: Path, way: str, unused: bool, out: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    task, model, criterion = prepared(data, way, unused)
    # as fairseq wraps it
    model = ModuleProxyWrapper(
        torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=unused)
    )
    found = [
        gradients(model, criterion, [batch(task, 4, start=4 * rank)], seed=1),
        gradients(model, criterion, [batch(task, 4, start=8 + 4 * rank), batch(task, 4, start=4 * rank)], seed=2),
        gradients(model, criterion, [batch(task, 4, start=4 * rank)], seed=1),
    ]
    torch.save(found, out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("way", "unused"),
    slow_but([("two forwards", True)], itertools.product(WAYS, [True, False])),
)
def test_torch_ddp(way: str, unused: bool, class_data: Path, tmp_path: Path) -> None:
    """Two workers' gradients, averaged by DDP's reducer, against one with all examples; accumulation in between."""
    port = free_port()
    processes = [FORKS.Process(target=in_ddp, args=(r, port, class_data, way, unused, tmp_path)) for r in (0, 1)]
    for process in processes:
        process.start()
    assert join(processes) == [0, 0]
    task, model, criterion = prepared(class_data, way, unused)
    first, second = batch(task, 8), batch(task, 8, start=8)
    expected = [gradients(model, criterion, samples, seed)
                for samples, seed in (([first], 1), ([second, first], 2), ([first], 1))]  # fmt: skip
    assert criterion.forms[""][:2] == WAYS[way][1:]
    for rank in (0, 1):
        for ours, one in zip(torch.load(tmp_path / f"{rank}.pt"), expected):
            assert ours.keys() >= one.keys()
            for name, gradient in ours.items():
                assert_close(2 * gradient, one.get(name, torch.zeros_like(gradient)), rtol=1e-5, atol=1e-6)


def test_fully_sharded_is_refused(class_data: Path) -> None:
    """With and without fairscale, which fairseq needs for it."""
    arguments = command(class_data, "--ddp-backend", "fully_sharded")
    with pytest.raises(UsageError, match=r"--ddp-backend is fully_sharded; .* legacy_ddp or pytorch_ddp"):
        build(arguments)
    with pytest.raises(Exception) as raised:
        fairseq_train.main(parse(arguments))
    assert explain(raised.value) == (
        "--ddp-backend is fully_sharded; this plugin needs whole weights on each worker: use legacy_ddp or pytorch_ddp"
    )
