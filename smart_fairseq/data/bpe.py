"""Encoders: from text to the symbols that dict.txt holds.

``gpt2`` is the byte-level BPE of fairseq's `multiprocessing_bpe_encoder` (its own `gpt2_bpe_utils`), ``sentencepiece``
and ``bert`` are what fairseq's encoders of these names do, the latter through the `tokenizers` library.
"""

import functools
import importlib.util
import io
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError, refuse, require
from .lines import located, read_bytes, read_lines, read_object, shown

NEEDED = {  # the files of each kind; sentencepiece's model has a name of its own
    "gpt2": ("encoder.json", "vocab.bpe", "dict.txt"),
    "sentencepiece": ("dict.txt",),
    "bert": ("vocab.txt", "dict.txt"),
}
KINDS = tuple(NEEDED)
SPECIAL_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")  # fairseq's Dictionary begins with them
UNKNOWN, END = 3, 2

Encoder = Callable[[str], list[str]]  # from a text to its symbols


@dataclass(frozen=True)
class BpeFiles:
    """Which encoder, and where its files are; small enough to be sent to workers."""

    kind: str
    folder: Path
    lowercase: bool = True

    @property
    def dictionary(self) -> Path:
        """fairseq's dictionary of the symbols."""
        return self.folder / "dict.txt"


class Vocabulary(dict[str, int]):
    """Symbol to id as fairseq's Dictionary numbers them; an unknown symbol gives `UNKNOWN`.

    ``size`` counts all entries, fairseq's four special ones included; ``lines`` is dict.txt as fairseq writes it.
    """

    size: int = 0
    lines: str = ""

    def __missing__(self, symbol: str) -> int:
        return UNKNOWN


def load_vocabulary(path: Path) -> Vocabulary:
    """Read a dict.txt, lines of ``symbol count [#fairseq:overwrite]``. Raises `UsageError` where fairseq would."""
    vocabulary = Vocabulary((symbol, place) for place, symbol in enumerate(SPECIAL_SYMBOLS))
    lines: list[str] = []
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise located(path, "is not UTF-8, so it is not a fairseq dictionary") from None
    # fairseq reads in text mode: carriage returns end lines too
    for number, line in enumerate(io.StringIO(text, newline=None).read().removesuffix("\n").split("\n"), start=1):
        symbol, _, count = line.rstrip().rpartition(" ")
        overwrite = count == "#fairseq:overwrite"
        if overwrite:
            symbol, _, count = symbol.rpartition(" ")
        if not symbol or not count.lstrip("-").isdigit():
            raise located(path, f"{shown(line)} is not `symbol count`; a fairseq dict.txt is needed", number)
        if symbol in vocabulary and not overwrite:
            raise located(path, f"symbol {shown(symbol)} was there already; a fairseq dict.txt is needed", number)
        vocabulary[symbol] = len(SPECIAL_SYMBOLS) + len(lines)
        lines.append(line.rstrip() + "\n")
    vocabulary.size, vocabulary.lines = len(SPECIAL_SYMBOLS) + len(lines), "".join(lines)
    return vocabulary


def shared_vocabulary(folder: Path, bpe: BpeFiles) -> Vocabulary:
    """That of a data folder. Raises `UsageError` if the encoder has another."""
    vocabulary = load_vocabulary(folder / "input0" / "dict.txt")
    if vocabulary != load_vocabulary(bpe.dictionary):
        refuse(bpe.dictionary, f"differs from {folder / 'input0' / 'dict.txt'}", "give the --bpe-dir of preprocess")
    return vocabulary


def find_bpe(kind: str | None, folder: Path) -> BpeFiles:
    """Check what ``--bpe`` and ``--bpe-dir`` name. ``kind`` None: what bpe.json in the folder says, otherwise gpt2."""
    if kind is not None:
        require(kind in KINDS, "--bpe", shown(kind), f"one of {', '.join(KINDS)}")
    if not folder.is_dir():
        without = "without the flag it is gpt2_bpe in --data-dir, and download.py --tasks gpt2_bpe fetches RoBERTa's"
        raise located(folder, f"--bpe-dir: no such folder; it must hold dict.txt and the encoder's files ({without})")
    settings, lowercase = folder / "bpe.json", True
    if settings.is_file():
        said = read_object(settings)
        if said.get("bpe") not in KINDS:
            raise located(settings, f'it must be an object such as {{"bpe": "bert"}}, one of {KINDS}')
        if kind is not None and said["bpe"] != kind:
            raise located(settings, f"says {said['bpe']}, and --bpe says {kind}; leave --bpe out")
        kind, lowercase = said["bpe"], said.get("lowercase", True)
        if not isinstance(lowercase, bool):
            raise located(settings, f"lowercase is {lowercase!r}; it must be true or false")
    kind = kind or "gpt2"
    for name in NEEDED[kind]:
        if not (folder / name).is_file():
            needs = f"--bpe {kind} needs {', '.join(NEEDED[kind])} in --bpe-dir"
            if (folder / "config.json").is_file():
                needs = "this folder is of the Hugging Face format; import it first (docs/encoders.md)"
            raise located(folder / name, f"is missing; {needs} (examples/glue/README.md says where they come from)")
    if kind == "sentencepiece":
        _sentencepiece_model(folder)
    return BpeFiles(kind, folder, lowercase)


def _sentencepiece_model(folder: Path) -> Path:
    models = sorted(folder.glob("*.model"))
    if len(models) != 1:
        found = ", ".join(path.name for path in models) or "none"
        raise located(folder, f"--bpe sentencepiece needs exactly one file *.model in --bpe-dir, found {found}")
    return models[0]


def make_encoder(files: BpeFiles) -> Encoder:
    """The encoder that `find_bpe` found. Raises `UsageError` naming the file that is of the wrong kind."""
    if files.kind == "gpt2":
        return _gpt2_encoder(files.folder)
    pieces = _sentencepieces(files.folder) if files.kind == "sentencepiece" else _word_pieces(files)
    # a symbol that holds white space would be cut in two by fairseq-preprocess
    return lambda text: " ".join(pieces(text)).split()


def _gpt2_encoder(folder: Path) -> Encoder:
    """fairseq's GPT-2 BPE with a memory of whole words; symbols are ids written as numbers."""
    encoder, merges = folder / "encoder.json", folder / "vocab.bpe"
    table = read_object(encoder)
    if not all(isinstance(value, int) for value in table.values()):
        raise located(encoder, "is not the GPT-2 encoder.json: an object from byte strings to ids")
    lines = read_bytes(merges).decode("utf-8", "replace").split("\n")[1:-1]
    for number, line in enumerate(lines, start=2):
        if len(line.split()) != 2:
            raise located(merges, f"{shown(line)} is not a merge of two symbols; GPT-2's vocab.bpe is needed", number)
    fairseq = importlib.util.find_spec("fairseq")
    if fairseq is None or fairseq.origin is None:
        raise UsageError("--bpe gpt2 needs fairseq; install it (README, Installation)")
    # by its path: importing fairseq would take seconds
    module = runpy.run_path(str(Path(fairseq.origin).parent / "data" / "encoders" / "gpt2_bpe_utils.py"))
    bpe = module["get_encoder"](str(encoder), str(merges))
    missing = [mark for mark in bpe.byte_encoder.values() if mark not in table]
    if missing:
        raise located(encoder, f"has no entry for {len(missing)} of the 256 bytes; GPT-2's is needed")

    @functools.cache
    def split(word: str) -> list[str]:
        try:
            return [str(number) for number in bpe.encode(word)]
        except KeyError as error:
            message = f"has no entry for {error}, which vocab.bpe makes; the two must come from the same place"
            raise located(encoder, message) from None

    return lambda text: [symbol for word in bpe.pat.findall(text) for symbol in split(word)]


def _sentencepieces(folder: Path) -> Encoder:
    """What fairseq's encoder of this name gives without sampling."""
    import sentencepiece

    path = _sentencepiece_model(folder)
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        raise located(path, "is not a sentencepiece model") from None
    return functools.partial(processor.encode, out_type=str)


def _word_pieces(files: BpeFiles) -> Encoder:
    """WordPiece with BERT's cleaning, as the `tokenizers` library does it."""
    from tokenizers import BertWordPieceTokenizer

    path = files.folder / "vocab.txt"
    if "[UNK]" not in {line.strip() for _, line in read_lines(path)}:
        raise located(path, "has no [UNK], so it is not a BERT vocabulary: one symbol a line")
    tokenizer = BertWordPieceTokenizer(str(path), lowercase=files.lowercase)
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).tokens)
