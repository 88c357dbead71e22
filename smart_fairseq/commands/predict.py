"""The command predict: a checkpoint's predictions, in the files that the GLUE server and ANLI take."""

import argparse
import json
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ..data.binarize import read_manifest
from ..data.readers import find_sources, located, shown
from ..data.tasks import GLUE, TASKS, Task
from ..errors import UsageError
from ..files import whole_file
from ..inference import Model, Predictions
from .options import add_model_options, chosen_splits, data_folders, official_folder, whole_number
from .run import run

SUBMISSION_FILES = {file: (name, split) for name in GLUE for split, file in TASKS[name].submission.items()}
# the most frequent label of each training part, and for STS-B its mean score: what `--fill-missing majority` writes
MAJORITY = {
    "CoLA": "1",
    "SST-2": "1",
    "MRPC": "1",
    "STS-B": "2.701",
    "QQP": "0",
    "MNLI": "contradiction",
    "QNLI": "entailment",
    "RTE": "entailment",
    "WNLI": "0",
    "AX": "contradiction",
}
LETTERS = {"entailment": "e", "neutral": "n", "contradiction": "c"}


# Files -------------------------------------------------------------------------------------------------------------


def replace_file(path: Path, text: str) -> None:
    """Write the whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise located(path, 0, f"cannot be written ({error.strerror}); nothing was kept") from None


def server_label(task: Task, label: str) -> str:
    """The label as the GLUE server wants it: STS-B within its range."""
    if task.regression:
        return f"{min(max(float(label), 0.0), task.divisor):.3f}"
    return label


def write_submission(found: Predictions, out: Path) -> Path:
    """The file of one test part, in the order of its index."""
    path = out / found.task.submission[found.split]
    rows = sorted(zip(map(int, found.ids), found.labels))
    official = found.task.rows.get(found.split)
    if len(rows) != official:
        print(f"{path.name}: {len(rows)} rows, and the GLUE server expects {official}; it will refuse the file")
    lines = "".join(f"{number}\t{server_label(found.task, label)}\n" for number, label in rows)
    replace_file(path, "index\tprediction\n" + lines)
    return path


def write_predictions(found: Predictions, out: Path, probabilities: bool = False) -> Path:
    """SPLIT's predictions by id; scores are not clipped, so that they score as fairseq scores them."""
    path = out / f"{found.task.name}.{found.split}.tsv"
    header = ["index", "prediction", *(f"probability of {label}" for label in found.classes if probabilities)]
    lines = ["\t".join(header)]
    for identity, label, scores in zip(found.ids, found.labels, found.scores):
        more = [f"{value:.6g}" for value in scores] if probabilities and found.classes else []
        lines.append("\t".join([identity, label, *more]))
    replace_file(path, "\n".join(lines) + "\n")
    return path


def write_anli(found: Predictions, out: Path, parts: Sequence[tuple[str, int]]) -> list[Path]:
    """A file for each round, with the keys and letters of ANLI's own files."""
    paths, start = [], 0
    for name, rows in parts:
        lines = [
            json.dumps({"uid": identity, "label": LETTERS[label]})
            for identity, label in zip(found.ids[start : start + rows], found.labels[start : start + rows])
        ]
        path = out / f"ANLI-{name}.{found.split}.jsonl"
        replace_file(path, "\n".join(lines) + "\n")
        paths.append(path)
        start += rows
    return paths


def fill_missing(out: Path) -> list[str]:
    """Write the majority baseline for each server file that is not there; their names."""
    missing = [file for file in SUBMISSION_FILES if not (out / file).is_file()]
    for file in missing:
        name, split = SUBMISSION_FILES[file]
        rows = "".join(f"{number}\t{MAJORITY[name]}\n" for number in range(TASKS[name].rows[split]))
        replace_file(out / file, "index\tprediction\n" + rows)
    return missing


def write_zip(out: Path) -> tuple[Path, list[str]]:
    """submission.zip of the server files in ``out``, and the names of those that are not there."""
    path, missing = out / "submission.zip", []
    with whole_file(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in SUBMISSION_FILES:
            if (out / file).is_file():
                archive.write(out / file, file)
            else:
                missing.append(file)
    return path, missing


# Command -----------------------------------------------------------------------------------------------------------


def named_checkpoints(texts: Sequence[str], folders: dict[str, Path]) -> dict[str, Path]:
    """Parse ``TASK=PATH``; without TASK the one task of the data. Raises `UsageError`."""
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or name not in (*TASKS, "ANLI"):
            if len(folders) != 1:
                raise UsageError(
                    f"--checkpoint is {shown(text)}; with {len(folders)} tasks in --data-dir it must be TASK=PATH"
                )
            name, path = next(iter(folders)), text
        if name in found:
            raise UsageError(f"--checkpoint names {name} twice; give one checkpoint for each task")
        found[name] = Path(path)
    return found


def _splits(name: str, folder: Path, options: argparse.Namespace) -> list[str]:
    splits = chosen_splits(folder, options.split, "test")
    if not splits:
        raise located(folder, 0, f"has no test split of {name}; leave the task out, or name another with --split")
    return splits


def predict_task(
    name: str, checkpoint: Path, folder: Path, out: Path, options: argparse.Namespace
) -> list[tuple[str, Path]]:
    """All chosen splits of one task; (split, file) of each file written."""
    splits = _splits(name, folder, options)
    model = Model(checkpoint, folder, options.cpu, options.fp16)
    written: list[tuple[str, Path]] = []
    for split in splits:
        found = model.predict(split, options.max_tokens)
        parts = read_manifest(folder).get("parts", {}).get(split)
        if name.startswith("ANLI") and split != "train":
            parts = parts or [(name[5:], len(found.ids))]
            written += [(split, path) for path in write_anli(found, out, parts)]
        elif split in found.task.submission:
            written.append((split, write_submission(found, out)))
        else:
            written.append((split, write_predictions(found, out, options.probabilities)))
    return written


def _main(argv: Sequence[str] | None, prog: str) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description="Predictions of fine-tuned checkpoints, as files for the GLUE server or by id."
    )
    parser.add_argument("--checkpoint", required=True, nargs="+", action="extend", metavar="[TASK=]PATH")
    parser.add_argument("--out", required=True, help="folder for the files")
    parser.add_argument("--split", help="instead of the test splits; as in valid,valid1")
    parser.add_argument("--probabilities", action="store_true", help="write these too (not in files for the server)")
    parser.add_argument("--fill-missing", choices=["majority"], help="baseline for tasks without a file, for the zip")
    add_model_options(parser)
    options = parser.parse_args(argv)
    options.max_tokens = whole_number("--max-tokens", options.max_tokens, 1)
    data_dir, out = Path(options.data_dir), Path(options.out)
    folders = data_folders(data_dir)
    with tempfile.TemporaryDirectory() as scratch:
        if not folders:
            for text in options.checkpoint:
                name = text.partition("=")[0]
                if name not in TASKS or not find_sources(TASKS[name], data_dir):
                    raise UsageError(
                        f"--data-dir {data_dir} holds no data folder, and no official files for --checkpoint {text}; "
                        "with official files it must be TASK=PATH"
                    )
                folders[name] = official_folder(TASKS[name], "test", Path(scratch) / name, options)
        checkpoints = named_checkpoints(options.checkpoint, folders)
        if "MNLI" in checkpoints and "AX" in folders and options.split is None:
            # the diagnostic set has no training part: GLUE asks for MNLI's model
            checkpoints.setdefault("AX", checkpoints["MNLI"])
        for name in checkpoints:
            if name not in folders:
                raise UsageError(f"--checkpoint names {name}, and --data-dir has {', '.join(folders)}")
            _splits(name, folders[name], options)  # before the first model takes its time
        for name, checkpoint in checkpoints.items():
            for split, path in predict_task(name, checkpoint, folders[name], out, options):
                print(f"wrote {path} ({split})")
    _zip(out, options.fill_missing)


def _zip(out: Path, fill: str | None) -> None:
    if not any((out / file).is_file() for file in SUBMISSION_FILES):
        return
    if fill:
        for file in fill_missing(out):
            print(f"wrote {out / file}: the majority baseline, not a prediction")
    path, missing = write_zip(out)
    note = f"; the server also wants {', '.join(missing)} (--fill-missing majority)" if missing else ""
    print(f"wrote {path}{note}")


def main(argv: Sequence[str] | None = None, prog: str = "predict.py") -> int:
    """The command; its exit status."""
    return run("predict", lambda given: _main(given, prog), argv)
