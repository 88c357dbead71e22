"""Rows to the folder that fairseq's `sentence_prediction` reads: input0/, input1/, label/, byte for byte what
`multiprocessing_bpe_encoder` and `fairseq-preprocess` write when called as fairseq's GLUE script calls them.

The format of .bin and .idx is that of `MMapIndexedDataset` (fairseq/data/indexed_dataset.py): the ids one after the
other, and a header, the sizes as int32 and the offsets in bytes as int64.
"""

import contextlib
import json
import math
import struct
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import one_line, refuse
from ..files import whole_folder
from .bpe import END, SPECIAL_SYMBOLS
from .lines import Row, as_number, located, read_lines, read_object, shown
from .pool import Pool, integer_typecode
from .ranking import write_groups
from .sentiment import annotators_table
from .tasks import Task

MANIFEST = "preprocess.json"
PADDING_FACTOR = 8  # fairseq pads the dictionaries that it builds
FILLER = "madeupword"  # and four digits: what it pads them with
INDEX_MAGIC = b"MMIDIDX\x00\x00"


@dataclass
class SplitCount:
    """What was written for one split."""

    rows: int = 0
    tokens: int = 0  # of all inputs, an end symbol for each included
    unknown: int = 0
    longest: int = 0  # tokens of the longest row with the symbols that training adds
    shortened: int = 0
    over_512: int = 0
    empty: int = 0


@contextlib.contextmanager
def indexed_writer(prefix: Path, typecode: str) -> Iterator[Callable[["array[int]", Sequence[int]], None]]:
    """Writes PREFIX.bin as ids come, and PREFIX.idx when the block ends well, as `MMapIndexedDatasetBuilder` does.

    What it yields takes some rows: the ids of all one after the other, and the rows' sizes.
    """
    written = array("i")
    with open(f"{prefix}.bin", "wb") as data:

        def add(ids: "array[int]", sizes: Sequence[int]) -> None:
            ids.tofile(data)
            written.extend(sizes)

        yield add
    sizes = np.array(written, dtype=np.int32)
    starts = (np.cumsum(sizes, dtype=np.int64) - sizes) * array(typecode).itemsize
    code = {"H": 8, "I": 9}[typecode]  # fairseq's numbers for uint16 and uint32
    header = INDEX_MAGIC + struct.pack("<QBQ", 1, code, len(sizes))
    Path(f"{prefix}.idx").write_bytes(header + sizes.tobytes() + starts.tobytes())


def write_classes(prefix: Path, classes: Sequence[int]) -> None:
    """Write the class numbers of a split's rows, from 0, as fairseq has them: a symbol each, and an end symbol."""
    with indexed_writer(prefix, "H") as add:
        ids = [symbol for number in classes for symbol in (len(SPECIAL_SYMBOLS) + number, END)]
        add(array("H", ids), [2] * len(classes))


def read_classes(prefix: Path) -> list[int]:
    """What `write_classes` wrote; errors as `read_ids_of`."""
    return [int(row[0]) - len(SPECIAL_SYMBOLS) for row in read_indexed(prefix)]


def read_ids_of(prefix: Path, symbols: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all rows of PREFIX.bin one after the other, below ``symbols``, and the rows' sizes.

    Raises `UsageError` if the two files do not belong together, or not to a dictionary of that size.
    """
    kind, sizes = read_index(prefix)
    path, whole = Path(f"{prefix}.bin"), int(sizes.sum())
    try:
        data = np.fromfile(path, dtype=kind)
    except OSError as error:
        raise located(path, f"cannot be read ({error.strerror})") from None
    if len(data) != whole:
        raise located(path, f"holds {len(data)} ids, and its .idx says {whole}; run preprocess again")
    if whole and not 0 <= data.min() <= data.max() < symbols:
        raise located(path, f"holds ids beyond the {symbols} of its dict.txt; run preprocess again")
    return data, sizes


def read_indexed(prefix: Path) -> list[np.ndarray]:
    """The rows of PREFIX.bin as int64 arrays; errors as `read_ids_of`."""
    data, sizes = read_ids_of(prefix, 1 << 62)
    return np.split(data.astype(np.int64), np.cumsum(sizes)[:-1]) if len(sizes) else []


def read_index(prefix: Path) -> tuple[Any, np.ndarray]:
    """(type of the ids, sizes) from PREFIX.idx."""
    path = Path(f"{prefix}.idx")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise located(path, f"cannot be read ({error.strerror}); run preprocess first") from None
    if not raw.startswith(INDEX_MAGIC) or len(raw) < 26:
        raise located(path, "is not an index of fairseq's mmap format; run preprocess again")
    code, count = raw[17], struct.unpack("<Q", raw[18:26])[0]
    kind = {3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16, 9: np.uint32}.get(code)
    if kind and len(raw) == 26 + 12 * count:
        sizes = np.frombuffer(raw, np.int32, count, 26)
        starts = (np.cumsum(sizes, dtype=np.int64) - sizes) * np.dtype(kind).itemsize
        if (sizes >= 0).all() and (np.frombuffer(raw, np.int64, count, 26 + 4 * count) == starts).all():
            return kind, sizes
    raise located(path, "is cut short or damaged; run preprocess again")


def read_targets(path: Path) -> list[float]:
    """The numbers of a .label file, one in each line."""
    found = []
    for number, line in read_lines(path):
        found.append(as_number(line))
        if not math.isfinite(found[-1]):
            raise located(path, f"{shown(line)} is no number; run preprocess again", number)
    return found


def label_dictionary(task: Task, counts: "Counter[str]") -> list[tuple[str, int]]:
    """(label, count) in the order of the class ids, with fairseq's padding.

    For the tasks of fairseq's recipe that is its order: by frequency in the training part, then by name. The others
    keep the table's order, so that one head fits all three-way inference tasks. Labels that training rows lack follow
    at the end: without an entry fairseq would read them as class -1.
    """
    if task.fairseq_recipe and counts:
        order = sorted(counts, key=lambda label: (-counts[label], label))
        order += [label for label in task.labels if label not in counts]
    else:
        order = list(task.labels)
    entries = [(label, counts[label]) for label in order]
    padding = -(len(SPECIAL_SYMBOLS) + len(entries)) % PADDING_FACTOR
    return entries + [(f"{FILLER}{number:04d}", 0) for number in range(padding)]


def regression_text(label: str, divisor: float) -> str:
    """The scaled target as fairseq's recipe has awk print it: six significant digits."""
    return f"{float(label) / divisor:.6g}"


@dataclass
class Folder:
    """A data folder in the making: splits are written to ``path``."""

    path: Path
    task: Task
    pool: Pool
    counts: dict[str, SplitCount] = field(default_factory=dict)
    labels: list[tuple[str, int]] = field(default_factory=list)

    def start(self, train: Sequence[Row]) -> None:
        """Write the dictionaries; class ids come from all rows of the training part."""
        for place in range(self.task.texts):
            (self.path / f"input{place}").mkdir(parents=True)
            (self.path / f"input{place}" / "dict.txt").write_text(self.pool.vocabulary.lines, encoding="utf-8")
        (self.path / "label").mkdir()
        if not self.task.regression:
            self.labels = label_dictionary(self.task, Counter(row.label for row in train if row.label is not None))
            lines = "".join(f"{label} {count}\n" for label, count in self.labels)
            (self.path / "label" / "dict.txt").write_text(lines, encoding="utf-8")

    def write(self, split: str, rows: Sequence[Row], advance: Callable[[int], None] = lambda rows: None) -> None:
        """Write one split; ``advance`` is told how many rows are done."""
        typecode = integer_typecode(self.pool.vocabulary.size)
        count = self.counts[split] = SplitCount(rows=len(rows))
        whole = 1 if self.task.candidates else None  # of candidates the first text is the row, the others parts of it
        with contextlib.ExitStack() as stack:
            prefixes = [self.path / f"input{place}" / split for place in range(self.task.texts)]
            writers = [stack.enter_context(indexed_writer(prefix, typecode)) for prefix in prefixes]
            for (ids, sizes, unknown, shortened), done in self.pool.encode(rows):
                for add, part, part_sizes in zip(writers, ids, sizes):
                    add(part, part_sizes)
                lengths = np.sum(sizes[:whole], axis=0) + self.pool.extra
                count.tokens += sum(map(len, ids))
                count.unknown += unknown
                count.shortened += shortened
                count.longest = max(count.longest, int(lengths.max()))
                count.over_512 += int((lengths > 512).sum())
                advance(done)
        count.empty = sum(not all(text.strip() for text in row.texts[:whole]) for row in rows)
        labels = [row.label for row in rows if row.label is not None]
        if len(labels) == len(rows):
            self._write_labels(self.path / "label" / split, labels)
        self._write_ids(split, rows)
        if self.task.ranking:
            write_groups(self.path, split, rows)

    def _write_labels(self, prefix: Path, labels: Sequence[str]) -> None:
        if self.task.regression:
            lines = "".join(f"{regression_text(label, self.task.divisor)}\n" for label in labels)
            Path(f"{prefix}.label").write_text(lines, encoding="utf-8")
            return
        place = {label: number for number, (label, _) in enumerate(self.labels)}
        write_classes(prefix, [place[label] for label in labels])

    def _write_ids(self, split: str, rows: Sequence[Row]) -> None:
        """Which row of which file each example is: ids/SPLIT.tsv with the columns id, file, line.

        Of rated rows also what the raters said: annotators/SPLIT.tsv, in the same order.
        """
        (self.path / "ids").mkdir(exist_ok=True)
        with open(self.path / "ids" / f"{split}.tsv", "w", encoding="utf-8", newline="\n") as table:
            table.write("id\tfile\tline\n")
            for row in rows:
                # without the path before the task's folder, which differs from one machine to the next
                file = one_line("/".join(Path(row.file).parts[-2:]))
                table.write(f"{row.id}\t{file}\t{row.line}\n")
        if self.task.rated:
            (self.path / "annotators").mkdir(exist_ok=True)
            text = annotators_table(rows)
            (self.path / "annotators" / f"{split}.tsv").write_text(text, encoding="utf-8")

    def finish(self, **facts: Any) -> None:
        """Write preprocess.json, what later commands need to know about the folder."""
        manifest = {
            "task": self.task.name,
            "bpe": self.pool.files.kind,
            "num_classes": self.task.num_classes,
            "labels": [label for label, _ in self.labels[: len(self.task.labels)]],
            "divisor": self.task.divisor,
            "rows": {split: count.rows for split, count in self.counts.items()},
            **facts,
        }
        (self.path / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def data_folders_in(folder: Path) -> list[Path]:
    """The data folders that stand in a folder, by their names."""
    return sorted(found.parent for found in folder.glob(f"*/{MANIFEST}") if found.is_file())


def one_of_those_in(folder: Path) -> str:
    """What to do where a folder of data folders was taken for one; empty where it holds none."""
    inside = ", ".join(place.name for place in data_folders_in(folder))
    return inside and f"give one of the folders in it: {inside}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `Folder.finish` wrote. Raises `UsageError` if the folder was not written by preprocess."""
    path = folder / MANIFEST
    if not path.is_file():
        raise located(folder, f"holds no {MANIFEST}; {one_of_those_in(folder) or 'make it with preprocess.py'}")
    manifest = read_object(path)
    if not _sound(manifest):
        raise located(path, "is not what preprocess.py writes; run it again")
    return manifest


def _sound(manifest: Any) -> bool:
    """Has preprocess.json the form that `Folder.finish` gives it?"""
    try:
        rows: dict[str, Any] = manifest["rows"]
        parts = {split: sum(count for _, count in found) for split, found in manifest.get("parts", {}).items()}
        return (
            all(isinstance(count, int) for count in rows.values())
            and all(rows.get(split, count) == count for split, count in parts.items())
            and all(isinstance(text, str) for text in (manifest["task"], *list(manifest.get("labels", []))))
            and float(manifest.get("divisor", 1)) > 0
        )
    except (AttributeError, LookupError, TypeError, ValueError):
        return False


def _ours(path: Path) -> bool:
    """Is it safe to replace: a folder that preprocess, or fairseq's recipe, wrote?"""
    names = {entry.name for entry in path.iterdir()}
    if not names or MANIFEST in names or ({"input0", "label"} <= names <= {"input0", "input1", "label"}):
        return True
    # of --subsample, whose fractions are folders in it
    return all((entry / MANIFEST).is_file() and 0 < as_number(entry.name) <= 1 for entry in path.iterdir())


@contextlib.contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its place when the block ends well, and vanishes otherwise.

    Raises `UsageError` if ``target`` holds anything that preprocess did not write.
    """
    if target.exists() and not target.is_dir():
        raise located(target, "--out: a file is there; choose another name")
    if target.is_dir() and not _ours(target):
        refuse(target, "--out: this folder holds other things than preprocess.py writes", "choose another or remove it")
    with whole_folder(target) as partial:
        yield partial
