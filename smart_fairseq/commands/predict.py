"""The command predict: a checkpoint's predictions, in the files that the GLUE server and ANLI take."""

import argparse
import itertools
import json
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..data.binarize import read_manifest
from ..data.folders import read_ids, task_of
from ..data.lines import located, read_lines, shown
from ..data.readers import find_sources
from ..data.tasks import ANLI, ANLI_JOINED, GLUE, TASKS
from ..errors import UsageError
from ..files import check_file, replace_file, whole_file
from ..inference import Model, Predictions, check_there
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


def _server_file(path: Path, rows: Iterable[tuple[int, str]]) -> Path:
    lines = "".join(f"{number}\t{label}\n" for number, label in rows)
    replace_file(path, "index\tprediction\n" + lines)
    return path


def _check_index(folder: Path, split: str, ids: Sequence[str]) -> None:
    """Raise `UsageError` where the GLUE server's file would need whole numbers, and the ids are others."""
    wrong = [identity for identity in ids if not identity.isdecimal()]
    if wrong and split in task_of(folder).submission:
        what = f"id {shown(wrong[0])} is no whole number, and the GLUE server's index is made of these"
        raise located(folder / "ids" / f"{split}.tsv", f"{what}; preprocess the official file")


def write_submission(found: Predictions, out: Path) -> Path:
    """The file of one test part, in the order of its index; the GLUE server wants STS-B's scores within their range."""
    path = out / found.task.submission[found.split]
    labels: Sequence[str] = found.labels
    if found.task.regression:
        labels = [f"{min(max(float(label), 0.0), found.task.divisor):.3f}" for label in labels]
    official = found.task.rows.get(found.split)
    if len(labels) != official:
        print(f"{path.name}: {len(labels)} rows, and the GLUE server expects {official}; it will refuse the file")
    return _server_file(path, sorted(zip(map(int, found.ids), labels)))


def write_predictions(found: Predictions, out: Path, probabilities: bool = False) -> Path:
    """SPLIT's predictions by id; scores are not clipped, so that they score as fairseq scores them.

    Of a ranking 1 for the pick of each group and 0 for the others, with the group, the rank in it and the score.
    """
    path = out / f"{found.task.name}.{found.split}.tsv"
    classes = found.classes if probabilities else ()
    rows = [["index", "prediction", *(f"probability of {label}" for label in classes)]]
    for identity, label, scores in zip(found.ids, found.labels, found.scores):
        rows.append([identity, label, *(f"{value:.6g}" for value in scores if classes)])
    if found.task.ranking:
        rows[0] += ["group", "rank", "score"]
        for row, (group, rank), score in zip(rows[1:], found.ranks(), found.scores[:, 0]):
            row += [str(group), str(rank), f"{score:.6g}"]
    replace_file(path, "".join("\t".join(row) + "\n" for row in rows))
    return path


def write_anli(found: Predictions, out: Path, parts: Sequence[tuple[str, int]]) -> list[Path]:
    """A file for each round, with the keys and letters of ANLI's own files."""
    lines = (
        json.dumps({"uid": identity, "label": LETTERS[label]}) + "\n"
        for identity, label in zip(found.ids, found.labels)
    )
    paths = [out / f"ANLI-{name}.{found.split}.jsonl" for name, _ in parts]
    for path, (_, rows) in zip(paths, parts):
        replace_file(path, "".join(itertools.islice(lines, rows)))
    return paths


def write_zip(out: Path, fill: bool) -> None:
    """submission.zip of the server's files in ``out``; ``fill``: with baselines for those that are not there."""
    missing = [file for file in SUBMISSION_FILES if not (out / file).is_file()]
    if fill:
        for file in missing:
            name, split = SUBMISSION_FILES[file]
            _server_file(out / file, ((number, MAJORITY[name]) for number in range(TASKS[name].rows[split])))
            print(f"wrote {out / file}: the majority baseline, not a prediction")
        missing = []
    path = out / "submission.zip"
    with whole_file(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in SUBMISSION_FILES:
            if file not in missing:
                archive.write(out / file, file)
    note = f"; the server also wants {', '.join(missing)} (--fill-missing majority)" if missing else ""
    alike = [file for file in SUBMISSION_FILES if file not in missing and _gives_one_answer(out / file)]
    note += f"; one answer for all rows, as of a baseline, is in {', '.join(alike)}" if alike else ""
    print(f"wrote {path}{note}")


def _gives_one_answer(path: Path) -> bool:
    answers = {line.partition("\t")[2] for _, line in itertools.islice(read_lines(path), 1, None)}
    return len(answers) == 1


# Command -----------------------------------------------------------------------------------------------------------


def named_checkpoints(texts: Sequence[str], folders: dict[str, Path]) -> dict[str, Path]:
    """Parse ``TASK=PATH``; without TASK the one task of the data. Raises `UsageError`."""
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or name not in (*TASKS, "ANLI", *folders):
            if equals and Path(name).name == name and not Path(text).exists():
                known = ", ".join(folders)
                raise UsageError(f"--checkpoint names {shown(name)}, which is no task; --data-dir has {known}")
            if len(folders) != 1:
                raise UsageError(
                    f"--checkpoint is {shown(text)}; with {len(folders)} tasks in --data-dir it must be TASK=PATH"
                )
            name, path = next(iter(folders)), text
        if name in found:
            raise UsageError(f"--checkpoint names {name} twice; give one checkpoint for each task")
        found[name] = Path(path)
    return found


def predict_task(name: str, model: Model, split: str, out: Path, options: argparse.Namespace) -> list[Path]:
    """The files that were written for a split of a task."""
    found = model.predict(split, options.max_tokens)
    if name in (*ANLI, ANLI_JOINED.name) and split != "train":
        whole = [(name[5:], len(found.ids))]
        parts = whole if name in ANLI else read_manifest(model.folder).get("parts", {}).get(split)
        if parts:  # which rows that were held out, of all rounds, have not
            return write_anli(found, out, parts)
    if split in found.task.submission:
        return [write_submission(found, out)]
    return [write_predictions(found, out, options.probabilities)]


def _main(argv: Sequence[str] | None, prog: str) -> None:
    about = "Predictions of fine-tuned checkpoints, as files for the GLUE server or by id."
    parser = argparse.ArgumentParser(prog=prog, description=about)
    add = parser.add_argument
    add("--checkpoint", required=True, nargs="+", action="extend", metavar="[TASK=]PATH")
    add("--out", required=True, help="folder for the files")
    add("--split", help="instead of the test splits; as in valid,valid1")
    add("--probabilities", action="store_true", help="write these too (not in files for the server)")
    add("--fill-missing", choices=["majority"], help="baseline for tasks without a file, for the zip")
    add_model_options(parser)
    options = parser.parse_args(argv)
    options.max_tokens = whole_number("--max-tokens", options.max_tokens, 1)
    data_dir, out = Path(options.data_dir), Path(options.out)
    folders = data_folders(data_dir)
    check_file(out / "submission.zip")
    with tempfile.TemporaryDirectory() as scratch:
        for text in options.checkpoint if not folders else ():
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
        splits = {}  # of all tasks, before the first model takes its time
        for name, checkpoint in checkpoints.items():
            check_there(checkpoint)
            if name not in folders:
                raise UsageError(f"--checkpoint names {name}, and --data-dir has {', '.join(folders)}")
            splits[name] = chosen_splits(folders[name], options.split, "test")
            if not splits[name]:
                other = ", ".join(read_manifest(folders[name])["rows"])
                raise located(folders[name], f"has no test split of {name}; name another one with --split: {other}")
            for split in splits[name]:
                ids = read_ids(folders[name], split, by_id=True)
                _check_index(folders[name], split, ids)
        for_server = False
        for name, checkpoint in checkpoints.items():
            model = Model(checkpoint, folders[name], options.cpu, options.fp16)
            for split in splits[name]:
                for path in predict_task(name, model, split, out, options):
                    print(f"wrote {path} ({split})")
                    for_server |= path.name in SUBMISSION_FILES
    if for_server:
        write_zip(out, fill=options.fill_missing is not None)


def main(argv: Sequence[str] | None = None, prog: str = "predict.py") -> int:
    """The command; its exit status."""
    return run("predict", _main, argv, prog)
