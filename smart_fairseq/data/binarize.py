"""Rows to the folder that fairseq's `sentence_prediction` reads: input0/, input1/, label/, byte for byte what
`multiprocessing_bpe_encoder` and `fairseq-preprocess` write when called as fairseq's GLUE script calls them.

The format of .bin and .idx is that of `MMapIndexedDataset` (fairseq/data/indexed_dataset.py): the ids one after the
other, and a header, the sizes as int32 and the offsets in bytes as int64.
"""

import contextlib
import json
import os
import struct
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from ..files import whole_folder
from .bpe import END, SPECIAL_SYMBOLS, UNKNOWN, BpeFiles, Encoder, Vocabulary, load_vocabulary, make_encoder
from .readers import Row, located
from .tasks import Task

MANIFEST = "preprocess.json"
PADDING_FACTOR = 8  # fairseq pads the dictionaries that it builds
INDEX_MAGIC = b"MMIDIDX\x00\x00"
CHUNK = 512  # rows per unit of work

# ids per input, sizes per input, unknown symbols, rows shortened
Encoded = tuple[list["array[int]"], list[list[int]], int, int]


@dataclass
class SplitCount:
    """What was written for one split."""

    rows: int = 0
    tokens: int = 0  # of all inputs, an end symbol for each included
    unknown: int = 0
    longest: int = 0  # tokens of the longest row with the symbols that training adds
    shortened: int = 0
    over_512: int = 0


@dataclass
class _Worker:
    encoder: Encoder
    vocabulary: Vocabulary
    typecode: str
    max_tokens: int | None
    extra: int


_worker: _Worker | None = None
_worker_key: tuple[Any, ...] | None = None


def special_tokens(files: BpeFiles, texts: int) -> int:
    """Symbols that training adds to a row beside the ends of the inputs: <s>, and in RoBERTa's form a second </s>."""
    return 1 + (1 if texts == 2 and files.kind != "bert" else 0)


def _start_worker(files: BpeFiles, max_tokens: int | None, extra: int) -> None:
    """Load encoder and dictionary, unless a fork has brought them along."""
    global _worker, _worker_key
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # we are the parallelism
    key = (files, max_tokens, extra)
    if _worker_key != key:
        if _worker_key is not None and _worker is not None and _worker_key[0] == files:
            encoder, vocabulary = _worker.encoder, _worker.vocabulary
        else:
            encoder, vocabulary = make_encoder(files), load_vocabulary(files.dictionary)
        _worker = _Worker(encoder, vocabulary, integer_typecode(vocabulary.size), max_tokens, extra)
        _worker_key = key


def integer_typecode(size: int) -> str:
    """The array type that fairseq takes for a dictionary of this size (`best_fitting_int_dtype`)."""
    return "H" if size < 65500 else "I"


def _encode_chunk(rows: Sequence[tuple[str, ...]]) -> Encoded:
    """The ids of some rows' texts. Runs in a worker."""
    if _worker is None:
        raise RuntimeError("worker was not started")
    worker = _worker
    number_of = worker.vocabulary.__getitem__
    encode = worker.encoder.encode
    inputs = len(rows[0])
    ids = [array(worker.typecode) for _ in range(inputs)]
    sizes: list[list[int]] = [[] for _ in range(inputs)]
    unknown = shortened = 0
    for texts in rows:
        row = [[*map(number_of, encode(text.strip())), END] for text in texts]
        unknown += sum(part.count(UNKNOWN) for part in row)
        if worker.max_tokens is not None:
            shortened += _shorten(row, worker.max_tokens - worker.extra)
        for place, part in enumerate(row):
            ids[place].extend(part)
            sizes[place].append(len(part))
    return ids, sizes, unknown, shortened


def _shorten(row: list[list[int]], limit: int) -> int:
    """Cut the longer part at its end, before the end symbol, until all have ``limit`` symbols; 1 if it was cut."""
    over = sum(map(len, row)) - limit
    if over <= 0:
        return 0
    while over > 0:
        longest = max(row, key=len)
        longest.pop(-2)
        over -= 1
    return 1


class Pool:
    """Workers that encode in order; none for one worker. Use as a context manager.

    Raises `UsageError` at the start if an encoder's file is of the wrong kind.
    """

    def __init__(self, files: BpeFiles, workers: int, max_tokens: int | None, texts: int) -> None:
        self.files = files
        self.extra = special_tokens(files, texts)
        shortest = self.extra + 2 * texts
        if max_tokens is not None and max_tokens < shortest:
            raise UsageError(f"--max-tokens is {max_tokens}; it must be at least {shortest}")
        _start_worker(files, max_tokens, self.extra)
        self.vocabulary = _worker.vocabulary if _worker else Vocabulary()
        self._workers, self._arguments = workers, (files, max_tokens, self.extra)
        self._pool: ProcessPoolExecutor | None = None
        self._waiting: list[Future[Encoded]] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            for future in self._waiting:
                future.cancel()
            self._pool.shutdown()

    def encode(self, rows: Sequence[Row]) -> Iterator[tuple[Encoded, int]]:
        """(result, number of rows) of each chunk, in order."""
        chunks = [[row.texts for row in rows[start : start + CHUNK]] for start in range(0, len(rows), CHUNK)]
        if self._workers > 1 and len(chunks) > 1 and self._pool is None:
            self._pool = ProcessPoolExecutor(self._workers, initializer=_start_worker, initargs=self._arguments)
        if self._pool is None or len(chunks) <= 1:
            for chunk in chunks:
                yield _encode_chunk(chunk), len(chunk)
            return
        try:
            self._waiting = [self._pool.submit(_encode_chunk, chunk) for chunk in chunks]
            for chunk, future in zip(chunks, self._waiting):
                yield future.result(), len(chunk)
        except BrokenProcessPool:
            raise UsageError(
                f"--workers is {self._workers}; one of them was killed, perhaps for want of memory: try fewer"
            ) from None


class IndexedWriter:
    """Writes PREFIX.bin as the ids come and PREFIX.idx at the end, as `MMapIndexedDatasetBuilder` does.

    Use as a context manager.
    """

    def __init__(self, prefix: Path, typecode: str) -> None:
        self._prefix, self._typecode = prefix, typecode
        self._data = open(f"{prefix}.bin", "wb")
        self._sizes: list[int] = []

    def add(self, ids: "array[int]", sizes: Sequence[int]) -> None:
        ids.tofile(self._data)
        self._sizes.extend(sizes)

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._data.close()
        if kind is None:
            self._write_index()

    def _write_index(self) -> None:
        width = array(self._typecode).itemsize
        sizes = np.array(self._sizes, dtype=np.int32)
        pointers = np.zeros(len(sizes), dtype=np.int64)
        np.cumsum(sizes[:-1].astype(np.int64) * width, out=pointers[1:])
        code = {"H": 8, "I": 9}[self._typecode]  # fairseq's numbers for uint16 and uint32
        with open(f"{self._prefix}.idx", "wb") as index:
            index.write(INDEX_MAGIC + struct.pack("<QBQ", 1, code, len(sizes)))
            index.write(sizes.tobytes())
            index.write(pointers.tobytes())


def read_indexed(prefix: Path) -> list[np.ndarray]:
    """The rows of PREFIX.bin as int64 arrays. Raises `UsageError` if the two files do not belong together."""
    index = read_index(prefix)
    try:
        data = np.fromfile(f"{prefix}.bin", dtype=index[0])
    except OSError as error:
        raise located(Path(f"{prefix}.bin"), 0, f"cannot be read ({error.strerror})") from None
    if len(data) != int(index[1].sum()):
        message = f"holds {len(data)} ids, and its .idx says {int(index[1].sum())}; run preprocess again"
        raise located(Path(f"{prefix}.bin"), 0, message)
    return [part.astype(np.int64) for part in np.split(data, np.cumsum(index[1])[:-1])] if len(index[1]) else []


def read_index(prefix: Path) -> tuple[Any, np.ndarray]:
    """(type of the ids, sizes) from PREFIX.idx."""
    path = Path(f"{prefix}.idx")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise located(path, 0, f"cannot be read ({error.strerror}); run preprocess first") from None
    if not raw.startswith(INDEX_MAGIC) or len(raw) < 26:
        raise located(path, 0, "is not an index of fairseq's mmap format; run preprocess again")
    code, count = raw[17], struct.unpack("<Q", raw[18:26])[0]
    if code not in (3, 4, 5, 8, 9) or len(raw) != 26 + 12 * count:
        raise located(path, 0, "is cut short or damaged; run preprocess again")
    kind = {3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16, 9: np.uint32}[code]
    return kind, np.frombuffer(raw, np.int32, count, 26)


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
    return entries + [(f"madeupword{number:04d}", 0) for number in range(padding)]


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
        prefixes = [self.path / f"input{place}" / split for place in range(self.task.texts)]
        with contextlib.ExitStack() as stack:
            writers = [stack.enter_context(IndexedWriter(prefix, typecode)) for prefix in prefixes]
            self._encode(writers, rows, count, advance)
        if all(row.label is not None for row in rows):
            self._write_labels(split, [str(row.label) for row in rows])

    def _encode(
        self, writers: Sequence["IndexedWriter"], rows: Sequence[Row], count: SplitCount, advance: Callable[[int], None]
    ) -> None:
        for (ids, sizes, unknown, shortened), done in self.pool.encode(rows):
            for writer, part, part_sizes in zip(writers, ids, sizes):
                writer.add(part, part_sizes)
            lengths = np.sum(np.array(sizes), axis=0) + self.pool.extra
            count.tokens += sum(map(len, ids))
            count.unknown += unknown
            count.shortened += shortened
            count.longest = max(count.longest, int(lengths.max()))
            count.over_512 += int((lengths > 512).sum())
            advance(done)

    def _write_labels(self, split: str, labels: Sequence[str]) -> None:
        prefix = self.path / "label" / split
        if self.task.regression:
            lines = "".join(f"{regression_text(label, self.task.divisor)}\n" for label in labels)
            Path(f"{prefix}.label").write_text(lines, encoding="utf-8")
            return
        place = {label: len(SPECIAL_SYMBOLS) + number for number, (label, _) in enumerate(self.labels)}
        ids = array("H")
        for label in labels:
            ids.extend((place[label], END))
        with IndexedWriter(prefix, "H") as writer:
            writer.add(ids, [2] * len(labels))

    def write_ids(self, split: str, rows: Sequence[Row]) -> None:
        """Which row of which file each example is: ids/SPLIT.tsv with the columns id, file, line."""
        (self.path / "ids").mkdir(exist_ok=True)
        with open(self.path / "ids" / f"{split}.tsv", "w", encoding="utf-8", newline="\n") as table:
            table.write("id\tfile\tline\n")
            for row in rows:
                # without the path before the task's folder, which differs from one machine to the next
                table.write(f"{row.id}\t{'/'.join(Path(row.file).parts[-2:])}\t{row.line}\n")

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


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `Folder.finish` wrote. Raises `UsageError` if the folder was not written by preprocess."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise located(folder, 0, f"holds no {MANIFEST}; make it with preprocess.py") from None
    except (OSError, ValueError) as error:
        raise located(path, 0, f"cannot be read ({error}); run preprocess again") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("rows"), dict) or "task" not in manifest:
        raise located(path, 0, "is not what preprocess.py writes; run it again")
    return manifest


def _ours(path: Path) -> bool:
    """Is it safe to replace: a folder that preprocess, or fairseq's recipe, wrote?"""
    names = {entry.name for entry in path.iterdir()}
    return not names or MANIFEST in names or ({"input0", "label"} <= names <= {"input0", "input1", "label"})


@contextlib.contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its place when the block ends well, and vanishes otherwise.

    Raises `UsageError` if ``target`` holds anything that preprocess did not write.
    """
    target = Path(os.path.realpath(target))  # behind a link, its folder is what is replaced
    if target.exists() and not target.is_dir():
        raise located(target, 0, "--out: a file is there; choose another name")
    if target.is_dir() and not _ours(target):
        raise located(
            target, 0, "--out: this folder holds other things than preprocess.py writes; choose another or remove it"
        )
    try:
        with whole_folder(target) as partial:
            yield partial
    except OSError as error:
        if error.filename is not None:
            raise
        # a full disk or a size limit: the system does not say where
        raise located(target, 0, f"cannot be written ({error.strerror}); nothing was kept") from None
