"""`make demo`: fine-tune a pretrained encoder with fairseq-train, without SMART and with SMART + MBPP; print both.

    python examples/demo/run.py                                 a task of our own, generated here
    python examples/demo/run.py --task RTE --glue glue_data     a task of GLUE, from its official files

All that is written stays in .demo/. The encoder is fetched and imported once; every call trains anew.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# a remark on tensorboardX, which nothing here uses
logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)

import encoder  # noqa: E402
import generate  # noqa: E402

from smart_fairseq.commands import preprocess  # noqa: E402
from smart_fairseq.commands.options import whole_number  # noqa: E402
from smart_fairseq.commands.run import run as run_command  # noqa: E402
from smart_fairseq.data.bpe import find_bpe  # noqa: E402
from smart_fairseq.data.readers import read_task  # noqa: E402
from smart_fairseq.data.tasks import GLUE, TASKS, Task  # noqa: E402
from smart_fairseq.errors import UsageError  # noqa: E402
from smart_fairseq.study import recipe, report  # noqa: E402
from smart_fairseq.study.runs import Result, Run, TrainingFailed, minutes, run_all  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TRAIN_ROWS, VALID_ROWS, DATA_SEED = 408, 408, 1
MAX_TOKENS = 128
OWN_EPOCHS, GLUE_EPOCHS = 5, 3
OWN_SEEDS, GLUE_SEEDS = 2, 1
METHODS = {"plain": "without SMART", "smart": "SMART + MBPP"}
COST = {"plain": 1.0, "smart": 3.0}  # of an update, until both have been measured

OWN_TASK = dataclasses.replace(
    TASKS["RTE"],
    name="generated",
    folders=("generated",),
    splits={split: TASKS["RTE"].splits[split] for split in ("train", "valid")},
    rows={},
)


def options_from(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked. Raises `UsageError`."""
    parser = argparse.ArgumentParser(prog="demo", description="fine-tuning without SMART and with SMART + MBPP")
    parser.add_argument("--task", default="", help="a task of GLUE; default: one that is generated")
    parser.add_argument("--glue", default="", help="the folder of GLUE's official files")
    parser.add_argument("--updates", default="", help="updates of each run; default: by epochs (5, with GLUE 3)")
    parser.add_argument("--seeds", default="", help="how many seeds, from 1 (default: 2, with GLUE 1)")
    parser.add_argument("--out", type=Path, default=ROOT / ".demo", help=argparse.SUPPRESS)
    parser.add_argument("--encoder", type=Path, help="an imported encoder (import_hf) instead of the one fetched")
    options = parser.parse_args(argv)
    names = {name.lower(): name for name in GLUE if name != "AX"}
    if bool(options.task) != bool(options.glue):
        raise UsageError("TASK and GLUE belong together, as in: make demo TASK=RTE GLUE=path/to/glue_data")
    if options.task and options.task.lower() not in names:
        raise UsageError(f"TASK is {options.task}; it must be one of {', '.join(names.values())}")
    if options.encoder and not (options.encoder / "model.pt").is_file():
        raise UsageError(f"--encoder is {options.encoder}; it must be a folder that import_hf wrote, with a model.pt")
    options.task = names.get(options.task.lower(), "")
    options.updates = whole_number("UPDATES", options.updates, 1) if options.updates else None
    default_seeds = GLUE_SEEDS if options.task else OWN_SEEDS
    options.seeds = whole_number("SEEDS", options.seeds, 1) if options.seeds else default_seeds
    return options


def prepare_data(options: argparse.Namespace, imported: Path) -> tuple[Task, Path, int]:
    """The task, its data folder for fairseq, the number of training rows."""
    if options.task:
        task, source = TASKS[options.task], Path(options.glue)
    else:
        task, source = OWN_TASK, options.out / "tasks"
        generate.write_task(source / "generated", train=TRAIN_ROWS, valid=VALID_ROWS, seed=DATA_SEED)
    rows, reports = read_task(task, source, skip_bad_rows=bool(options.task))
    rows = {split: rows[split] for split in rows if not split.startswith("test")}
    if not {"train", "valid"} <= set(rows):
        found = ", ".join(rows)
        raise UsageError(f"GLUE is {options.glue}: {task.name} needs train and valid files, and it holds {found}")
    target = options.out / "data" / f"{task.name}-bin"
    settings = argparse.Namespace(workers=1, max_tokens=MAX_TOKENS, subsample=None, seed=1)
    # its closing line shows a command without the encoder and the plugin; ours is printed at the end
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        preprocess.process(preprocess.Data(task, rows, reports), target, find_bpe(None, imported), settings)
    for split in rows:
        left_out = sum(reports[split].left_out.values())
        note = f", {left_out} left out as not in order" if left_out else ""
        print(f"data: {task.name} {split}, {len(rows[split])} rows{note}", flush=True)
    return task, target, len(rows["train"])


def plan(options: argparse.Namespace, imported: Path) -> tuple[Task, list[Run]]:
    """Prepare the data; the runs of both methods with the same seeds."""
    task, data, train_rows = prepare_data(options, imported)
    per_epoch = -(-train_rows // recipe.BATCH)
    updates = options.updates or per_epoch * (GLUE_EPOCHS if options.task else OWN_EPOCHS)
    runs = []
    # the longest first, so that no core waits at the end
    for method in reversed(METHODS):
        for seed in range(1, options.seeds + 1):
            name = f"{task.name}-{method}-seed{seed}"
            flags = recipe.flags(task, data, imported, method, seed, updates)
            runs.append(Run(name, method, seed, flags, options.out, updates, COST[method]))
    return task, runs


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train(runs: Sequence[Run]) -> list[Result]:
    """Remove what an earlier call trained under these names, and train; two at a time where there are two cores."""
    for run in runs:
        shutil.rmtree(run.save_dir, ignore_errors=True)
    # two trainings with one thread each use two cores better than two threads of one training
    jobs = min(2, cores())
    threads = max(1, min(8, cores() // jobs))
    print(
        f"training: {len(runs)} runs of {runs[0].updates} updates, {jobs} at a time with {threads} thread(s) each; "
        "how long it will take is shown after a few updates",
        flush=True,
    )
    return run_all(runs, jobs, threads)


def show(options: argparse.Namespace, task: Task, results: Sequence[Result]) -> None:
    """The table, what it shows, and where everything is."""
    print("\n" + report.laid_out(report.rows(results, task.metrics, METHODS)))
    print("\nMeans over the seeds, ± their standard deviation; each term at the first update -> over the last tenth.")
    print(f"{METHODS['smart']} used {' '.join(recipe.SMART)}")
    print("(the paper's --smart-epsilon is 1e-5, whose smart_loss is too small to act here)\n")
    print(report.in_words(results, task.metrics[0], METHODS))
    where = os.path.relpath(options.out)
    print(f"Checkpoints are in {where}/checkpoints, whole logs in {where}/logs. The first run's command:")
    print(shlex.join(["fairseq-train", *results[0].run.arguments]))


def demo(argv: Sequence[str] | None) -> None:
    """The whole demo. Raises `UsageError` or `TrainingFailed`."""
    options = options_from(argv)
    options.out = options.out.resolve()
    began = time.monotonic()
    imported = options.encoder or encoder.prepare(options.out / "encoder")
    fetched = time.monotonic()
    task, runs = plan(options, imported)
    prepared = time.monotonic()
    results = train(runs)
    trained = time.monotonic()
    show(options, task, results)
    times = {"encoder": fetched - began, "data": prepared - fetched, "training": trained - prepared}
    print("Time: " + ", ".join(f"{phase} {minutes(spent)}" for phase, spent in times.items()))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    try:
        return run_command("demo", demo, argv)
    except TrainingFailed as error:
        print("\n".join(error.tail), file=sys.stderr)
        print(f"demo: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
