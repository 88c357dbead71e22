"""Readers: from an official file to rows, without side effects.

Text is what the official loaders see: a line ends at a line feed and nowhere else (not at U+2028, not at a carriage
return inside it), a carriage return before it belongs to the line end, a byte-order mark is not text, and quotes are
ordinary characters. Every row that is left out is counted with its reason in `Report`.
"""

import csv
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UsageError, parse_json
from .lines import Report, Row, Skip, as_number, located, read_lines, shown, source_path
from .ranking import in_groups
from .sentiment import rated_rows
from .tasks import Column, Source, Task
from .winograd import aligned_row, wsc_rows

BAD = "not in order (--skip-bad-rows)"  # why a row was left out


def _positions(path: Path, header: Sequence[str], columns: Sequence[Column]) -> dict[Column, int]:
    names = [name.strip().lower() for name in header]
    places = {name: place for place, name in enumerate(names)}
    for column in columns:
        if names.count(str(column).lower()) > 1:
            raise located(path, f"the header has the column {shown(str(column))} twice; rename one of them", 1)
        if str(column).lower() not in places:
            message = (
                f"the header has no column {shown(str(column))}, only {shown(', '.join(header), 120)}; "
                "this is not the task's file, or not in a form in which it is distributed"
            )
            raise located(path, message, 1)
    return {column: places[str(column).lower()] for column in columns}


def _label(task: Task, source: Source, path: Path, line: int, word: str) -> str | None:
    """The task's label for the file's word; None if the file hides it."""
    word = source.label_words.get(word, word)
    if word in source.hidden_labels:
        return None
    if task.regression:
        if not 0.0 <= as_number(word) <= task.divisor:
            raise located(path, f"score {shown(word)} is not a number from 0 to {task.divisor:g}", line)
    elif word not in task.labels:
        allowed = ", ".join(dict.fromkeys([*source.label_words, *task.labels, *source.no_labels]))
        raise located(path, f"label {shown(word)} is not one of {task.name}'s: {allowed}", line)
    return word


def _cells(form: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """(number of its last line from 1, cells) of each row of a table."""
    if form != "csv":
        for number, line in read_lines(path):
            yield number, line.split("\t")
        return
    csv.field_size_limit(sys.maxsize)  # a text may be a whole book; the default is 131,072 characters
    table = csv.reader((f"{line}\n" for _, line in read_lines(path)), strict=True)
    try:
        for cells in table:
            yield table.line_num, cells
    except csv.Error as error:
        raise located(path, f"no comma-separated row ({error})", table.line_num) from None


def columns_of(form: str, path: Path) -> list[str]:
    """The names in the header of a table, or the keys of the first object."""
    if form == "jsonl":
        filled = ((number, line) for number, line in read_lines(path) if line.strip())
        return list(_object(path, *next(filled, (1, ""))))
    names = [name.strip() for name in next(_cells(form, path))[1]]
    if form == "csv" and len(names) == 1 and ";" in names[0]:
        raise located(path, "columns are separated by semicolons, and commas are needed", 1)
    return names


def labels_of(source: Source, path: Path, skip_bad_rows: bool) -> "Counter[str]":
    """How often each label of a file comes; ``skip_bad_rows`` as for `read_source`."""
    read = _object_rows if source.form == "jsonl" else _table_rows
    rows = list(read(source, path))
    bad = next((row for row in rows if not isinstance(row, Row | Skip)), None)
    if bad is not None and not skip_bad_rows:
        raise _not_in_order(bad)
    if rows and not any(isinstance(row, Row) for row in rows):
        raise _all_left_out(path, len(rows), rows[0])
    return Counter(row.label for row in rows if isinstance(row, Row) and row.label)


def _all_left_out(path: Path, count: int, first: object) -> UsageError:
    return located(path, f"holds no rows but {count} that were left out; the first: {first}")


def _not_in_order(error: object) -> UsageError:
    return UsageError(f"{error} (--skip-bad-rows leaves such rows out and counts them)")


def _table_rows(source: Source, path: Path) -> Iterator[object]:
    lines = _cells(source.form, path)
    columns: list[Column] = [*source.texts, *([] if source.label is None else [source.label])]
    extra: list[Column] = [*source.votes, *([] if source.id is None else [source.id])]
    width: tuple[int, ...] = source.columns
    if source.form == "plain":
        places = {column: int(column) for column in [*columns, *extra]}
    else:
        _, header = next(lines)
        # annotators' labels and ids are read where they are
        extra = [column for column in extra if str(column).lower() in {name.strip().lower() for name in header}]
        places = _positions(path, header, [*columns, *extra])
        width = (len(header),)
    texts = [places[column] for column in source.texts]
    votes = [places[column] for column in source.votes if column in places]
    label = None if source.label is None else places[source.label]
    identity = None if source.id is None else places.get(source.id)
    kind = "comma" if source.form == "csv" else "tab"
    for number, cells in lines:
        if len(cells) not in width:
            if not any(cell.strip() for cell in cells):
                yield Skip("blank line")
                continue
            expected = " or ".join(map(str, width))
            if source.loose:
                yield Skip(f"{'fewer' if len(cells) < width[0] else 'more'} than {expected} columns")
            else:
                yield located(path, f"{len(cells)} {kind}-separated columns, and {expected} are needed", number)
            continue
        name = "" if identity is None else cells[identity]
        word = None if label is None else cells[label]
        cast = [cells[place].strip() for place in votes if cells[place].strip()]
        yield _raw_row(name, [cells[place] for place in texts], word, cast, path, number)


def _object_rows(source: Source, path: Path) -> Iterator[object]:
    for number, line in read_lines(path):
        try:
            yield _object_row(source, path, number, line) if line.strip() else Skip("blank line")
        except UsageError as error:
            yield error


def _object(path: Path, number: int, line: str) -> dict[Any, Any]:
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise located(path, f"not JSON ({error}); each line must be one object", number) from None
    if not isinstance(entry, dict):
        raise located(path, f"a JSON {type(entry).__name__}; each line must be one object", number)
    return entry


def _object_row(source: Source, path: Path, number: int, line: str) -> Row:
    entry = _object(path, number, line)
    for key in (source.label, source.id) if source.numbers else ():
        if isinstance(entry.get(key), int | float) and not isinstance(entry[key], bool):
            whole = isinstance(entry[key], float) and entry[key].is_integer()
            entry[key] = str(int(entry[key]) if whole else entry[key])
    keys = [key for key in (*source.texts, source.label) if key is not None]
    wrong = [key for key in keys if not isinstance(entry.get(key), str)]
    if source.label in wrong and entry.get(source.label) is None and "" in source.hidden_labels:
        wrong.remove(source.label)
    if wrong:
        found = type(entry[wrong[0]]).__name__ if wrong[0] in entry else "nothing"
        raise located(path, f"key {shown(str(wrong[0]))} holds {found}, and a string is needed", number)
    votes: list[str] = []
    for key in source.votes:
        value = entry.get(key, [])
        if not isinstance(value, list):
            raise located(path, f"key {shown(str(key))} holds {type(value).__name__}, and a list is needed", number)
        votes += [str(vote) for vote in value if vote]
    word = None if source.label is None else entry.get(source.label) or ""
    named = entry.get(source.id)
    identity = "" if named is None else str(named)
    texts = [entry[key] for key in source.texts]
    if any("\0" in text for text in (identity, *texts)):
        raise located(path, "holds a zero byte, and text is needed", number)
    return _raw_row(identity, texts, word, votes, path, number)


def _raw_row(
    identity: str, texts: Sequence[str], word: str | None, votes: Sequence[str], path: Path, number: int
) -> Row:
    # a carriage return inside a text is white space to every loader that keeps the row whole
    clean = tuple(text.replace("\r", " ") for text in texts)
    identity = " ".join(identity.split())  # ids are written into tables
    return Row(identity, clean, None if word is None else word.strip(), tuple(votes), str(path), number)


def read_dev_ids(path: Path) -> set[tuple[str, str]]:
    """The pairs of ids of MRPC's development part."""
    pairs = set()
    for number, line in read_lines(path):
        cells = line.split("\t")
        if len(cells) != 2:
            raise located(path, f"{len(cells)} tab-separated columns, and 2 are needed: a pair of ids", number)
        pairs.add((cells[0].strip(), cells[1].strip()))
    return pairs


def _dev_ids(folder: Path) -> Path | None:
    """The list of MRPC's development part."""
    return source_path(folder, "dev_ids.tsv") or source_path(folder, "mrpc_dev_ids.tsv")


def _dev_part(path: Path) -> Iterator[bool]:
    """For each row of the MRPC file after its header: is it in the development part?"""
    listed = _dev_ids(path.parent)
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
    first: object = None  # that is left out
    for name in source.files:
        path = source_path(folder, name)
        if path is None:
            raise located(folder / name, "is missing; download the data again")
        report.files.append(str(path))
        readers: dict[str, Callable[[Source, Path], Iterator[object]]] = {
            "jsonl": _object_rows,
            "rated": partial(rated_rows, task),
            "wsc": lambda _, path: wsc_rows(path),
        }
        read = readers.get(source.form, _table_rows)
        in_dev = _dev_part(path) if source.dev_ids else None
        for item in read(source, path):
            if in_dev is not None and next(in_dev) != (source.dev_ids == "dev"):
                continue
            if isinstance(item, Row):
                item = _finished(task, source, path, item, len(rows) + report.left_out[BAD])
            if isinstance(item, Row):
                rows.append(item)
                continue
            first = first or item
            if isinstance(item, Skip):
                report.left_out[str(item)] += 1
            elif skip_bad_rows:
                report.left_out[BAD] += 1
            else:
                raise _not_in_order(item)
    if not rows and first is not None:
        raise _all_left_out(Path(report.files[0]), report.left_out.total(), first)
    if not rows:
        raise located(Path(report.files[0]), "holds no rows; download it again")
    if task.ranking:
        rows = in_groups(rows, report)
        if not rows:
            what = f"no {source.texts[0]} of it has both a right and a wrong candidate"
            raise located(Path(report.files[0]), f"holds no group to rank: {what}")
    return rows, report


def _finished(task: Task, source: Source, path: Path, row: Row, position: int) -> object:
    """The row with its id and its label in the task's words, or why it is no row of the data set."""
    if row.label is not None and row.label in source.no_labels:
        return Skip(f"gold label {row.label!r}: the annotators did not agree")
    if task.candidates and len(row.texts) == 2:
        aligned = aligned_row(row)
        if isinstance(aligned, UsageError):
            return aligned
        row = aligned
    if not all(text.strip() for text in row.texts) and source.loose:
        return Skip("an empty text")
    try:
        label = None if row.label is None else _label(task, source, path, row.line, row.label)
    except UsageError as error:
        return error
    return row._replace(id=row.id or str(position), label=label)


def available(source: Source, folder: Path) -> bool:
    """Are all files of this form there (and for MRPC's development part, the list of its ids)?"""
    if source.dev_ids == "dev" and _dev_ids(folder) is None:
        return False
    return all(source_path(folder, name) for name in (*source.files, source.ratings) if name)


def find_sources(task: Task, data_dir: Path) -> dict[str, tuple[Source, Path]]:
    """The splits of a task that a folder holds, each in the first form that is there.

    ``data_dir`` is the folder of all tasks or that of this task. A split in another form than the rest, or from another
    folder, is not mixed in unless nothing else is there.
    """
    folders = [data_dir / name for name in task.folders]
    # some collections keep AX.tsv beside the folders
    if task.name == "AX" or any(Path(name).name == data_dir.name for name in task.folders):
        folders.append(data_dir)
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
        forms = [source for sources in task.splits.values() for source in sources]
        names = sorted({name for source in forms for name in (*source.files, source.ratings) if name})
        expected = ", ".join(names[:6]) + (" ..." if names[6:] else "")
        message = f"--data-dir holds no files of {task.name}; expected {expected} in {' or '.join(task.folders)}"
        raise located(data_dir / task.folders[0], message)
    rows: dict[str, list[Row]] = {}
    reports: dict[str, Report] = {}
    for split, (source, folder) in found.items():
        rows[split], reports[split] = read_source(task, source, folder, skip_bad_rows)
        if not split.startswith("train"):
            check_unique(rows[split])
    return rows, reports


def check_unique(rows: Sequence[Row]) -> None:
    """Raise `UsageError` at an id that was there: predictions are found by their ids."""
    seen: dict[str, Row] = {}
    for row in rows:
        first = seen.setdefault(row.id, row)
        if first is not row:
            message = f"id {shown(row.id)} was on line {first.line} already; ids of a part to predict must differ"
            raise located(Path(row.file), message, row.line)
