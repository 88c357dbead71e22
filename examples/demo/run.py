"""`make demo`: fine-tune a pretrained encoder with fairseq-train, without SMART and with SMART + MBPP; compare both.

    python examples/demo/run.py                                 movie sentences, and three other domains to be tried on
    python examples/demo/run.py --task RTE --glue glue_data     a task of GLUE, from its official files

All that is written stays in .demo/. Encoder and sentences are fetched once; every call trains anew.
"""

import argparse
import itertools
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
import heldout  # noqa: E402
import trainings  # noqa: E402

from smart_fairseq.commands import preprocess, ratings  # noqa: E402
from smart_fairseq.commands.options import whole_number  # noqa: E402
from smart_fairseq.commands.run import run as run_command  # noqa: E402
from smart_fairseq.data.readers import read_task  # noqa: E402
from smart_fairseq.data.tasks import GLUE, TASKS, Task  # noqa: E402
from smart_fairseq.errors import UsageError  # noqa: E402
from smart_fairseq.study import recipe  # noqa: E402
from smart_fairseq.study.runs import Result, Run, TrainingFailed, minutes, run_all  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
OWN, OTHERS = "movie", ("product", "news", "tweet")
TRAIN_ROWS, VALID_ROWS = 560, 200
MAX_TOKENS = 128
EPOCHS = {True: 4, False: 3}  # of movie sentences, of a task of GLUE
METHODS = {"plain": "without SMART", "smart": "SMART + MBPP"}
COST = {"plain": 1.0, "smart": 2.2}  # of an update, until both have been measured


def options_from(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked. Raises `UsageError`."""
    parser = argparse.ArgumentParser(prog="demo", description="fine-tuning without SMART and with SMART + MBPP")
    parser.add_argument("--task", default="", help="a task of GLUE; default: the sign of ratings of movie sentences")
    parser.add_argument("--glue", default="", help="the folder of GLUE's official files")
    parser.add_argument("--updates", default="", help="updates of each run; default: by epochs (4, with GLUE 3)")
    parser.add_argument("--seeds", default="1", help="how many seeds, from 1 (%(default)s)")
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
    options.seeds = whole_number("SEEDS", options.seeds, 1)
    return options


def fetch_sentences(folder: Path) -> None:
    """The rated sentences, by the first call alone."""
    if not (folder / ratings.FOLDER).is_dir():
        print(f"data: fetching {ratings.WHAT} ...", flush=True)
        ratings.fetch(folder)


def prepare(task: Task, source: Path, options: argparse.Namespace, imported: Path) -> tuple[Path, int]:
    """A task's data folder for fairseq, and the number of training rows."""
    rows, reports = read_task(task, source, skip_bad_rows=bool(options.task))
    if options.task:  # GLUE's test rows have no labels
        rows = {split: found for split, found in rows.items() if not split.startswith("test")}
        if not {"train", "valid"} <= set(rows):
            found = ", ".join(rows)
            raise UsageError(f"GLUE is {options.glue}: {task.name} needs train and valid files, and it holds {found}")
    else:  # a small task, so that training takes minutes; the test rows are all kept
        for split, most in (("train", TRAIN_ROWS), ("valid", VALID_ROWS)):
            order = preprocess.nested_order(rows[split], seed=1)
            rows[split] = [rows[split][place] for place in order[:most]]
    target = options.out / "data" / f"{task.name}-bin"
    recipe.prepare(preprocess.Data(task, rows, reports), target, imported, MAX_TOKENS)
    used = rows if options.task or task.name == OWN else {"test": rows["test"]}
    print(f"data: {task.name}, {', '.join(f'{split} {len(rows[split])} rows' for split in used)}", flush=True)
    return target, len(rows["train"])


def plan(options: argparse.Namespace, imported: Path) -> tuple[Task, list[Run], dict[str, tuple[Path, str]]]:
    """Prepare the data; the runs of both methods with the same seeds; what is held out, as (folder, split) by name."""
    task, source = TASKS[options.task or OWN], Path(options.glue) if options.task else options.out / "tasks"
    if not options.task:
        fetch_sentences(source)
    data, train_rows = prepare(task, source, options, imported)
    held_out = {task.name: (data, "valid" if options.task else "test")}
    for name in () if options.task else OTHERS:
        held_out[name] = prepare(TASKS[name], source, options, imported)[0], "test"
    updates = options.updates or -(-train_rows // recipe.BATCH) * EPOCHS[not options.task]
    runs = []
    # the longest first, so that no core waits at the end
    for method in reversed(METHODS):
        for seed in range(1, options.seeds + 1):
            flags = recipe.flags(task, data, imported, method, seed, updates)
            runs.append(
                Run(f"{task.name}-{method}-seed{seed}", method, seed, flags, options.out, updates, COST[method])
            )
    return task, runs, held_out


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


def show_training(task: Task, results: Sequence[Result]) -> None:
    """What the logs say."""
    print("\n" + trainings.laid_out(trainings.rows(results, task.metrics, METHODS)))
    print("\nValidation after each epoch; each term at the first update -> over the last tenth.")
    print("Both methods have the same rows, head and order; SMART + MBPP has the default recipes.")
    if len(results) > len(METHODS):
        print(trainings.in_words(results, task.metrics[0], METHODS))
    print()


def demo(argv: Sequence[str] | None) -> None:
    """The whole demo. Raises `UsageError` or `TrainingFailed`."""
    options = options_from(argv)
    options.out = options.out.resolve()
    times = [time.monotonic()]
    imported = options.encoder or encoder.prepare(options.out / "encoder")
    times.append(time.monotonic())
    task, runs, held_out = plan(options, imported)
    times.append(time.monotonic())
    results = train(runs)
    times.append(time.monotonic())
    show_training(task, results)
    # the weights at the end, which no look at the held-out rows has chosen
    last = {r.run.method: r.run.save_dir / "checkpoint_last.pt" for r in reversed(results)}
    found = heldout.evaluate({method: last[method] for method in METHODS}, held_out, min(2, cores()))
    print(heldout.table(found, METHODS))
    picture = heldout.draw(options.out / f"{task.name}.png", results, found, METHODS)
    times.append(time.monotonic())
    print(f"Picture: {os.path.relpath(picture)}")
    where = os.path.relpath(options.out)
    print(f"Checkpoints are in {where}/checkpoints, whole logs in {where}/logs. The first run's command:")
    print(shlex.join(["fairseq-train", *results[0].run.arguments]))
    spent = (minutes(after - before) for before, after in itertools.pairwise(times))
    print("Time: " + ", ".join(map(" ".join, zip(("encoder", "data", "training", "evaluation"), spent))))


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
