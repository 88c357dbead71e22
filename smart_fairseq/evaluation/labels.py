"""What the rows of a data folder are compared with: gold labels, and the annotators' distribution."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.binarize import read_classes, read_targets
from ..data.folders import label_order, read_ids
from ..data.lines import Row, as_number, located, read_lines, shown
from ..data.tasks import Task


def gold_labels(folder: Path, split: str, task: Task) -> list[str]:
    """The labels of a split, in the order of its rows; scores as in the official file. Raises without labels."""
    path = folder / "label" / f"{split}.{'label' if task.regression else 'idx'}"
    if not path.is_file():
        raise located(path, f"is missing: {split} has no labels; choose another --split")
    if task.regression:
        return [str(target * task.divisor) for target in read_targets(path)]
    order = label_order(folder, len(task.labels))
    if sorted(order) != sorted(task.labels):
        what = f"holds the labels {', '.join(order)}, and {task.name} has {', '.join(task.labels)}"
        raise located(folder / "label" / "dict.txt", f"{what}; run preprocess again")
    numbers = read_classes(folder / "label" / split)
    if not all(0 <= number < len(order) for number in numbers):
        raise located(folder / "label" / f"{split}.bin", "holds labels beyond dict.txt; run preprocess again")
    return [order[number] for number in numbers]


def vote_shares(rows: Sequence[Row], labels: Sequence[str]) -> np.ndarray:
    """The shares of annotators for each label, [N, K]; rows that none labelled are 0. Raises for other labels."""
    shares = np.zeros((len(rows), len(labels)))
    for place, row in enumerate(rows):
        strange = next((vote for vote in row.votes if vote not in labels), None)
        if strange is not None:
            message = f"annotator's label {shown(strange)} is not one of {', '.join(labels)}"
            raise located(Path(row.file), message, row.line)
        shares[place] = [row.votes.count(label) / max(len(row.votes), 1) for label in labels]
    return shares


def write_shares(folder: Path, split: str, labels: Sequence[str], shares: np.ndarray) -> None:
    """What `annotator_shares` reads."""
    path = folder / "annotators" / f"{split}.tsv"
    path.parent.mkdir(exist_ok=True)
    lines = ["\t".join(labels), *("\t".join(f"{share:.9g}" for share in row) for row in shares)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def annotator_shares(folder: Path, split: str, classes: Sequence[str]) -> np.ndarray | None:
    """The shares of annotators for each of ``classes``, [N, K], from annotators/SPLIT.tsv; None without that file.

    Its header names the classes in any order, beside other columns, which are left alone but for ``id``; a line for
    each row of the split holds shares with the sum 1, or with the sum 0 where nobody labelled the row. Raises
    `UsageError` with file and line for anything else.
    """
    path = folder / "annotators" / f"{split}.tsv"
    if not path.is_file():
        return None
    (_, first), *lines = read_lines(path)
    header, ids = first.split("\t"), read_ids(folder, split)
    if not set(classes) <= set(header):
        raise located(path, f"the header is {shown(first)}; it must name {', '.join(classes)}", 1)
    if len(lines) != len(ids):
        raise located(path, f"holds {len(lines)} rows, and {split} has {len(ids)}")
    shares = np.zeros((len(ids), len(classes)))
    for row, identity, (number, line) in zip(shares, ids, lines):
        cells = dict(zip(header, line.split("\t")))
        if cells.get("id", identity) != identity:
            raise located(
                path, f"is about the row {shown(cells['id'])}, and {split} has {shown(identity)} here", number
            )
        row[:] = [as_number(cells.get(name, "")) for name in classes]
        if not (row >= 0).all() or min(abs(row.sum() - 1), row.sum()) > 1e-3:
            raise located(path, f"{len(classes)} shares with the sum 1 are needed, not {shown(line)}", number)
    return shares
