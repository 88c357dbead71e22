"""Readers: from an official file to rows, without side effects.

Text is what the official loaders see: a line ends at a line feed and nowhere else (not at U+2028, not at a carriage
return inside it), a carriage return before it belongs to the line end, a byte-order mark is not text, and quotes are
ordinary characters. Every row that is left out is counted with its reason in `Report`.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..errors import UsageError
from .tasks import Column, Source, Task

UTF8_MARK = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """One example."""

    id: str
    texts: tuple[str, ...]
    label: str | None  # the task's word, or a number as it stands in the file; None where it is not published
    votes: tuple[str, ...] = ()
    file: str = ""
    line: int = 0


@dataclass
class Report:
    """What became of the lines of one split."""

    files: list[str] = field(default_factory=list)
    rows: int = 0
    left_out: "Counter[str]" = field(default_factory=Counter)  # reason to count


def located(path: Path, line: int, message: str) -> UsageError:
    """An error at a place: ``FILE:LINE: message``; line 0 stands for the file as a whole."""
    return UsageError(f"{path}:{line}: {message}" if line else f"{path}: {message}")


def shown(value: str, limit: int = 60) -> str:
    """The value in quotes, on one line, shortened."""
    return repr(value if len(value) <= limit else value[: limit - 3] + "...")


def source_path(folder: Path, name: str) -> Path | None:
    """The file, plain or compressed with gzip, or None."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_bytes(path: Path) -> bytes:
    """The whole file, decompressed; refuses what is not text, naming what it is instead."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise located(path, 0, f"not a complete gzip file ({error}); download it again") from None
    except IsADirectoryError:
        raise located(path, 0, "is a folder, and a file is needed") from None
    except OSError as error:
        raise located(path, 0, f"cannot be read ({error.strerror})") from None
    if not data.strip():
        raise located(path, 0, "is empty; download it again")
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        raise located(path, 0, "is a web page, not data: the download went wrong; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise located(path, 0, "is a Git LFS pointer, not the file itself; run `git lfs pull` where it came from")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise located(path, 0, "is UTF-16 text, and UTF-8 is needed; convert it with `iconv -f UTF-16 -t UTF-8`")
    if data[:2] == b"PK" or data[:2] == b"\x1f\x8b":
        raise located(path, 0, "is an archive; unpack it first")
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise located(path, line, "holds a zero byte: this is a binary file, and text is needed")
    return data


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of each line."""
    lines = read_bytes(path).removeprefix(UTF8_MARK).removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix(b"\r")
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            message = f"byte 0x{byte:02x} at position {error.start + 1} is not UTF-8; convert the file to UTF-8"
            raise located(path, number, message) from None


def _positions(path: Path, header: Sequence[str], columns: Sequence[Column]) -> dict[Column, int]:
    places = {name.strip().lower(): place for place, name in reversed(list(enumerate(header)))}
    for column in columns:
        if str(column).lower() not in places:
            message = (
                f"the header has no column {shown(str(column))}, only {shown(', '.join(header), 120)}; "
                "this is not the task's file, or not in a form in which it is distributed"
            )
            raise located(path, 1, message)
    return {column: places[str(column).lower()] for column in columns}


def _label(task: Task, source: Source, path: Path, line: int, word: str) -> str | None:
    """The task's label for the file's word; None if the file hides it."""
    word = source.label_words.get(word, word)
    if word in source.hidden_labels:
        return None
    if task.regression:
        try:
            value = float(word)
        except ValueError:
            value = float("nan")
        if not 0.0 <= value <= task.divisor:
            raise located(path, line, f"score {shown(word)} is not a number from 0 to {task.divisor:g}")
    elif word not in task.labels:
        allowed = ", ".join(dict.fromkeys([*source.label_words, *task.labels, *source.no_labels]))
        raise located(path, line, f"label {shown(word)} is not one of {task.name}'s: {allowed}")
    return word


class _Skip(Exception):
    """This row is left out, for this reason."""


# from a line to id, texts, the file's word for the label, votes; raises `_Skip`, or `UsageError` with number and line
Fields = tuple[str, list[str], str | None, list[str]]
Parser = Callable[[int, str], Fields]


def _table_parser(source: Source, path: Path, lines: Iterator[tuple[int, str]]) -> Parser:
    """For lines of cells; takes the header from ``lines``, where the form has one."""
    columns: list[Column] = [*source.texts, *([] if source.label is None else [source.label])]
    extra: list[Column] = [*source.votes, *([] if source.id is None else [source.id])]
    width: tuple[int, ...] = source.columns
    if source.form == "plain":
        places = {column: int(column) for column in [*columns, *extra]}
    else:
        header = next(lines)[1].split("\t")
        # annotators' labels and ids are read where they are
        extra = [column for column in extra if str(column).lower() in {name.strip().lower() for name in header}]
        places = _positions(path, header, [*columns, *extra])
        width = (len(header),)

    def parse(number: int, line: str) -> Fields:
        cells = line.split("\t")
        if len(cells) not in width:
            expected = " or ".join(map(str, width))
            if not line.strip():
                raise _Skip("blank line")
            if source.loose:
                raise _Skip(f"{'fewer' if len(cells) < width[0] else 'more'} than {expected} columns")
            raise located(path, number, f"{len(cells)} tab-separated columns, and {expected} are needed")
        identity = cells[places[source.id]] if source.id is not None and source.id in places else ""
        word = None if source.label is None else cells[places[source.label]]
        votes = [cells[places[column]].strip() for column in source.votes if column in places]
        return identity, [cells[places[column]] for column in source.texts], word, [vote for vote in votes if vote]

    return parse


def _object_parser(source: Source, path: Path) -> Parser:
    """For lines of JSON objects."""
    keys = [key for key in (*source.texts, source.label) if key is not None]

    def parse(number: int, line: str) -> Fields:
        if not line.strip():
            raise _Skip("blank line")
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise located(path, number, f"not JSON ({error}); each line must be one object") from None
        if not isinstance(entry, dict):
            raise located(path, number, f"a JSON {type(entry).__name__}, and an object is needed")
        wrong = [key for key in keys if not isinstance(entry.get(key), str)]
        if source.label in wrong and entry.get(source.label) is None and "" in source.hidden_labels:
            wrong.remove(source.label)
        if wrong:
            found = type(entry[wrong[0]]).__name__ if wrong[0] in entry else "nothing"
            raise located(path, number, f"key {shown(str(wrong[0]))} holds {found}, and a string is needed")
        votes: list[str] = []
        for key in source.votes:
            value = entry.get(key, [])
            if not isinstance(value, list):
                message = f"key {shown(str(key))} holds {type(value).__name__}, and a list is needed"
                raise located(path, number, message)
            votes = [str(vote) for vote in value if vote]
        identity = "" if source.id is None else str(entry.get(source.id, ""))
        word = None if source.label is None else entry.get(source.label) or ""
        return identity, [entry[key] for key in source.texts], word, votes

    return parse


def _row(task: Task, source: Source, path: Path, number: int, fields: Fields) -> Row:
    """The row with its label in the task's words. Raises as a `Parser` does."""
    identity, texts, word, votes = fields
    word = None if word is None else word.strip()
    if word is not None and word in source.no_labels:
        raise _Skip(f"gold label {word!r}: the annotators did not agree")
    if source.loose and not all(text.strip() for text in texts):
        raise _Skip("an empty text")
    label = None if word is None else _label(task, source, path, number, word)
    # a carriage return inside a text is white space to every loader that keeps the row whole
    clean = tuple(text.replace("\r", " ") for text in texts)
    # ids are written into tables
    return Row(" ".join(identity.split()), clean, label, tuple(votes), str(path), number)


def read_dev_ids(path: Path) -> set[tuple[str, str]]:
    """The pairs of ids of MRPC's development part."""
    pairs = set()
    for number, line in read_lines(path):
        cells = line.split("\t")
        if len(cells) != 2:
            raise located(path, number, f"{len(cells)} tab-separated columns, and 2 are needed: a pair of ids")
        pairs.add((cells[0].strip(), cells[1].strip()))
    return pairs


def _dev_part(path: Path) -> Iterator[bool]:
    """For each row of the MRPC file after its header: is it in the development part?"""
    listed = source_path(path.parent, "dev_ids.tsv") or source_path(path.parent, "mrpc_dev_ids.tsv")
    pairs = read_dev_ids(listed) if listed else set()
    lines = read_lines(path)
    _, first = next(lines)
    places = _positions(path, first.split("\t"), ("#1 ID", "#2 ID"))
    for _, line in lines:
        cells = line.split("\t")
        ids = tuple(cells[place] if place < len(cells) else "" for place in places.values())
        yield ids in pairs


def read_source(task: Task, source: Source, folder: Path, skip_bad_rows: bool = False) -> tuple[list[Row], Report]:
    """All rows of one split in one form.

    Ids are the file's where it has them, otherwise positions from 0. Raises `UsageError` with file and line at the
    first row that is not in order, unless ``skip_bad_rows``: then it is counted like the rows that the official loaders
    drop.
    """
    report = Report()
    rows: list[Row] = []
    for name in source.files:
        path = source_path(folder, name)
        if path is None:
            raise located(folder / name, 0, "is missing; download the data again")
        report.files.append(str(path))
        lines = read_lines(path)
        parse = _object_parser(source, path) if source.form == "jsonl" else _table_parser(source, path, lines)
        in_dev = _dev_part(path) if source.dev_ids else None
        for number, line in lines:
            if in_dev is not None and next(in_dev) != (source.dev_ids == "dev"):
                continue
            try:
                row = _row(task, source, path, number, parse(number, line))
                rows.append(row._replace(id=row.id or str(len(rows))))
            except _Skip as skip:
                report.left_out[str(skip)] += 1
            except UsageError as error:
                if not skip_bad_rows:
                    raise UsageError(f"{error} (--skip-bad-rows leaves such rows out and counts them)") from None
                report.left_out["not in order (--skip-bad-rows)"] += 1
    if not rows:
        raise located(Path(report.files[0]), 0, "holds no rows; download it again")
    report.rows = len(rows)
    return rows, report


def available(source: Source, folder: Path) -> bool:
    """Are all files of this form there (and for MRPC's development part, the list of its ids)?"""
    if source.dev_ids == "dev" and not (source_path(folder, "dev_ids.tsv") or source_path(folder, "mrpc_dev_ids.tsv")):
        return False
    return all(source_path(folder, name) for name in source.files)


def find_sources(task: Task, data_dir: Path) -> dict[str, tuple[Source, Path]]:
    """The splits of a task that a folder holds, each in the first form that is there.

    ``data_dir`` is the folder of all tasks or that of this task. A split in another form than the rest, or from another
    folder, is not mixed in unless nothing else is there.
    """
    folders = [data_dir / name for name in task.folders]
    if any(Path(name).name == data_dir.name for name in task.folders):
        folders.append(data_dir)
    if task.name == "AX":
        folders.append(data_dir)  # some collections keep AX.tsv beside the folders
    for folder in folders:
        found = {split: [s for s in sources if available(s, folder)] for split, sources in task.splits.items()}
        if any(found.values()):
            return {split: (sources[0], folder) for split, sources in found.items() if sources}
    return {}


def read_task(
    task: Task, data_dir: Path, skip_bad_rows: bool = False
) -> tuple[dict[str, list[Row]], dict[str, Report]]:
    """Rows and report of every split that ``data_dir`` holds. Raises `UsageError` if it holds none."""
    found = find_sources(task, data_dir)
    if not found:
        if not data_dir.is_dir():
            raise located(data_dir, 0, "--data-dir: no such folder")
        names = sorted({name for sources in task.splits.values() for source in sources for name in source.files})
        expected = ", ".join(names[:6]) + (" ..." if names[6:] else "")
        message = f"--data-dir holds no files of {task.name}; expected {expected} in {' or '.join(task.folders)}"
        raise located(data_dir / task.folders[0], 0, message)
    rows: dict[str, list[Row]] = {}
    reports: dict[str, Report] = {}
    for split, (source, folder) in found.items():
        rows[split], reports[split] = read_source(task, source, folder, skip_bad_rows)
        if split.startswith("test"):
            _check_unique(rows[split])
    return rows, reports


def _check_unique(rows: Sequence[Row]) -> None:
    seen: dict[str, Row] = {}
    for row in rows:
        first = seen.setdefault(row.id, row)
        if first is not row:
            message = f"id {shown(row.id)} was on line {first.line} already; ids of a test part must differ"
            raise located(Path(row.file), row.line, message)
