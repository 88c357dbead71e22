"""A data folder's rows as texts, and back with typing errors."""

import shutil
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..data.binarize import indexed_writer, read_indexed, read_manifest
from ..data.bpe import END, SPECIAL_SYMBOLS, UNKNOWN, BpeFiles, shared_vocabulary
from ..data.folders import read_ids
from ..data.lines import Row
from ..data.pool import Pool, integer_typecode
from .typos import with_typos


def decoder(bpe: BpeFiles) -> Callable[[Sequence[str]], str]:
    """From symbols to a text that has these symbols: the one that was encoded, but for what the encoder does not keep.

    That is nothing for GPT-2's; letters' size and spaces beside marks for BERT's.
    """
    if bpe.kind == "bert":
        return lambda symbols: " ".join(symbols).replace(" ##", "")
    if bpe.kind == "sentencepiece":
        from sentencepiece import SentencePieceProcessor

        (path,) = bpe.folder.glob("*.model")
        pieces = SentencePieceProcessor(model_file=str(path))
        return lambda symbols: str(pieces.decode_pieces(list(symbols)))
    from fairseq.data.encoders.gpt2_bpe_utils import get_encoder

    gpt2 = get_encoder(str(bpe.folder / "encoder.json"), str(bpe.folder / "vocab.bpe"))
    return lambda symbols: str(gpt2.decode([int(symbol) for symbol in symbols if symbol.isdigit()]))


def decoded(folder: Path, split: str, bpe: BpeFiles) -> list[Row]:
    """The rows' texts."""
    decode, names = decoder(bpe), dict(enumerate(shared_vocabulary(folder, bpe)))
    names.update((place, "") for place in range(len(SPECIAL_SYMBOLS)))
    names[UNKNOWN] = "[UNK]" if bpe.kind == "bert" else ""

    def text(row: np.ndarray) -> str:
        return decode([names[int(number)] for number in row if number != END and names[int(number)]])

    inputs = [name for name in ("input0", "input1") if (folder / name).is_dir()]
    columns = [map(text, read_indexed(folder / name / split)) for name in inputs]
    return [Row(identity, texts, None) for identity, texts in zip(read_ids(folder, split), zip(*columns))]


def write_with_typos(folder: Path, split: str, bpe: BpeFiles, target: Path, longest: int, seed: int) -> dict[str, int]:
    """Write a split with typing errors into ``target``, as far as a model needs it that knows ``folder``.

    ``longest``: tokens that the model takes; where ``folder`` has a lower limit, that counts. Returns how many ``rows``
    there are, how many a decoded text gives back as they were (``exact``), and how many typing errors ``changed``.
    """
    rows = decoded(folder, split, bpe)
    wrong = [row._replace(texts=tuple(with_typos(row.texts, row.id, seed=seed))) for row in rows]
    limit = min(read_manifest(folder).get("max_tokens") or longest, longest)
    pool = Pool(bpe, 1, limit, len(rows[0].texts))
    again, typed = _encoded(pool, rows), _encoded(pool, wrong)
    typecode = integer_typecode(pool.vocabulary.size)
    for place, column in enumerate(typed):
        (target / f"input{place}").mkdir(parents=True)
        with indexed_writer(target / f"input{place}" / split, typecode) as add:
            for row in column:
                add(array(typecode, row.tolist()), [len(row)])
    (target / "ids").mkdir()
    shutil.copy(folder / "ids" / f"{split}.tsv", target / "ids")
    before = [read_indexed(folder / f"input{place}" / split) for place in range(len(typed))]
    return {"rows": len(rows), "exact": _equal(before, again), "changed": len(rows) - _equal(before, typed)}


def _encoded(pool: Pool, rows: Sequence[Row]) -> list[list[np.ndarray]]:
    """Each input's rows of symbols."""
    columns: list[list[np.ndarray]] = [[] for _ in rows[0].texts]
    for (ids, sizes, _, _), _ in pool.encode(rows):
        for column, part, part_sizes in zip(columns, ids, sizes):
            column += np.split(np.array(part), np.cumsum(part_sizes)[:-1])
    return columns


def _equal(first: list[list[np.ndarray]], second: list[list[np.ndarray]]) -> int:
    """How many rows are the same in all inputs."""
    return sum(all(map(np.array_equal, one, other)) for one, other in zip(zip(*first), zip(*second)))
