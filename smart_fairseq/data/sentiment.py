"""Sentences that 15 and more people rated from -4 (extremely negative) to 4: movie and product reviews, news, tweets.

Hutto and Gilbert (2014), VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text. ICWSM.
Two UTF-8 files a domain, without headers: id, mean, text; and id, mean, standard deviation, list of ratings. The source
has no split. Here SHA-256 of the document that a sentence is from, or else of its words, puts it into one of three.
"""

import hashlib
import html
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import UsageError, parse_json
from .lines import Row, Skip, as_number, located, read_lines, shown, source_path
from .tasks import Source, Task

EXTREME = 4  # ratings lie in -EXTREME..EXTREME
TENTHS = {8: "valid", 9: "test"}  # of the rows, by hash; the others train


def split_of(file: str, identity: str, text: str) -> str:
    """The split of a sentence: ids as in ``12_3`` name a document, which stays whole; others go by their words.

    Sentences that differ in case, punctuation or white space alone are in one split, in whichever file they stand.
    """
    document, underscore, _ = identity.partition("_")
    key = f"{file} {document}" if underscore else " ".join(re.findall(r"\w+", text.casefold())) or text
    return TENTHS.get(int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 10, "train")


def shares(ratings: Sequence[int]) -> tuple[float, float]:
    """The shares of raters on the negative and on the positive side; a zero counts half for each."""
    positive = sum((rating > 0) + (rating == 0) / 2 for rating in ratings) / len(ratings)
    return 1 - positive, positive


def annotators_table(rows: Sequence[Row]) -> str:
    """A header, and a line for each row: id, `shares`, number of raters, their mean (-4 to 4), their ratings."""
    lines = ["id\tnegative\tpositive\traters\tmean\tratings"]
    for row in rows:
        ratings = [int(vote) for vote in row.votes]
        negative, positive = shares(ratings)
        mean = sum(ratings) / len(ratings)
        lines.append(f"{row.id}\t{negative:.6f}\t{positive:.6f}\t{len(ratings)}\t{mean:.6f}\t{' '.join(row.votes)}")
    return "\n".join(lines) + "\n"


def _ratings(path: Path) -> dict[str, tuple[int, ...] | UsageError]:
    found: dict[str, tuple[int, ...] | UsageError] = {}
    for number, line in read_lines(path):
        cells = line.split("\t")
        try:
            values = parse_json(cells[3])
        except (IndexError, ValueError):
            values = None
        right = isinstance(values, list) and values and all(type(v) is int and abs(v) <= EXTREME for v in values)
        if cells[0] in found:
            found[cells[0]] = located(path, f"id {shown(cells[0])} was there already", number)
        elif right:
            found[cells[0]] = tuple(values)
        else:
            allowed = f"a list of whole numbers from -{EXTREME} to {EXTREME}, in column 4 of 4"
            found[cells[0]] = located(path, f"{shown(cells[-1])} is not {allowed}", number)
    return found


def _label(task: Task, ratings: Sequence[int]) -> str:
    total, count = sum(ratings), len(ratings)
    if task.regression:
        return f"{total / count + EXTREME:.6f}"
    if 2 * abs(total) < count:
        return ""
    return task.labels[total > 0]


def _read(task: Task, source: Source, path: Path) -> Iterator[tuple[str, Row | Skip | UsageError]]:
    """The split and the row of each line of the file of texts; the label of the middle is empty."""
    beside = source_path(path.parent, source.ratings)
    if beside is None:
        raise located(path.parent / source.ratings, "is missing; download the data again")
    ratings = _ratings(beside)
    for number, line in read_lines(path):
        cells = line.split("\t")
        if len(cells) != 3:
            yield "train", located(path, f"{len(cells)} tab-separated columns, and 3 are needed", number)
            continue
        text = html.unescape(html.unescape(cells[2])).strip()  # some news are escaped twice
        split = split_of(source.files[0], cells[0], text)
        given, mean = ratings.get(cells[0]), as_number(cells[1])
        if isinstance(given, UsageError):
            yield split, given
        elif given is None:
            yield split, located(path, f"id {shown(cells[0])} has no ratings in {beside.name}", number)
        elif not abs(mean) <= EXTREME:
            message = f"mean {shown(cells[1])} is not a number from -{EXTREME} to {EXTREME}"
            yield split, located(path, message, number)
        elif not text:
            yield split, located(path, "the text is empty", number)
        elif abs(mean - sum(given) / len(given)) >= 1e-6:
            yield split, Skip("the mean beside the text is not that of the ratings")
        else:
            yield split, Row(cells[0], (text,), _label(task, given), tuple(map(str, given)), str(path), number)


def _words(row: Row) -> str:
    """Equal for equal sentences."""
    return " ".join(row.texts[0].casefold().split())


def rated_rows(task: Task, source: Source, path: Path) -> Iterator[object]:
    """The rows of one split, with ratings as votes; what is left out as `Skip`, what is not in order as an error."""
    read = list(_read(task, source, path))
    labels: dict[str, set[str | None]] = {}
    for _, item in read:
        if isinstance(item, Row):
            labels.setdefault(_words(item), set()).add(item.label)
    seen: set[str] = set()
    for split, item in read:
        if isinstance(item, Row):
            words = _words(item)
            if len(labels[words]) > 1:
                item = Skip("the same sentence with another label")
            elif words in seen:
                item = Skip("the same sentence again")
            elif not item.label:
                item = Skip("mean between -0.5 and 0.5")
            seen.add(words)
        if split == source.part:
            yield item
