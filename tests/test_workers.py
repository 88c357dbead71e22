"""Two workers over gloo on the CPU against one worker with the same examples in each update."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence

import pytest
import torch
from toolkit import NO_DROPOUT, ROOT, assert_close, command, write_data

import smart_fairseq  # noqa: F401  allow-lists what checkpoints hold

# fairseq-train with what no flag says; every update's sums over all workers go to a file
DRIVER = """
import json, logging, sys
options = json.loads(sys.argv[1])
sys.path.insert(0, options["tests"])
import torch
from fairseq import trainer
from fairseq.distributed import utils
from fairseq_cli import train
from toolkit import parse
from smart_fairseq.criterions.smart_sentence_prediction import SmartSentencePredictionCriterion as Criterion

torch.set_num_threads(1)
reduce_and_log = trainer.Trainer._reduce_and_log_stats

def record(self, logging_outputs, sample_size, grad_norm=None):
    if grad_norm is not None:
        sums = {key: float(sum(log[key] for log in logging_outputs)) for key in logging_outputs[0]}
        with open(options["out"], "a") as out:
            print(json.dumps({**sums, "gnorm": float(grad_norm)}), file=out)
    return reduce_and_log(self, logging_outputs, sample_size, grad_norm)

trainer.Trainer._reduce_and_log_stats = record

finite_smoothness = Criterion._finite_smoothness

def broken_smoothness(self, forward, sample, clean, masks):
    term, *rest = finite_smoothness(self, forward, sample, clean, masks)
    return (term * float("nan") if options["break_at"] in sample["id"].tolist() else term, *rest)

if options.get("break_at") is not None:
    Criterion._finite_smoothness = broken_smoothness

logging.basicConfig(level=logging.INFO, stream=sys.stderr)
cfg = parse(sys.argv[2:])
cfg.common.bf16 = options.get("bf16", False)  # on the command line fairseq takes --bf16 for --tpu
utils.call_main(cfg, train.main)
"""

BOLD = ["--smart-epsilon", "1e-2", "--smart-step-size", "1e-1", "--smart-noise-std", "1e-3"]
# the same examples in the same order, and an epsilon of Adam's that does not blow rounding up
FIXED = [*NO_DROPOUT, *BOLD, "--curriculum", "9", "--required-batch-size-multiple", "1", "--adam-eps", "1e-4"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(arguments: Sequence[str], out: Path, workers: int = 1, **options: Any) -> List[subprocess.Popen]:
    """Start fairseq-train; the updates' sums go to ``out`` with the worker's number as its suffix."""
    port = free_port()
    processes = []
    for rank in range(workers):
        distributed = [
            *("--distributed-backend", "gloo", "--distributed-world-size", str(workers), "--distributed-no-spawn"),
            *("--distributed-init-method", f"tcp://127.0.0.1:{port}", "--distributed-rank", str(rank)),
        ]
        settings = {"tests": str(ROOT / "tests"), "out": f"{out}.{rank}", **options}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", DRIVER, json.dumps(settings), *arguments, *(distributed if workers > 1 else ())],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        )
    return processes


def finish(processes: Sequence[subprocess.Popen], timeout: float = 240) -> List[str]:
    """Wait for processes that must end well; what they printed."""
    limit = time.monotonic() + timeout
    try:
        outputs = [process.communicate(timeout=max(1, limit - time.monotonic()))[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return outputs


def updates(out: Path, rank: int = 0) -> List[Dict[str, float]]:
    return [json.loads(line) for line in Path(f"{out}.{rank}").read_text().splitlines()]


def assert_same_run(folder: Path, names: Sequence[str], *, count: int, tolerance: float = 1e-6) -> None:
    """Every logged sum, weights and teacher of the runs ``names`` equal the first's within ``tolerance``."""
    runs = [updates(folder / name) for name in names]
    states = [torch.load(folder / name / "checkpoint_last.pt") for name in names]
    for run, state, name in zip(runs[1:], states[1:], names[1:]):
        assert len(run) == len(runs[0]) == count
        assert updates(folder / name, rank=1) == run
        for ours, one in zip(run, runs[0]):
            assert ours.keys() == one.keys() >= {"smart_loss", "smart_delta", "bregman_loss", "gnorm"}
            for key in one:
                assert ours[key] == pytest.approx(one[key], rel=tolerance * 10, abs=tolerance), key
        for key, weight in states[0]["model"].items():
            assert_close(state["model"][key], weight, rtol=0, atol=tolerance)
        teachers = [s["last_optimizer_state"]["mbpp"] for s in (state, states[0])]
        assert teachers[0]["updates"] == teachers[1]["updates"] == count
        for ours, one in zip(*(teacher["teacher"] for teacher in teachers)):
            assert_close(ours, one, rtol=0, atol=tolerance)
    # the terms are there to be compared
    assert runs[0][0]["smart_loss"] > 1e-4 and runs[0][-1]["bregman_loss"] > 1e-7


CASES = {
    "plain": (24, "4", "1", []),
    "tangent": (24, "4", "1", ["--smart-mode", "tangent"]),
    "clean pass without dropout": (24, "4", "1", ["--smart-dropout", "off"]),
    "regression": (24, "4", "1", ["--regression-target", "--num-classes", "1"]),
    "--update-freq": (24, "2", "2", []),
    "uneven last batches": (22, "4", "1", []),
    "a worker with an empty batch": (20, "4", "1", []),
    "an empty batch, --update-freq": (36, "2", "3", []),
}


@pytest.mark.parametrize("case", CASES)
def test_two_workers_equal_one(case: str, tmp_path: Path) -> None:
    """`legacy_ddp`: 2 workers x 4 examples, one x 8; two epochs of three updates."""
    train, size, frequency, flags = CASES[case]
    data = write_data(tmp_path / "data", kind="regression" if case == "regression" else "classes", train=train)
    shared = [*FIXED, *flags, "--mbpp-warmup-ratio", "0.5"]

    def arguments(name: str, *more: str) -> List[str]:
        return command(data, *shared, *more, save_dir=tmp_path / name, max_update=6)

    whole = str(2 * int(size) * int(frequency))
    one = start(arguments("one", "--batch-size", whole), tmp_path / "one")
    two = start(
        arguments("two", "--batch-size", size, "--update-freq", frequency, "--ddp-backend", "legacy_ddp"),
        tmp_path / "two",
        workers=2,
    )
    finish([*one, *two])
    assert_same_run(tmp_path, ["one", "two"], count=6)
