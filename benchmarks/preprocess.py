"""How long official files take to become a data folder: this project beside fairseq's own route, on one machine.

    python benchmarks/preprocess.py --data-dir glue_data --bpe-dir gpt2_bpe [--workers 2] [--repeat 3] [--json FILE]

fairseq's route is what its preprocess_GLUE_tasks.sh calls: multiprocessing_bpe_encoder for each input of each split,
then fairseq-preprocess for each input and the labels, each a program of its own. The columns are cut out beforehand and
not timed. Ours is one call of examples/glue/preprocess.py, start-up included. The two folders are compared byte by
byte.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fairseq  # noqa: E402

from smart_fairseq.data.readers import Row, read_task  # noqa: E402
from smart_fairseq.data.tasks import TASKS, Task  # noqa: E402

ENCODER = Path(fairseq.__file__).parent / "examples" / "roberta" / "multiprocessing_bpe_encoder.py"
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": True}


def write_columns(task: Task, rows: dict[str, list[Row]], folder: Path) -> None:
    """What `cut` makes in the recipe: SPLIT.raw.inputN and SPLIT.label."""
    folder.mkdir(parents=True)
    for split, part in rows.items():
        for place in range(task.texts):
            lines = "".join(row.texts[place] + "\n" for row in part)
            (folder / f"{split}.raw.input{place}").write_text(lines, encoding="utf-8")
        if split in ("train", "valid"):
            (folder / f"{split}.label").write_text("".join(f"{row.label}\n" for row in part))


def fairseqs_route(task: Task, splits: list[str], folder: Path, bpe: Path, out: Path, workers: int) -> float:
    """Seconds for encoding and indexing."""
    start = time.perf_counter()
    names = [f"input{place}" for place in range(task.texts)]
    for split in splits:
        for name in names:
            command = [sys.executable, str(ENCODER), "--keep-empty", "--workers", str(workers)]
            command += ["--encoder-json", str(bpe / "encoder.json"), "--vocab-bpe", str(bpe / "vocab.bpe")]
            command += ["--inputs", str(folder / f"{split}.raw.{name}"), "--outputs", str(folder / f"{split}.{name}")]
            subprocess.run(command, **QUIET)  # type: ignore[call-overload]
    for name in [*names, "label"]:
        command = [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source", "--workers", str(workers)]
        for split in splits:
            if split != "test" or name != "label":
                command += [f"--{split}pref", str(folder / f"{split}.{name}")]
        command += ["--destdir", str(out / name)]
        if name != "label":
            command += ["--srcdict", str(bpe / "dict.txt")]
        if name != "label" or not task.regression:
            subprocess.run(command, **QUIET)  # type: ignore[call-overload]
    if task.regression:
        (out / "label").mkdir()
        for split in ("train", "valid"):
            with open(out / "label" / f"{split}.label", "w") as target:
                subprocess.run(["awk", "{print $1 / 5.0 }", str(folder / f"{split}.label")], stdout=target, check=True)
    return time.perf_counter() - start


def ours(task: Task, data_dir: Path, bpe: Path, out: Path, workers: int) -> float:
    """Seconds for one call of the command."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "examples" / "glue" / "preprocess.py"), "--task", task.name]
    command += ["--data-dir", str(data_dir), "--bpe-dir", str(bpe), "--out", str(out), "--workers", str(workers)]
    subprocess.run(command, **QUIET)  # type: ignore[call-overload]
    return time.perf_counter() - start


def same(first: Path, second: Path) -> bool:
    """Do the folders' inputs and labels hold the same bytes?"""
    names = [path.relative_to(second) for path in second.rglob("*") if path.is_file() and path.name != "preprocess.log"]
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def with_dev_ids(data_dir: Path, scratch: Path) -> Path:
    """MRPC's release without dev_ids.tsv gets a made-up one, so that both routes have a development part."""
    source = data_dir / "MRPC"
    if (source / "dev_ids.tsv").exists() or not (source / "msr_paraphrase_train.txt").exists():
        return data_dir
    target = scratch / "glue" / "MRPC"
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).symlink_to(path.resolve())
    lines = (source / "msr_paraphrase_train.txt").read_text(encoding="utf-8-sig").split("\n")[1:409]
    (target / "dev_ids.tsv").write_text("".join("\t".join(line.split("\t")[1:3]) + "\n" for line in lines))
    return scratch / "glue"


def measure(
    name: str, data_dir: Path, bpe: Path, workers: int, repeat: int
) -> tuple[list[float], list[float], int, bool]:
    """(our seconds, fairseq's seconds, rows, equal) of one task, taken in turns."""
    with tempfile.TemporaryDirectory() as text:
        scratch, task = Path(text), TASKS[name]
        if name == "MRPC":
            data_dir = with_dev_ids(data_dir, scratch)
        rows, _ = read_task(task, data_dir)
        times: tuple[list[float], list[float]] = ([], [])
        equal = True
        for number in range(repeat):
            write_columns(task, rows, scratch / f"columns{number}")
            theirs = scratch / f"fairseq{number}"
            times[1].append(fairseqs_route(task, list(rows), scratch / f"columns{number}", bpe, theirs, workers))
            times[0].append(ours(task, data_dir, bpe, scratch / f"ours{number}", workers))
            equal = equal and same(scratch / f"ours{number}", theirs)
        return times[0], times[1], sum(map(len, rows.values())), equal


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Speed of preprocessing beside fairseq's own route.")
    test_data = os.environ.get("SMART_TEST_DATA")
    parser.add_argument("--data-dir", default=test_data and f"{test_data}/glue_data", required=not test_data)
    parser.add_argument("--bpe-dir", default=test_data and f"{test_data}/gpt2_bpe", required=not test_data)
    parser.add_argument("--tasks", default="RTE,MRPC,STS-B,CoLA")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="medians of so many runs (%(default)s)")
    parser.add_argument("--json", help="write the numbers there")
    options = parser.parse_args()
    results = {}
    print(f"{'task':8} {'rows':>7} {'ours (s)':>9} {'fairseq (s)':>12} {'times':>6}  same bytes")
    for name in options.tasks.split(","):
        mine, theirs, rows, equal = measure(
            name, Path(options.data_dir), Path(options.bpe_dir), options.workers, options.repeat
        )
        middle, middle_theirs = statistics.median(mine), statistics.median(theirs)
        quotient = middle_theirs / middle
        results[name] = {"rows": rows, "ours": mine, "fairseq": theirs, "times": quotient, "same": equal}
        print(
            f"{name:8} {rows:7d} {middle:9.2f} {middle_theirs:12.2f} {quotient:6.1f}  {equal}",
            flush=True,
        )
    if options.json:
        text = json.dumps({"workers": options.workers, "cpus": os.cpu_count(), "tasks": results}, indent=1)
        Path(options.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
