"""Training rows drawn from a data folder, and everything left as its valid split; nothing is encoded anew.

Or all of a folder's labelled rows as a valid split, for the models of another.
"""

import hashlib
import json
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.binarize import MANIFEST, indexed_writer, read_classes, read_indexed, read_manifest, write_classes
from ..data.bpe import SPECIAL_SYMBOLS
from ..data.folders import label_order, task_of
from ..data.lines import located
from ..data.pool import integer_typecode
from ..data.tasks import Task
from ..files import whole_folder

# of a new folder's parts the rows: (split, position) in the folder that they are from
Parts = dict[str, list[tuple[str, int]]]


@dataclass(frozen=True)
class Draw:
    """Which rows: ``rows`` of the training part (all, if None), every class by its share where ``stratified``.

    flip: share of the drawn rows whose label becomes another class.
    evaluate: so many of the rows that are left, drawn as well; None for all.
    """

    rows: int | None = None
    stratified: bool = False
    flip: float = 0.0
    evaluate: int | None = None


@dataclass(frozen=True)
class Source:
    """A data folder that preprocess wrote."""

    folder: Path

    @property
    def task(self) -> Task:
        """Raises `UsageError` for another program's folder, and for a task that is not known."""
        return task_of(self.folder)

    @property
    def bpe(self) -> str:
        """The kind of byte pair encoding."""
        return str(read_manifest(self.folder).get("bpe"))

    def check(self, train: bool = True) -> None:
        """Raise `UsageError` where it is none, is no task's that studies know, or has no labels.

        train: whether these must be labels for training.
        """
        task = self.task
        if task.ranking or task.candidates:
            raise located(self.folder, f"holds {task.name}, which ranks rows, as studies do not; name another task's")
        if train and "train" not in self.splits:
            raise located(self.folder, "has no labelled train split (input0/train.idx with label/train)")
        if not self.splits:
            raise located(self.folder, "has no labelled split")

    @property
    def regression(self) -> bool:
        return not (self.folder / "label" / "dict.txt").is_file()

    @property
    def classes(self) -> list[str]:
        """Labels in the order of the class numbers; none for regression."""
        return [] if self.regression else list(label_order(self.folder))

    @property
    def splits(self) -> list[str]:
        """Those with labels, train first."""
        end = ".label" if self.regression else ".idx"
        names = sorted(path.stem for path in (self.folder / "input0").glob("*.idx"))
        return sorted((n for n in names if (self.folder / "label" / (n + end)).is_file()), key=lambda n: n != "train")

    @property
    def words_in_order(self) -> bytes:
        """The dictionary, by which ids are words."""
        return (self.folder / "input0" / "dict.txt").read_bytes()

    @property
    def inputs(self) -> list[str]:
        return [name for name in ("input0", "input1") if (self.folder / name).is_dir()]

    @property
    def train_rows(self) -> int:
        return len(self.labels("train"))

    def labels(self, split: str) -> np.ndarray:
        """[N] class numbers, or targets as text, which is what stands in the file."""
        prefix = self.folder / "label" / split
        if self.regression:
            return np.array(Path(f"{prefix}.label").read_text(encoding="utf-8").split())
        return np.array(read_classes(prefix), dtype=np.int64)

    def digest(self) -> str:
        """SHA-256 over everything that `cut_out` reads."""
        digest = hashlib.sha256()
        for part in (*self.inputs, "label"):
            for path in sorted((self.folder / part).iterdir()):
                digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()


def drawn(labels: np.ndarray, draw: Draw, seed: int) -> np.ndarray:
    """Positions of the training rows in order. Those for fewer rows are among those for more, for the same seed."""
    order = np.random.default_rng([seed, 0]).permutation(len(labels))
    if draw.stratified:
        # each row's rank among its class, as a share of the class: the smallest take all classes alike
        share = np.zeros(len(order))
        for label in np.unique(labels):
            mine = labels[order] == label
            share[mine] = (np.arange(mine.sum()) + 0.5) / mine.sum()
        order = order[np.argsort(share, kind="stable")]
    return np.sort(order[: draw.rows])


def flipped(labels: np.ndarray, classes: int, share: float, seed: int) -> np.ndarray:
    """Labels of which a share is another class each, drawn among all others."""
    draw, labels = np.random.default_rng([seed, 1]), labels.copy()
    chosen = draw.permutation(len(labels))[: round(share * len(labels))]
    labels[chosen] = (labels[chosen] + draw.integers(1, classes, len(chosen))) % classes
    return labels


def cut_out(source: Source, target: Path, draw: Draw, seed: int) -> None:
    """Write ``target``, whole or not at all: train, the rows drawn with the seed, and valid, the labelled rest.

    Raises `UsageError` where that is less than 2 rows.
    """
    labels = {split: source.labels(split) for split in source.splits}
    train = drawn(labels["train"], draw, seed)
    # (split, position) of every row that is left
    left = [("train", int(place)) for place in np.setdiff1d(np.arange(len(labels["train"])), train)]
    left += [(split, place) for split in source.splits[1:] for place in range(len(labels[split]))]
    if draw.evaluate is not None:
        kept = np.random.default_rng([seed, 2]).permutation(len(left))[: draw.evaluate]
        left = [left[place] for place in sorted(kept)]
    if draw.flip:
        labels["train"][train] = flipped(labels["train"][train], len(source.classes), draw.flip, seed)
    parts = {"train": [("train", int(place)) for place in train], "valid": left}
    _write(source, target, labels, parts)


def take_all(source: Source, target: Path) -> None:
    """Write ``target``, whole or not at all: valid, all labelled rows."""
    labels = {split: source.labels(split) for split in source.splits}
    rows = [(split, place) for split in labels for place in range(len(labels[split]))]
    _write(source, target, labels, {"valid": rows})


def _write(source: Source, target: Path, labels: dict[str, np.ndarray], parts: Parts) -> None:
    """A data folder of some rows; ``labels`` of all of the source's, by split."""
    count = len(parts["valid"])
    if count < 2:
        what = f"has {count} labelled rows to evaluate on, and 2 are needed: half of them fits a temperature"
        raise located(source.folder, f"{what}; draw fewer rows, or name a folder with more")
    with whole_folder(target) as folder:
        for name in source.inputs:
            _write_input(source, folder, name, parts)
        (folder / "label").mkdir()
        (folder / "ids").mkdir()
        if not source.regression:
            (folder / "label" / "dict.txt").write_bytes((source.folder / "label" / "dict.txt").read_bytes())
        for part, rows in parts.items():
            found = np.array([labels[split][place] for split, place in rows])
            if source.regression:
                lines = "".join(f"{label}\n" for label in found)
                (folder / "label" / f"{part}.label").write_text(lines, encoding="utf-8")
            else:
                write_classes(folder / "label" / part, found.tolist())
            # by its place in the source: the splits' own ids may be the same, and preprocess may repeat a row
            ids = "".join(f"{split}:{place}\n" for split, place in rows)
            (folder / "ids" / f"{part}.tsv").write_text(f"id\n{ids}", encoding="utf-8")
        manifest = read_manifest(source.folder)
        manifest |= {"rows": {part: len(rows) for part, rows in parts.items()}, "parts": {}}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _write_input(source: Source, folder: Path, name: str, parts: Parts) -> None:
    (folder / name).mkdir()
    dictionary = (source.folder / name / "dict.txt").read_bytes()
    (folder / name / "dict.txt").write_bytes(dictionary)
    typecode = integer_typecode(len(SPECIAL_SYMBOLS) + len(dictionary.splitlines()))
    texts = {split: read_indexed(source.folder / name / split) for split in source.splits}
    for part, rows in parts.items():
        with indexed_writer(folder / name / part, typecode) as add:
            for split, place in rows:
                ids = texts[split][place]
                add(array(typecode, ids.tolist()), [len(ids)])
