"""Data folders that preprocess wrote: their task, ids and labels, where several stand, whether a split is whole."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError, refuse
from ..files import sha256
from .binarize import (
    FILLER,
    MANIFEST,
    data_folders_in,
    read_classes,
    read_ids_of,
    read_index,
    read_manifest,
    read_targets,
)
from .bpe import SPECIAL_SYMBOLS
from .lines import located, read_bytes, read_lines, shown
from .ranking import parts, read_groups
from .tasks import ANLI_JOINED, CORRELATIONS, TASKS, Task

# in the state of fairseq's task, which a checkpoint holds: `what_is_in` its data folder
DATA = "smart_data"
ROWS_OF = {1: "single texts", 2: "pairs"}  # what rows of so many texts are called


def task_of(folder: Path) -> Task:
    """The task of a data folder; ANLI's joined rounds count as one."""
    manifest = read_manifest(folder)
    name = manifest["task"]
    if name == "ANLI":
        return ANLI_JOINED
    if name not in TASKS and {"labels", "divisor"} <= manifest.keys():  # a task of one's own
        labels = tuple(manifest["labels"])
        metrics, texts = ("accuracy",) if labels else CORRELATIONS, 2 if (folder / "input1").is_dir() else 1
        return Task(str(name), (), {}, texts, labels, manifest["divisor"], metrics)
    if name not in TASKS:
        raise located(folder / MANIFEST, f"task {shown(str(name))} is not one of {', '.join(TASKS)}")
    return TASKS[name]


def find_tasks(flag: str, data: Path, names: Sequence[str] | None) -> dict[str, tuple[Task, Path]]:
    """By its name each task of ``data``, a folder of data folders or one of them, and the folder.

    ``names``: of folders in it, as ``flag`` gives them; None for all. Raises `UsageError` for what is not there, is no
    data folder, or is prepared with another dictionary than the first.
    """
    if not data.is_dir():
        raise located(data, "no such folder; name the folder of the data folders that preprocess.py wrote")
    if names is None:
        places = [data] if (data / MANIFEST).is_file() else data_folders_in(data)
        if not places:
            raise located(data, f"holds no data folder; make some with preprocess.py, or name them by {flag}")
    else:
        places = [_named(data, name.strip()) for name in names if name.strip()]
        if not places:
            raise UsageError(f"{flag} names no folder; it must be as RTE-bin,MRPC-bin")
    found: dict[str, tuple[Task, Path]] = {}
    for place in places:
        if not place.is_dir():
            inside = ", ".join(folder.name for folder in data_folders_in(data)) or "none"
            raise located(place, f"no such folder; {flag} names data folders in {data}, which holds {inside}")
        task = task_of(place)
        if task.name in found and found[task.name][1].samefile(place):
            refuse(place, "named twice", f"name it once by {flag}")
        if task.name in found:
            refuse(place, f"holds {task.name}, as {found[task.name][1]} does", f"choose one of the two by {flag}")
        first = next(iter(found.values()), (task, place))[1]
        dictionary = place / "input0" / "dict.txt"
        if read_bytes(dictionary) != read_bytes(first / "input0" / "dict.txt"):
            other = f"that of {first}, and all tasks share one encoder; preprocess both with the same --bpe-dir"
            raise located(dictionary, f"is not {other}")
        found[task.name] = (task, place)
    return found


def _named(data: Path, name: str) -> Path:
    """The folder of that name, or else the one that holds the task of that name."""
    if (data / name).is_dir():
        return data / name
    holding = [place for place in data_folders_in(data) if read_manifest(place)["task"] == name]
    return holding[0] if len(holding) == 1 else data / name


def read_ids(folder: Path, split: str, by_id: bool = False) -> list[str]:
    """The ids of a split's rows, from ids/SPLIT.tsv.

    None may stand there twice, but in a part to train on: rows are trained on by their place, and preprocess may
    repeat them (--weights). ``by_id``: not there either, as what is predicted for a row will be found by its id.
    """
    path = folder / "ids" / f"{split}.tsv"
    if not path.is_file():
        raise located(path, f"is missing, so {folder} has no split {split}; run preprocess again")
    ids = [line.split("\t")[0] for _, line in read_lines(path)][1:]
    rows = len(read_index(folder / "input0" / split)[1])
    if len(ids) != rows:
        raise located(path, f"holds {len(ids)} ids, and input0/{split} {rows} rows; run preprocess again")
    if len(set(ids)) != rows and (by_id or not split.startswith("train")):
        advice = "predict another split" if split.startswith("train") else "run preprocess again"
        raise located(path, f"holds an id twice, and predictions are found by their ids; {advice}")
    return ids


def label_order(folder: Path, count: int | None = None) -> tuple[str, ...]:
    """The labels of the classes, in the order of a head that was trained on this folder."""
    names = [line.rpartition(" ")[0] for _, line in read_lines(folder / "label" / "dict.txt")]
    return tuple(name for name in names if not name.startswith(FILLER))[:count]


def data_of(state: dict[str, Any]) -> dict[str, Any]:
    """What was in the data folder of a checkpoint, see `what_is_in`; empty for one that does not say it."""
    found = (state.get("task_state") or {}).get(DATA)
    return found if isinstance(found, dict) else {}


def labels_in(folder: Path) -> list[str] | None:
    """`label_order` of all classes; None for a folder that does not tell."""
    try:
        return list(label_order(folder))
    except UsageError:
        return None


def texts_in(folder: Path) -> int:
    """How many texts a row of a data folder has."""
    return len(list(folder.glob("input*")))


def what_is_in(folder: Path) -> dict[str, Any]:
    """What a checkpoint remembers of the data folder that it is trained on, which may be written anew or go.

    ``labels`` in the order of the head's outputs, ``divisor`` of scores, number of ``texts`` in a row and of ``rows``
    to train on, and these rows' SHA-256 as ``train``; what the folder does not tell is left out.
    """
    found: dict[str, Any] = {}
    labels = labels_in(folder)
    if labels is not None:
        found["labels"] = labels
    with contextlib.suppress(UsageError):
        manifest = read_manifest(folder)
        found |= {"divisor": float(manifest.get("divisor", 1)), "rows": manifest["rows"].get("train", 0)}
        found["texts"] = texts_in(folder)
    with contextlib.suppress(OSError):
        found["train"] = sha256(folder / "input0" / "train.bin")
    return found


def check_split(folder: Path, split: str, task: Task, symbols: int) -> None:
    """Raise `UsageError` where a labelled split lacks a file, or its files do not belong together.

    ``symbols``: in the dictionary of its texts.
    """
    rows = read_manifest(folder)["rows"].get(split)
    if rows is None:
        raise located(folder, f"has no split {split}; preprocess a folder that holds it")
    if not rows:
        raise located(folder, f"has no rows in its split {split}")
    texts = ["input0", "input1"] if (folder / "input1").is_dir() else ["input0"]
    files = {folder / text / f"{split}.bin": len(read_ids_of(folder / text / split, symbols)[1]) for text in texts}
    labels = folder / "label" / f"{split}.{'label' if task.regression else 'bin'}"
    if not labels.is_file():
        raise located(labels, f"is missing, so {split} has no labels; name a split that has, or run preprocess again")
    if task.regression:
        files[labels] = len(read_targets(labels))
    else:
        known = len(label_order(folder)) + len(SPECIAL_SYMBOLS)
        files[labels] = len(read_ids_of(folder / "label" / split, known)[1])
    if task.ranking:
        numbers = read_classes(folder / "label" / split)
        for group, part in enumerate(parts(read_groups(folder, split, rows)), start=1):
            if not any(numbers[part]):
                path = folder / "groups" / f"{split}.sizes"
                raise located(path, "no candidate of this group is right; run preprocess again", group)
    for path, count in files.items():
        if count != rows:
            raise located(path, f"holds {count} rows, and {MANIFEST} says {rows}; run preprocess again")
