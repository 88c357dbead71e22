"""The command behind predict.py: a checkpoint's predictions, in the files that the GLUE server and ANLI take."""

import argparse
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from ..files import whole_file
from . import command
from .binarize import MANIFEST, Folder, Pool, read_index, read_manifest
from .bpe import find_bpe
from .preprocess import whole_number
from .readers import find_sources, located, read_lines, read_task, shown
from .tasks import GLUE, TASKS, Task

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


@dataclass
class Predictions:
    """What a checkpoint says about one split: ids and labels in the order of the file.

    ``scores``: B x K probabilities of ``classes``, or B x 1 targets as the model gives them (0..1 for STS-B).
    """

    task: Task
    split: str
    ids: list[str]
    labels: list[str]
    scores: np.ndarray
    classes: tuple[str, ...] = ()


def task_of(manifest: dict[str, Any], folder: Path) -> Task:
    """The task of a data folder; ANLI's joined rounds count as one."""
    name = manifest["task"]
    if name == "ANLI":
        return replace(TASKS["ANLI-R1"], name="ANLI", rows={})
    if name not in TASKS:
        raise located(folder / MANIFEST, 0, f"task {shown(str(name))} is not one of {', '.join(TASKS)}")
    return TASKS[name]


def read_ids(folder: Path, split: str) -> list[str]:
    """The ids of a split's rows, from ids/SPLIT.tsv."""
    path = folder / "ids" / f"{split}.tsv"
    if not path.is_file():
        raise located(path, 0, f"is missing, so {folder} has no split {split}; run preprocess again")
    ids = [line.split("\t")[0] for _, line in read_lines(path)][1:]
    rows = len(read_index(folder / "input0" / split)[1])
    if len(ids) != rows:
        raise located(path, 0, f"holds {len(ids)} ids, and input0/{split} {rows} rows; run preprocess again")
    return ids


def label_order(folder: Path, count: int) -> tuple[str, ...]:
    """The labels of the classes, in the order of a head that was trained on this folder."""
    lines = [line.rpartition(" ")[0] for _, line in read_lines(folder / "label" / "dict.txt")]
    return tuple(lines[:count])


class Model:
    """A checkpoint that `sentence_prediction` wrote, with the data of one folder."""

    def __init__(self, checkpoint: Path, folder: Path, cpu: bool = False, fp16: bool = False) -> None:
        import torch

        import smart_fairseq  # noqa: F401 - registers what a checkpoint's configuration names

        if not checkpoint.is_file():
            raise located(checkpoint, 0, "--checkpoint: no such file")
        self.folder, self.task = folder, task_of(read_manifest(folder), folder)
        self._torch, self._path = torch, checkpoint
        self._model, self._config, self._fairseq_task = self._load(checkpoint)
        self.classes: tuple[str, ...] = ()
        self._check(checkpoint)
        self._device = torch.device("cpu" if cpu or not torch.cuda.is_available() else "cuda")
        self._model.to(self._device).eval()
        if fp16:
            self._model.half()

    def _load(self, path: Path) -> tuple[Any, Any, Any]:
        from fairseq import checkpoint_utils

        try:
            overrides = {"data": str(self.folder), "no_shuffle": True}
            state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
            self._trained_on = str(_setting(state, "data") or "")
            if _setting(state, "_name") not in (None, "sentence_prediction"):
                raise located(path, 0, f"was trained for the task {_setting(state, '_name')}, not sentence_prediction")
            state = checkpoint_utils.load_checkpoint_to_cpu(str(path), overrides)
            models, config, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], state=state)
        except UsageError:
            raise
        except Exception as error:
            # whatever torch or fairseq says about a file that is no such checkpoint
            lines = (str(error).strip() or type(error).__name__).splitlines()
            # where sizes differ, torch says which from the second line on
            reason = next((line.strip() for line in lines if "size mismatch" in line), lines[0])
            raise located(
                path,
                0,
                f"cannot be loaded as a checkpoint of fairseq-train for this data folder ({type(error).__name__}: "
                f"{reason[:240]}); give the folder that it was trained on, and a whole file",
            ) from None
        return models[0], config, task

    def _check(self, path: Path) -> None:
        self._head = self._config.criterion.get("classification_head_name") or "sentence_classification_head"
        heads = getattr(self._model, "classification_heads", {})
        if self._head not in heads:
            raise located(path, 0, f"has no classification head {self._head!r}: it is not fine-tuned; train it first")
        outputs = heads[self._head].out_proj.out_features
        if outputs != self.task.num_classes:
            raise located(
                path, 0, f"gives {outputs} outputs, and {self.task.name} has {self.task.num_classes}: another task's"
            )
        if not self.task.regression:
            self.classes = label_order(self.folder, outputs)
            trained_on = Path(self._trained_on)
            if (trained_on / "label" / "dict.txt").is_file():
                # the head's own order, where it can be known, is right even if this folder has another
                order = label_order(trained_on, outputs)
                if set(order) != set(self.classes):
                    raise located(
                        path,
                        0,
                        f"was trained on {trained_on} with the classes {', '.join(order)}, and {self.folder} has "
                        f"{', '.join(self.classes)}: another task's",
                    )
                self.classes = order

    def predict(self, split: str, max_tokens: int) -> Predictions:
        """Predictions for a split, in batches of rows of like length, at most ``max_tokens`` with the padding."""
        ids = read_ids(self.folder, split)
        dataset = self._fairseq_task.load_dataset(split)
        sizes = np.asarray(dataset.sizes[0])
        most = self._model.max_positions()
        over = int((sizes > most).sum())
        if over:
            raise located(
                self.folder,
                0,
                f"{split} has {over} rows above the model's {most} tokens; preprocess --max-tokens {most}",
            )
        scores = np.zeros((len(ids), self.task.num_classes))
        progress = command.Progress(len(ids), f"{self.task.name} {split}")
        with self._torch.no_grad():
            for batch in batches(sizes, max_tokens):
                scores[batch] = self._scores(dataset, batch)
                progress.advance(len(batch))
        progress.close(" predicted")
        wrong = int((~np.isfinite(scores)).any(1).sum())
        if wrong:
            raise located(
                self._path, 0, f"gives no finite numbers for {wrong} of {len(ids)} rows: its training diverged"
            )
        return Predictions(self.task, split, ids, self._labels(scores), scores, self.classes)

    def _scores(self, dataset: Any, batch: Sequence[int]) -> np.ndarray:
        sample = dataset.collater([dataset[place] for place in batch])
        inputs = {name: value.to(self._device) for name, value in sample["net_input"].items()}
        logits, _ = self._model(**inputs, features_only=True, classification_head_name=self._head)
        logits = logits.float()
        found = logits if self.task.regression else self._torch.softmax(logits, dim=-1)
        return np.asarray(found.cpu().numpy())

    def _labels(self, scores: np.ndarray) -> list[str]:
        if self.task.regression:
            return [f"{value * self.task.divisor:.9g}" for value in scores[:, 0]]
        return [self.classes[place] for place in scores.argmax(1)]


def _setting(state: dict[str, Any], name: str) -> Any:
    """A field of the task's configuration, in checkpoints old and new."""
    if state.get("cfg") is not None:
        return state["cfg"]["task"].get(name)
    return getattr(state.get("args"), "task" if name == "_name" else name, None)


def batches(sizes: np.ndarray, max_tokens: int) -> Iterator[list[int]]:
    """Positions in batches, longest first, so that a batch that is too large shows at once."""
    batch: list[int] = []
    for place in np.argsort(-sizes, kind="stable"):
        if batch and (len(batch) + 1) * sizes[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(int(place))
    if batch:
        yield batch


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


def data_folders(data_dir: Path) -> dict[str, Path]:
    """Task to data folder: ``data_dir`` itself, or the folders in it that preprocess wrote."""
    if not data_dir.is_dir():
        raise located(data_dir, 0, "--data-dir: no such folder")
    places = [data_dir] if (data_dir / MANIFEST).is_file() else sorted(data_dir.iterdir())
    return {read_manifest(place)["task"]: place for place in places if (place / MANIFEST).is_file()}


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


def official_folder(task: Task, splits: Sequence[str], target: Path, options: argparse.Namespace) -> Path:
    """Make a data folder of ``splits`` from the official files, as preprocess would."""
    data_dir = Path(options.data_dir)
    bpe = find_bpe(options.bpe, Path(options.bpe_dir) if options.bpe_dir else data_dir / "gpt2_bpe")
    rows, _ = read_task(task, data_dir)
    with Pool(bpe, whole_number("--workers", options.workers, 1), None, task.texts) as pool:
        folder = Folder(target, task, pool)
        folder.start(rows.get("train", []))
        for split in splits:
            if split in rows:
                folder.write(split, rows[split])
                folder.write_ids(split, rows[split])
        folder.finish()
    return target


def chosen_splits(folder: Path, text: str | None, kind: str) -> list[str]:
    """The splits that a flag names; without one, those of a kind (test, valid)."""
    there = read_manifest(folder)["rows"]
    if text is None:
        return [split for split in there if split.startswith(kind)]
    splits = [split.strip() for split in text.split(",")]
    for split in splits:
        if split not in there:
            raise UsageError(f"--split is {shown(text)}; {folder} has {', '.join(there)}")
    return splits


def add_encoder_options(parser: argparse.ArgumentParser) -> None:
    """The options that official files need, which preprocess has too."""
    parser.add_argument("--bpe", help="with official files: gpt2, sentencepiece or bert")
    parser.add_argument("--bpe-dir", help="with official files: the encoder's folder (gpt2_bpe in --data-dir)")
    workers = str(min(8, os.cpu_count() or 1))
    parser.add_argument("--workers", default=workers, help="processes that encode official files (%(default)s)")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options of all commands that run a model."""
    parser.add_argument("--max-tokens", default="8192", help="in a batch, padding counted (%(default)s)")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--fp16", action="store_true", help="half precision (GPU)")


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


def _main(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="predict.py", description="Predictions of fine-tuned checkpoints, as files for the GLUE server or by id."
    )
    parser.add_argument("--checkpoint", required=True, nargs="+", action="extend", metavar="[TASK=]PATH")
    parser.add_argument("--data-dir", required=True, help="a data folder, a folder of these, or the official files")
    parser.add_argument("--out", required=True, help="folder for the files")
    parser.add_argument("--split", help="instead of the test splits; as in valid,valid1")
    parser.add_argument("--probabilities", action="store_true", help="write these too (not in files for the server)")
    parser.add_argument("--fill-missing", choices=["majority"], help="baseline for tasks without a file, for the zip")
    add_encoder_options(parser)
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
                splits = options.split.split(",") if options.split else [s for s in TASKS[name].splits if "test" in s]
                folders[name] = official_folder(TASKS[name], splits, Path(scratch) / name, options)
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


def main(argv: Sequence[str] | None = None) -> int:
    """examples/glue/predict.py and examples/anli/predict.py."""
    return command.run("predict", _main, argv)
