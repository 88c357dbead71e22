"""Several backward passes over a batch with two workers, over gloo on the CPU, against one with the whole batch."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from fairseq.distributed import ModuleProxyWrapper
from fairseq.optim import build_optimizer
from k_passes import NAME, registered
from processes import FORKS, assert_same_run, finish, free_port, join, start
from toolkit import FIXED, assert_close, batch, build, command, write_data
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

# with a start and steps as FIXED has them
PASSES = ["--test-passes", "3"]


def test_two_workers_equal_one(tmp_path: Path) -> None:
    """`legacy_ddp` and --update-freq, the last batch empty on one worker; weights, teacher and losses."""
    data = write_data(tmp_path / "data", train=18)
    processes = []
    for name, workers, shape in (
        ("one", 1, ["--batch-size", "8"]),
        ("two", 2, ["--batch-size", "2", "--update-freq", "2"]),
    ):
        flags = [*FIXED, *PASSES, *shape, "--mbpp-warmup-ratio", "0.5"]
        arguments = command(data, *flags, criterion=NAME, save_dir=tmp_path / name, max_update=6)
        processes += start(arguments, tmp_path / name, workers, prepare=registered)
    finish(processes, tmp_path / "two")
    assert_same_run(tmp_path, ["one", "two"], count=6, terms=())


def gradients(data: Path, rank: int | None) -> tuple[list[dict[str, torch.Tensor]], list[int]]:
    """Of an update by one batch and one by two, and how often each synchronised; ``rank`` None: the whole batches."""
    cfg, task, model, criterion = build(command(data, *FIXED, *PASSES, criterion=NAME, optimizer="adam"))
    optimizer = build_optimizer(cfg.optimizer, list(model.parameters()))
    synchronised = [0]
    if rank is not None:
        wrapped: Any = torch.nn.parallel.DistributedDataParallel(
            model, broadcast_buffers=False, find_unused_parameters=True
        )

        def count(state: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
            synchronised[-1] += bucket.is_last()
            return allreduce_hook(state, bucket)

        wrapped.register_comm_hook(None, count)
        model = ModuleProxyWrapper(wrapped)  # as fairseq wraps it
    found = []
    for starts in ([0], [8, 0]):
        optimizer.zero_grad()
        torch.manual_seed(1)
        for index, first in enumerate(starts):
            sample = batch(task, 8, first) if rank is None else batch(task, 4, first + 4 * rank)
            # as fairseq's trainer does it
            more = rank is not None and index < len(starts) - 1
            with model.no_sync() if more else contextlib.nullcontext():
                task.train_step(sample, model, criterion, optimizer, 0)
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        synchronised.append(0)
    return found, synchronised[:-1]


def in_ddp(rank: int, port: int, data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(gradients(data, rank), out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_torch_ddp(class_data: Path, tmp_path: Path) -> None:
    """Two workers' gradients are those of the whole batch, and all passes of an update synchronise once."""
    port = free_port()
    processes = [FORKS.Process(target=in_ddp, args=(rank, port, class_data, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    whole, _ = gradients(class_data, None)
    assert join(processes) == [0, 0]
    for rank in (0, 1):
        found, synchronised = torch.load(tmp_path / f"{rank}.pt")
        assert synchronised == [1, 1]
        for ours, one in zip(found, whole):
            ours = {name.removeprefix("module.module."): gradient for name, gradient in ours.items()}
            assert ours.keys() >= one.keys() and len(one) > 30
            for name, gradient in ours.items():
                assert_close(2 * gradient, one.get(name, torch.zeros_like(gradient)), rtol=1e-5, atol=1e-6)
