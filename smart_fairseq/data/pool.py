"""Texts to ids in several processes, in order."""

import functools
import os
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from ..errors import UsageError
from .bpe import END, UNKNOWN, BpeFiles, Encoder, Vocabulary, load_vocabulary, make_encoder
from .lines import Row

CHUNK = 512  # rows per unit of work

# ids per input, sizes per input, unknown symbols, rows shortened
Encoded = tuple[list["array[int]"], list[list[int]], int, int]


@functools.lru_cache(maxsize=1)
def _loaded(files: BpeFiles) -> tuple[Encoder, Vocabulary]:
    """Encoder and dictionary, once in a process; a fork brings them along."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # we are the parallelism
    return make_encoder(files), load_vocabulary(files.dictionary)


def integer_typecode(size: int) -> str:
    """The array type that fairseq takes for a dictionary of this size (`best_fitting_int_dtype`)."""
    return "H" if size < 65500 else "I"


def _encode_chunk(files: BpeFiles, limit: int | None, rows: Sequence[tuple[str, ...]]) -> Encoded:
    """The ids of some rows' texts, of at most ``limit`` symbols a row. Runs in a worker."""
    encode, vocabulary = _loaded(files)
    inputs = len(rows[0])
    ids = [array(integer_typecode(vocabulary.size)) for _ in range(inputs)]
    sizes: list[list[int]] = [[] for _ in range(inputs)]
    unknown = shortened = 0
    for texts in rows:
        row = [[*map(vocabulary.__getitem__, encode(text.strip())), END] for text in texts]
        unknown += sum(part.count(UNKNOWN) for part in row)
        if limit is not None:
            shortened += _shorten(row, limit)
        for place, part in enumerate(row):
            ids[place].extend(part)
            sizes[place].append(len(part))
    return ids, sizes, unknown, shortened


def _shorten(row: list[list[int]], limit: int) -> bool:
    """Cut the longer part at its end, before the end symbol, until all have ``limit`` symbols; whether it was cut."""
    over = sum(map(len, row)) - limit
    for _ in range(over):
        max(row, key=len).pop(-2)
    return over > 0


class Pool:
    """Workers that encode in order; none for one worker.

    Raises `UsageError` at the start if an encoder's file is of the wrong kind.
    """

    def __init__(self, files: BpeFiles, workers: int, max_tokens: int | None, texts: int) -> None:
        self.files = files
        # what training adds to a row beside the ends of the inputs: <s>, and in RoBERTa's form a second </s>
        self.extra = 2 if texts == 2 and files.kind != "bert" else 1
        shortest = self.extra + 2 * texts
        if max_tokens is not None and max_tokens < shortest:
            raise UsageError(f"--max-tokens is {max_tokens}; it must be at least {shortest}")
        _, self.vocabulary = _loaded(files)
        self._limit = None if max_tokens is None else max_tokens - self.extra
        self._workers = workers

    def encode(self, rows: Sequence[Row]) -> Iterator[tuple[Encoded, int]]:
        """(result, number of rows) of each chunk, in order."""
        chunks = [[row.texts for row in rows[start : start + CHUNK]] for start in range(0, len(rows), CHUNK)]
        encode = functools.partial(_encode_chunk, self.files, self._limit)
        if self._workers == 1 or len(chunks) <= 1:
            yield from ((encode(chunk), len(chunk)) for chunk in chunks)
            return
        executor = ProcessPoolExecutor(self._workers)
        try:
            yield from zip(executor.map(encode, chunks), map(len, chunks))
        except BrokenProcessPool:
            raise UsageError(
                f"--workers is {self._workers}; one of them was killed, perhaps for want of memory: try fewer"
            ) from None
        finally:
            executor.shutdown(cancel_futures=True)
