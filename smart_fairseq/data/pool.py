"""Texts to ids in several processes, in order."""

import os
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from .bpe import END, UNKNOWN, BpeFiles, Encoder, Vocabulary, load_vocabulary, make_encoder
from .lines import Row

CHUNK = 512  # rows per unit of work

# ids per input, sizes per input, unknown symbols, rows shortened
Encoded = tuple[list["array[int]"], list[list[int]], int, int]


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
