"""Groups of a ranking task: rows with the same first text, of which the candidates that are right have the label 1."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import refuse
from .lines import Report, Row, located, read_lines, shown
from .tasks import RIGHT


def in_groups(rows: Sequence[Row], report: Report) -> list[Row]:
    """The rows one group after the other, in the order of the groups' first ones.

    Groups whose candidates are all right, or all wrong, leave nothing to choose: they are left out and counted. Where
    the labels are hidden all stay.
    """
    by_text: dict[str, list[Row]] = {}
    for row in rows:
        by_text.setdefault(row.texts[0], []).append(row)
    kept: list[Row] = []
    without: dict[str, list[int]] = {}
    for group in by_text.values():
        labels = {row.label for row in group}
        if len(labels) == 2 or None in labels:
            kept += group
        else:
            without.setdefault("wrong" if RIGHT in labels else "right", []).append(len(group))
    for what, sizes in without.items():
        report.left_out[f"no {what} candidate in {len(sizes)} groups"] = sum(sizes)
    return kept


def sizes_of(rows: Sequence[Row]) -> list[int]:
    """The sizes of groups that stand one after the other."""
    return [len(list(group)) for _, group in itertools.groupby(rows, key=lambda row: row.texts[0])]


def parts(sizes: Sequence[int]) -> Iterator[slice]:
    """Where the rows of each group stand, by the groups' sizes."""
    end = 0
    for size in sizes:
        yield slice(end, end := end + size)


def in_words(rows: Sequence[Row]) -> str:
    """How many groups there are, and what guessing scores on them."""
    sizes, right = sizes_of(rows), [row.label == RIGHT for row in rows]
    said = f"{len(sizes)} groups of {min(sizes)} to {max(sizes)} candidates"
    if all(row.label is not None for row in rows):
        shares = [sum(right[part]) / size for part, size in zip(parts(sizes), sizes)]
        said += f", of whom guessing finds {100 * sum(shares) / len(shares):.1f} %"
    elif 1 in sizes:
        said += f", {sizes.count(1)} of them of a single one"
    return said


def write_groups(folder: Path, split: str, rows: Sequence[Row]) -> None:
    """Write groups/SPLIT.sizes: a line for each group, its number of rows."""
    (folder / "groups").mkdir(exist_ok=True)
    text = "".join(f"{size}\n" for size in sizes_of(rows))
    (folder / "groups" / f"{split}.sizes").write_text(text, encoding="utf-8")


def read_groups(folder: Path, split: str, rows: int) -> list[int]:
    """The sizes of a split's groups. Raises `UsageError` where they do not make up its ``rows``."""
    path = folder / "groups" / f"{split}.sizes"
    if not path.is_file():
        raise located(path, "is missing; run preprocess again")
    sizes = []
    for number, line in read_lines(path):
        if not line.isdecimal() or int(line) == 0:
            raise located(path, f"{shown(line)} is no number of rows; run preprocess again", number)
        sizes.append(int(line))
    if sum(sizes) != rows:
        refuse(path, f"has groups of {sum(sizes)} rows together, and {split} has {rows}", "run preprocess again")
    return sizes
