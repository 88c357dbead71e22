"""Encoders: from text to the symbols that dict.txt holds, behind one small interface.

``gpt2`` is the byte-level BPE of fairseq's `multiprocessing_bpe_encoder` (its own `gpt2_bpe_utils`), ``sentencepiece``
and ``bert`` are what fairseq's encoders of these names do, the latter through the `tokenizers` library.
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import UsageError
from .readers import located, read_bytes, shown

KINDS = ("gpt2", "sentencepiece", "bert")
UNKNOWN, END = 3, 2  # fairseq's Dictionary: <s> 0, <pad> 1, </s> 2, <unk> 3
SPECIAL_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")


@dataclass(frozen=True)
class BpeFiles:
    """Which encoder, and where its files are; small enough to be sent to workers."""

    kind: str
    folder: str
    lowercase: bool = True

    @property
    def dictionary(self) -> Path:
        """fairseq's dictionary of the symbols."""
        return Path(self.folder) / "dict.txt"


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
    place, kept = len(vocabulary), []
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise located(path, 0, "is not UTF-8, so it is not a fairseq dictionary") from None
    # fairseq reads in text mode: carriage returns end lines too
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, start=1):
        symbol, _, count = line.rstrip().rpartition(" ")
        overwrite = count == "#fairseq:overwrite"
        if overwrite:
            symbol, _, count = symbol.rpartition(" ")
        if not symbol or not count.lstrip("-").isdigit():
            raise located(path, number, f"{shown(line)} is not `symbol count`; a fairseq dict.txt is needed")
        if symbol in vocabulary and not overwrite:
            raise located(path, number, f"symbol {shown(symbol)} was there already; a fairseq dict.txt is needed")
        vocabulary[symbol] = place
        place += 1
        kept.append(line.rstrip() + "\n")
    vocabulary.size, vocabulary.lines = place, "".join(kept)
    return vocabulary


def _json_file(path: Path) -> Any:
    try:
        return json.loads(read_bytes(path).decode("utf-8"))
    except ValueError as error:
        raise located(path, getattr(error, "lineno", 0), f"not JSON ({error})") from None


def _needed(folder: Path, kind: str, *names: str) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise located(
                folder / name,
                0,
                f"is missing; --bpe {kind} needs {', '.join(names)} in --bpe-dir (examples/glue/README.md says where "
                "they come from)",
            )


def find_bpe(kind: str | None, folder: Path) -> BpeFiles:
    """Check what ``--bpe`` and ``--bpe-dir`` name. ``kind`` None: what bpe.json in the folder says, otherwise gpt2."""
    if kind is not None and kind not in KINDS:
        raise UsageError(f"--bpe is {shown(kind)}; it must be one of {', '.join(KINDS)}")
    if not folder.is_dir():
        raise located(folder, 0, "--bpe-dir: no such folder; it must hold dict.txt and the encoder's files")
    lowercase = True
    if (folder / "bpe.json").is_file():
        said = _json_file(folder / "bpe.json")
        if not isinstance(said, dict) or said.get("bpe") not in KINDS:
            raise located(folder / "bpe.json", 0, f'it must be an object such as {{"bpe": "bert"}}, one of {KINDS}')
        if kind is not None and said["bpe"] != kind:
            raise located(folder / "bpe.json", 0, f"says {said['bpe']}, and --bpe says {kind}; leave --bpe out")
        kind = said["bpe"]
        lowercase = said.get("lowercase", True)
        if not isinstance(lowercase, bool):
            raise located(folder / "bpe.json", 0, f"lowercase is {lowercase!r}; it must be true or false")
    kind = kind or "gpt2"
    if kind == "gpt2":
        _needed(folder, kind, "encoder.json", "vocab.bpe", "dict.txt")
    elif kind == "bert":
        _needed(folder, kind, "vocab.txt", "dict.txt")
    else:
        _needed(folder, kind, "dict.txt")
        _sentencepiece_model(folder)
    return BpeFiles(kind, str(folder), lowercase)


def _sentencepiece_model(folder: Path) -> Path:
    models = sorted(folder.glob("*.model"))
    if len(models) != 1:
        found = ", ".join(path.name for path in models) or "none"
        raise located(folder, 0, f"--bpe sentencepiece needs exactly one file *.model in --bpe-dir, found {found}")
    return models[0]


class Encoder:
    """From a text to its symbols."""

    def encode(self, text: str) -> list[str]:
        """The symbols of a text."""
        raise NotImplementedError


class Gpt2Encoder(Encoder):
    """fairseq's GPT-2 BPE with a memory of whole words; symbols are ids written as numbers."""

    def __init__(self, folder: Path) -> None:
        encoder, merges = folder / "encoder.json", folder / "vocab.bpe"
        table = _json_file(encoder)
        if not isinstance(table, dict) or not all(isinstance(value, int) for value in table.values()):
            raise located(encoder, 0, "is not the GPT-2 encoder.json: an object from byte strings to ids")
        lines = read_bytes(merges).decode("utf-8", "replace").split("\n")[1:-1]
        for number, line in enumerate(lines, start=2):
            if len(line.split()) != 2:
                message = f"{shown(line)} is not a merge of two symbols; GPT-2's vocab.bpe is needed"
                raise located(merges, number, message)
        self._bpe = _fairseq_gpt2().get_encoder(str(encoder), str(merges))
        self._encoder = encoder
        missing = [mark for mark in self._bpe.byte_encoder.values() if mark not in table]
        if missing:
            raise located(encoder, 0, f"has no entry for {len(missing)} of the 256 bytes; GPT-2's is needed")
        self._find = self._bpe.pat.findall
        self._known: dict[str, list[str]] = {}

    def encode(self, text: str) -> list[str]:
        """The numbers of GPT-2's symbols, as strings."""
        symbols: list[str] = []
        known = self._known
        for word in self._find(text):
            pieces = known.get(word)
            if pieces is None:
                pieces = known[word] = self._split(word)
            symbols += pieces
        return symbols

    def _split(self, word: str) -> list[str]:
        try:
            return [str(number) for number in self._bpe.encode(word)]
        except KeyError as error:
            message = f"has no entry for {error}, which vocab.bpe makes; the two must come from the same place"
            raise located(self._encoder, 0, message) from None


def _fairseq_gpt2() -> ModuleType:
    """fairseq's gpt2_bpe_utils, loaded by its path: importing fairseq would take seconds in every worker."""
    found = importlib.util.find_spec("fairseq")
    if found is None or not found.submodule_search_locations:
        raise UsageError("--bpe gpt2 needs fairseq; install it (README, Installation)")
    path = Path(next(iter(found.submodule_search_locations))) / "data" / "encoders" / "gpt2_bpe_utils.py"
    spec = importlib.util.spec_from_file_location("smart_fairseq_gpt2_bpe_utils", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path}: cannot be loaded; install fairseq again")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class SentencepieceEncoder(Encoder):
    """What fairseq's encoder of this name gives without sampling."""

    def __init__(self, folder: Path) -> None:
        import sentencepiece

        path = _sentencepiece_model(folder)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError):
            raise located(path, 0, "is not a sentencepiece model") from None

    def encode(self, text: str) -> list[str]:
        """The model's pieces."""
        # a symbol that holds white space would be cut in two by fairseq-preprocess
        return " ".join(self._processor.encode(text, out_type=str)).split()


class BertEncoder(Encoder):
    """WordPiece with BERT's cleaning, as the `tokenizers` library does it."""

    def __init__(self, folder: Path, lowercase: bool) -> None:
        from tokenizers import BertWordPieceTokenizer

        path = folder / "vocab.txt"
        try:
            words = read_bytes(path).decode("utf-8").split("\n")
        except UnicodeDecodeError:
            raise located(path, 0, "is not UTF-8, so it is not a BERT vocabulary") from None
        if "[UNK]" not in {word.strip() for word in words}:
            raise located(path, 0, "has no [UNK], so it is not a BERT vocabulary: one symbol a line")
        self._tokenizer = BertWordPieceTokenizer(str(path), lowercase=lowercase)

    def encode(self, text: str) -> list[str]:
        """WordPiece's pieces."""
        return " ".join(self._tokenizer.encode(text, add_special_tokens=False).tokens).split()


def make_encoder(files: BpeFiles) -> Encoder:
    """The encoder that `find_bpe` found. Raises `UsageError` naming the file that is of the wrong kind."""
    folder = Path(files.folder)
    if files.kind == "gpt2":
        return Gpt2Encoder(folder)
    if files.kind == "sentencepiece":
        return SentencepieceEncoder(folder)
    return BertEncoder(folder, files.lowercase)
