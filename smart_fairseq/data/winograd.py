"""Winograd sentences as candidates for a pronoun: what masked-language-model scoring is prepared from.

Kocijan et al. (2019): a candidate is scored in the sentence with the pronoun replaced by it. A row here has
four texts: the sentence with the candidate in the pronoun's place, its part before the candidate, its part up to the
candidate's end, and the part up to the pronoun's end of the sentence as it was. From their lengths in tokens follows
where candidate and pronoun stand, whatever the BPE.

WNLI says neither where the pronoun is nor what replaces it: sentence2 is the pronoun's clause of sentence1, with the
candidate in its place. `align` finds both. Other candidates are the rows of the same sentence and pronoun, and where
spaCy is installed the noun phrases of the sentence, as in fairseq's WSC example.
"""

import functools
import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UsageError, parse_json
from .lines import Row, Skip, located, read_lines, shown

NOUNS = "nouns"  # the split of the noun phrases

PRONOUNS = frozenset(
    "he him his himself she her hers herself it its itself they them their theirs themselves "
    "i me my mine we us our ours you your yours this that these those".split()
)
WORD = re.compile(r"\w+|'")
ARTICLES = frozenset(("the", "a", "an"))
# forms of a verb that differ because the candidate's number is not the pronoun's
AGREEING = {"were": "was", "are": "is", "have": "has", "do": "does"}
# no noun phrase begins with these
OPENING = frozenset("about around at behind beside by for from in into of on over through to under with".split())
SUBJECTS = frozenset("i he she it we they".split())
# in words of the candidate: a word of the clause that is another one in the sentence, one that only the sentence has,
# one that only the clause has; a word of the candidate that the sentence does not hold, or that makes it a clause
OTHER, LEFT_OUT, ADDED, NOT_THERE, CLAUSE = 4, 3, 7, 4, 3
MODELS = ("en_core_web_lg", "en_core_web_md", "en_core_web_sm")  # of spaCy, the first that is there

Words = Sequence[tuple[str, int, int]]


class Aligned(NamedTuple):
    """Where the pronoun stands in the sentence, from ``start`` to ``end``, and what replaces it."""

    start: int
    end: int
    candidate: str

    def texts(self, sentence: str) -> tuple[str, str, str, str]:
        """The four texts of a row."""
        before = sentence[: self.start] + self.candidate
        return before + sentence[self.end :], sentence[: self.start], before, sentence[: self.end]


def _words(text: str) -> Words:
    return [(found.group().lower(), found.start(), found.end()) for found in WORD.finditer(text)]


def _costs(clause: Sequence[str], sentence: Sequence[str]) -> list[list[int]]:
    """[l][i]: what makes the first l words of the clause of the words before i, from wherever they begin."""
    table = [[0] * (len(sentence) + 1)]
    for length, word in enumerate(clause, start=1):
        row, above = [ADDED * length], table[-1]
        for place, other in enumerate(sentence):
            row.append(min(above[place] + OTHER * (word != other), above[place + 1] + ADDED, row[-1] + LEFT_OUT))
        table.append(row)
    return table


def align(sentence: str, hypothesis: str) -> Aligned | None:
    """The pronoun of the sentence and the candidate that stands for it in the hypothesis; None where there is none.

    The words beside the candidate are the pronoun's neighbours, of which some may be edited ("regulate them" became
    "regular the settlers"): of all ways the one with the fewest edits and the shortest candidate.

    >>> align("The drain is clogged with hair. It has to be cleaned.", "The hair has to be cleaned.")
    Aligned(start=32, end=34, candidate='The hair')
    """
    outer, inner = _words(sentence), _words(hypothesis)
    a, b = ([AGREEING.get(word, word) for word, _, _ in words] for words in (outer, inner))
    left, right = _costs(b, a), _costs(b[::-1], a[::-1])
    found: list[tuple[int, int, int, int]] = []
    for i in (place for place, word in enumerate(a) if word in PRONOUNS):
        for start in range(len(b)):
            if b[start] in OPENING or (start and b[start - 1] in ARTICLES):
                continue
            if b[start : start + 2] == a[i : i + 2]:  # the pronoun itself
                continue
            for end in range(start + 1, len(b) + 1):
                edits, context = left[start][i] + right[len(b) - end][len(a) - i - 1], start + len(b) - end
                if edits < OTHER * context and b[end - 1] not in ARTICLES:
                    found.append((edits + _length(b[start:end], a), -i, -start, end))
    if not found:
        return None
    _, place, start, end = min(found)
    start, (first, last) = -start, outer[-place][1:]
    written = hypothesis[inner[start][1] : inner[end - 1][2]]
    return Aligned(first, last, _as_in(sentence, written, sentence[first]))


def _length(candidate: Sequence[str], sentence: Sequence[str]) -> int:
    missing = sum(word not in sentence for word in candidate if word not in (*ARTICLES, "'", "s"))
    return len(candidate) + NOT_THERE * missing + CLAUSE * sum(word in SUBJECTS for word in candidate)


def _place(words: Sequence[str], sentence: Sequence[str]) -> int | None:
    places = range(len(sentence) - len(words) + 1)
    return next((place for place in places if list(sentence[place : place + len(words)]) == list(words)), None)


def _as_in(sentence: str, candidate: str, pronoun: str) -> str:
    """The candidate in the case that it has in the sentence, or begun as the ``pronoun`` is where that begins one."""
    outer = _words(sentence)
    words = [word for word, _, _ in _words(candidate)]
    place = _place(words, [word for word, _, _ in outer])
    if place is not None:
        candidate = sentence[outer[place][1] : outer[place + len(words) - 1][2]]
    if words[0] in ARTICLES | PRONOUNS:  # no name, whatever it began
        candidate = candidate[0].lower() + candidate[1:]
    return candidate[0].upper() + candidate[1:] if pronoun.isupper() else candidate


def aligned_row(row: Row) -> Row | UsageError:
    """The row of WNLI, its texts sentence1 and sentence2, with the four texts of a candidate."""
    found = align(*row.texts)
    if found is None:
        message = f"sentence2 {shown(row.texts[1])} is no clause of sentence1 with its pronoun replaced"
        return located(Path(row.file), message, row.line)
    return row._replace(texts=found.texts(row.texts[0]))


# --- WSC of SuperGLUE ----------------------------------------------------------------------------------------------


def wsc_rows(path: Path) -> Iterator[object]:
    """The rows of WSC's jsonl, or what is wrong with them."""
    for number, line in read_lines(path):
        if not line.strip():
            yield Skip("blank line")
            continue
        try:
            yield _wsc_row(path, number, parse_json(line))
        except UsageError as error:
            yield error
        except (ValueError, LookupError, TypeError, AttributeError):
            needed = "an object with text, target (span1_text, span2_index, span2_text), idx and, but in test, label"
            yield located(path, f"is not {needed}", number)


def _wsc_row(path: Path, number: int, entry: Mapping[str, Any]) -> Row:
    text, target = entry["text"], entry["target"]
    candidate, index, pronoun = target["span1_text"].strip(" .,"), int(target["span2_index"]), target["span2_text"]
    words = text.split(" ")
    start = text.find(pronoun, sum(len(word) + 1 for word in words[:index]))
    begun = start >= 0 and index < len(words) and pronoun.split(" ")[0] in words[index]
    if not (begun and pronoun and candidate):
        wrong = f"span2_text {shown(pronoun)} does not stand at word {index}, span2_index, of {shown(text)}"
        raise located(path, wrong if candidate else "span1_text is empty", number)
    found = Aligned(start, start + len(pronoun), _as_in(text, candidate, pronoun[0]))
    label = entry.get("label")
    if label not in (None, True, False):
        raise located(path, f"label {shown(str(label))} is not true or false", number)
    return Row(str(entry["idx"]), found.texts(text), None if label is None else str(int(label)), (), str(path), number)


# --- other candidates ----------------------------------------------------------------------------------------------


@functools.cache
def noun_phrases() -> Callable[[str], list[str]] | None:
    """A function from a text to its noun phrases, by spaCy; None where it or its English model is not installed."""
    try:
        spacy = importlib.import_module("spacy")
    except ImportError:
        return None
    for name in MODELS:
        try:
            parse = spacy.load(name)
        except OSError:
            continue
        return lambda text: [chunk.text for chunk in parse(text).noun_chunks]
    return None


def noun_rows(rows: Sequence[Row], find: Callable[[str], list[str]]) -> list[Row]:
    """A row without a label for each noun phrase of the rows' sentences that is neither a pronoun nor in a candidate.

    A phrase that shares words with one of the file's candidates would be the same answer under another name.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(_around(row), []).append(row)
    found: list[Row] = []
    for (before, after), group in groups.items():
        taken = {word for row in group for word, _, _ in _words(_candidate(row))} - ARTICLES | PRONOUNS
        # with a candidate in the pronoun's place, which is no other candidate
        for phrase in find(group[0].texts[0]):
            words = {word for word, _, _ in _words(phrase)} - ARTICLES
            if words and not words & taken:
                taken |= words
                written = _as_in(group[0].texts[0], phrase, _candidate(group[0])[0] if not before.strip() else "x")
                pronoun = group[0].texts[3]  # with all before it
                aligned = Aligned(len(before), len(pronoun), written)
                id = f"{group[0].id}+{len(found)}"
                found.append(group[0]._replace(id=id, texts=aligned.texts(pronoun + after), label=None))
    return found


def add_noun_rows(rows: dict[str, list[Row]]) -> str:
    """Add the split `NOUNS` of all splits' sentences; what there is to say about it."""
    find = noun_phrases()
    if find is None:
        return "spaCy with en_core_web_lg, _md or _sm is not installed: the files' own candidates alone"
    found = noun_rows([row for split in rows.values() for row in split], find)
    if found:
        rows[NOUNS] = found
    return f"spaCy found {len(found)} more candidates"


def pronouns_to_rank(rows: Mapping[str, Sequence[Row]]) -> int:
    """How many pronouns of ``train`` have a right and a wrong candidate; a noun phrase is a wrong one."""
    labels: dict[tuple[str, str], set[str | None]] = {}
    for row in rows["train"]:
        labels.setdefault(_around(row), set()).add(row.label)
    for row in rows.get(NOUNS, ()):
        labels.get(_around(row), set()).add("0")
    return sum({"0", "1"} <= found for found in labels.values())


def _candidate(row: Row) -> str:
    return row.texts[2][len(row.texts[1]) :]


def _around(row: Row) -> tuple[str, str]:
    """What stands before the candidate, and after it."""
    return row.texts[1], row.texts[0][len(row.texts[2]) :]
