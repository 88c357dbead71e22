"""fairseq-train in processes of their own, alone or as workers of one run, and what is to be known of them."""

import json
import logging
import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import trainer
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model
from fairseq_cli import train as fairseq_train
from toolkit import DEVICE, alter_terms, assert_close_states, parse

from smart_fairseq.criterions.smart_sentence_prediction import SmartSentencePredictionCriterion

# processes that fork from one which has imported everything and done nothing: they start at once
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["smart_fairseq", "fairseq_cli.train", "fairseq.tasks.sentence_prediction"])

# several pytest processes never take the same
PORTS = range(10_000 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 16, 32_000, 16)


def free_port() -> int:
    """Below the range from which the system gives a port to those that ask for any."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def in_worker(arguments: Sequence[str], out: str, options: dict[str, Any]) -> None:
    """fairseq-train in a process of its own; the sums of each update over all workers go to the file ``out``.

    With them go the norm of the gradient, and the sum of the absolute values of this worker's weights after the update.

    Options: ``break_at``, an example in whose batch the smoothness term is not a number; ``common``, settings of
    the configuration as fairseq-hydra-train takes them (on the command line fairseq takes --bf16 for --tpu);
    ``prepare``, a function to call first.
    """
    log = os.open(out + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
    torch.set_num_threads(1)
    reduce_and_log = trainer.Trainer._reduce_and_log_stats

    def record(self: Any, logs: list[dict[str, Any]], sample_size: float, grad_norm: Any = None) -> Any:
        if grad_norm is not None:
            sums = {key: float(sum(log[key] for log in logs)) for key in logs[0]}
            weights = sum(float(weight.detach().double().abs().sum()) for weight in self.model.parameters())
            with open(out, "a") as lines:
                print(json.dumps({**sums, "gnorm": float(grad_norm), "weights": weights}), file=lines)
        return reduce_and_log(self, logs, sample_size, grad_norm)

    trainer.Trainer._reduce_and_log_stats = record
    if "break_at" in options:
        break_smoothness(lambda sample: options["break_at"] in sample["id"].tolist())
    if DEVICE == "cpu":
        wrap_on_a_cpu()
    if "prepare" in options:
        options["prepare"]()
    cfg = parse(arguments)
    cfg.common.update(options.get("common", {}))
    try:
        distributed_utils.call_main(cfg, fairseq_train.main)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        sys.stderr.flush()
        os._exit(1)


def wrap_on_a_cpu() -> None:
    """fairseq's pytorch_ddp names a GPU to torch's wrapper, which takes none for a model on a CPU."""
    wrapper = distributed_fairseq_model.DistributedDataParallel

    def wrap(device_ids: Any, output_device: Any, **settings: Any) -> Any:
        return wrapper(**settings)

    distributed_fairseq_model.DistributedDataParallel = wrap


def break_smoothness(when: Callable[[dict[str, Any]], bool]) -> None:
    """Where ``when`` is true of the batch, the smoothness term is not a number."""
    alter_terms(
        SmartSentencePredictionCriterion,
        lambda sample, found: found._replace(value=found.value * float("nan")) if when(sample) else found,
    )


def start(arguments: Sequence[str], out: Path, workers: int = 1, **options: Any) -> list[Any]:
    """Start fairseq-train; the updates go to ``out`` with the worker's number as its suffix, what it prints to .log."""
    port = free_port()
    processes = []
    for rank in range(workers):
        distributed = [
            *("--distributed-backend", "gloo", "--distributed-world-size", str(workers), "--distributed-no-spawn"),
            *("--distributed-init-method", f"tcp://127.0.0.1:{port}", "--distributed-rank", str(rank)),
        ]
        process = FORKS.Process(
            target=in_worker, args=([*arguments, *(distributed if workers > 1 else ())], f"{out}.{rank}", options)
        )
        process.start()
        processes.append(process)
    return processes


def join(processes: Sequence[Any], timeout: float = 240) -> list[int | None]:
    """Wait for processes; their exit codes, None for one that had to be killed after ``timeout`` seconds."""
    limit = time.monotonic() + timeout
    for process in processes:
        process.join(max(0, limit - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def finish(processes: Sequence[Any], out: Path) -> None:
    """Wait for processes that must end well."""
    codes = join(processes)
    logs = "\n".join(path.read_text()[-3000:] for path in sorted(out.parent.glob("*.log")))
    assert codes == [0] * len(processes), logs


def updates(out: Path, rank: int = 0) -> list[dict[str, float]]:
    """The sums of each update so far, as a worker saw them."""
    return [json.loads(line) for line in Path(f"{out}.{rank}").read_text().splitlines()]


def assert_same_run(
    folder: Path,
    names: Sequence[str],
    *,
    count: int,
    tolerance: float = 1e-6,
    terms: Sequence[str] = ("smart",),
    teacher: bool = True,
) -> None:
    """Every logged sum, weights and teacher of the runs ``names`` equal the first's within ``tolerance``.

    Two workers' are the same bit for bit.
    """
    losses = {f"{term}_loss" for term in terms}
    runs = [updates(folder / name) for name in names]
    states = [torch.load(folder / name / "checkpoint_last.pt") for name in names]
    for run, state, name in zip(runs[1:], states[1:], names[1:]):
        assert len(run) == len(runs[0]) == count
        assert updates(folder / name, rank=1) == run
        for ours, one in zip(run, runs[0]):
            assert ours.keys() == one.keys() >= {*losses, "gnorm", *(("bregman_loss",) if teacher else ())}
            for key in one:
                assert ours[key] == pytest.approx(one[key], rel=tolerance * 10, abs=tolerance), key
        assert_close_states(state, states[0], tolerance, teacher)
        for one in (state, states[0]) if teacher else ():
            assert one["last_optimizer_state"]["mbpp"]["updates"] == count
    # the terms are there to be compared
    assert all(runs[0][0][loss] > 1e-4 for loss in losses)
    assert not teacher or runs[0][-1]["bregman_loss"] > 1e-7
