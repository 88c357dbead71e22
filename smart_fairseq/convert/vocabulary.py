"""A Hugging Face vocabulary as fairseq's dictionary and BPE files."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode

from ..data.binarize import FILLER
from ..data.lines import read_lines, read_object
from ..errors import refuse
from .config import FAIRSEQ_SPECIALS, SPECIAL_TOKENS, Config

END_OF_TEXT = "<|endoftext|>"
NORMALIZER_KEYS = {  # of tokenizer_config.json, and of tokenizer.json
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


class Vocabulary(NamedTuple):
    """The model's tokens in fairseq's order, and what goes with them."""

    rows: list[int]  # of the Hugging Face tables, for each of fairseq's ids: specials first, <mask> last
    symbols: list[str]  # of dict.txt, ids 4 to len(rows) - 2
    files: dict[str, bytes]  # for the BPE, by name
    bpe: dict[str, Any]  # content of bpe.json
    notes: list[str]  # lines for the user

    @property
    def dictionary(self) -> str:
        """The content of dict.txt."""
        return "".join(f"{symbol} {int(not symbol.startswith(FILLER))}\n" for symbol in self.symbols)


def _optional_json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def read_tokenizer_json(model_dir: Path, kind: str) -> dict[str, Any]:
    """tokenizer.json's "model" of the given kind ("BPE" or "WordPiece"), its vocabulary with the added tokens."""
    path = model_dir / "tokenizer.json"
    content = read_object(path)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", kind) != kind or not isinstance(model.get("vocab"), dict):
        refuse(path, f"holds no {kind} vocabulary", "give the vocabulary that belongs to the model")
    try:
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model.get("merges", [])]
    except (LookupError, TypeError):
        refuse(path, "added_tokens or merges are not in order", "give the file that belongs to the model")
    vocabulary = {**model["vocab"], **added}
    wrong = [token for token, row in vocabulary.items() if not isinstance(row, int)]
    if wrong or not all(isinstance(part, str) for merge in merges for part in merge):
        what = f"{wrong[0]!r} has the id {vocabulary[wrong[0]]!r}" if wrong else "a merge is not of two strings"
        refuse(path, what, "give the file that belongs to the model")
    return {**model, "vocab": vocabulary, "merges": merges}


def arrange(
    path: Path, tokens: dict[str, int], special_tokens: Sequence[str], row_count: int, symbol_of: dict[str, str]
) -> tuple[list[int], list[str]]:
    """Put the rows of the embedding table into fairseq's order and name them.

    Rows without a token, or with one that dict.txt cannot hold, become fillers. Returns rows and symbols as in
    `Vocabulary`; raises `UsageError` where a special token is missing, or an id is impossible or comes twice.

    Args:
        tokens: token to row.
        special_tokens: the tokens for FAIRSEQ_SPECIALS.
        symbol_of: dictionary symbols of the tokens that are not called by their own name.
    """
    for token in special_tokens:
        if token not in tokens:
            refuse(path, f"has no token {token}", "needed: " + " ".join(special_tokens))
    by_row: dict[int, str] = {}
    for token, row in tokens.items():
        if not isinstance(row, int) or not 0 <= row < row_count:
            limit = f"config.json's vocab_size {row_count} allows 0 to {row_count - 1}"
            refuse(path, f"{len(tokens)} tokens, of which {token!r} has the id {row!r}", limit)
        if row in by_row:
            refuse(path, f"{by_row[row]!r} and {token!r} share the id {row}", "every token needs its own")
        by_row[row] = token
    special_rows = [tokens[token] for token in special_tokens]
    rest = sorted(set(range(row_count)) - set(special_rows))

    kept: dict[str, int] = {}
    for row in rest:
        symbol = symbol_of.get(by_row.get(row, ""), by_row.get(row, ""))
        # a dictionary line is "symbol count", split at white space, and no symbol comes twice
        if symbol.split() == [symbol] and symbol not in FAIRSEQ_SPECIALS:
            kept.setdefault(symbol, row)
    symbols = {row: symbol for symbol, row in kept.items()}
    fillers = (name for name in (f"{FILLER}{number:04d}" for number in itertools.count()) if name not in kept)
    return [*special_rows[:4], *rest, special_rows[4]], [symbols.get(row) or next(fillers) for row in rest]


def read_gpt2_vocabulary(model_dir: Path, config: Config) -> Vocabulary:
    """RoBERTa's byte-level vocabulary, with GPT-2's encoder.json and vocab.bpe derived from the merges.

    RoBERTa's dictionary names tokens by GPT-2's ids, in decimal; its own ids are the lines' order. Tokens that are
    no product of the merges (madeupword0000, added ones) keep their names.
    """
    path, merges_path = model_dir / "vocab.json", model_dir / "merges.txt"
    if path.exists() or not (model_dir / "tokenizer.json").exists():
        tokens = read_object(path) | _optional_json(model_dir / "added_tokens.json")
        lines = [line for _, line in read_lines(merges_path)]
        has_header = lines[0].startswith("#version")
        merges = [tuple(line.split()) for line in lines[1 if has_header else 0 :] if line]
    else:
        path = merges_path = model_dir / "tokenizer.json"
        model = read_tokenizer_json(model_dir, "BPE")
        tokens = model["vocab"]
        merges = [tuple(merge) for merge in model["merges"]]
    unfit = [merge for merge in merges if len(merge) != 2]
    if unfit:
        refuse(merges_path, f"{' '.join(unfit[0])!r} is not a merge", "a merge is two symbols with a space between")

    ids: dict[str, int] = {symbol: number for number, symbol in enumerate(bytes_to_unicode().values())}
    for number, (left, right) in enumerate(merges):
        # two merges may give the same symbol; the first names it
        ids.setdefault(left + right, 256 + number)
    ids.setdefault(END_OF_TEXT, 256 + len(merges))
    specials = SPECIAL_TOKENS["roberta"]
    symbol_of = {token: str(number) for token, number in ids.items() if token not in specials}
    numeric = [token for token in tokens if token not in ids and token not in specials and token.isdecimal()]
    if numeric:
        refuse(path, f"token {numeric[0]!r} is no product of the merges", "merges.txt of the same model is needed")

    rows, symbols = arrange(path, tokens, specials, config.sizes.vocabulary, symbol_of)
    notes = []
    if _optional_json(model_dir / "tokenizer_config.json").get("add_prefix_space") is True:
        notes.append("the tokenizer puts a space before the first word (add_prefix_space); fairseq's BPE does not")
    lines = ["#version: 0.2\n", *(f"{left} {right}\n" for left, right in merges)]
    files = {"encoder.json": json.dumps(ids).encode("ascii"), "vocab.bpe": "".join(lines).encode()}
    return Vocabulary(rows, symbols, files, {"bpe": "gpt2"}, notes)


def gpt2_tokens(encoder: Path, symbols: Sequence[str]) -> dict[str, int]:
    """RoBERTa's vocab.json, in fairseq's order: `read_gpt2_vocabulary` the other way round.

    ``encoder``: encoder.json; ``symbols``: of dict.txt. Raises `UsageError` where dict.txt lacks one of its tokens,
    which Hugging Face's BPE would not take for <unk>.
    """
    ids = read_object(encoder)
    names = {str(number): token for token, number in ids.items()}
    all_symbols = [*FAIRSEQ_SPECIALS[:4], *symbols, FAIRSEQ_SPECIALS[4]]
    tokens = {names.get(symbol, symbol): row for row, symbol in enumerate(all_symbols)}
    lacking = [token for token in ids if token not in tokens and token != END_OF_TEXT]
    if lacking or len(tokens) < len(all_symbols):
        what = f"{lacking[0]!r} is not in dict.txt" if lacking else "dict.txt names a token twice"
        refuse(encoder, what, "Hugging Face's BPE needs each of its tokens, once")
    return tokens


def read_bert_vocabulary(model_dir: Path, config: Config) -> Vocabulary:
    """BERT's WordPiece vocabulary; vocab.txt is handed on as it is."""
    path = model_dir / "vocab.txt"
    if path.exists() or not (model_dir / "tokenizer.json").exists():
        names, content = [line for _, line in read_lines(path)], path.read_bytes()
    else:
        path = model_dir / "tokenizer.json"
        by_row = {row: token for token, row in read_tokenizer_json(model_dir, "WordPiece")["vocab"].items()}
        if sorted(by_row) != list(range(len(by_row))):
            refuse(path, "the ids have gaps", "vocab.txt cannot be derived; give it in MODEL_DIR")
        names = [by_row[row] for row in range(len(by_row))]
        cut = next((name for name in names if "\n" in name or "\r" in name), None)
        if cut is not None:
            refuse(path, f"the token {cut!r} is no line of a vocab.txt", "give vocab.txt in MODEL_DIR")
        content = "".join(name + "\n" for name in names).encode()
    if len(names) > config.sizes.vocabulary:
        refuse(path, f"{len(names)} tokens", f"config.json's vocab_size allows {config.sizes.vocabulary}")
    tokens = {name: row for row, name in enumerate(names)}  # of duplicates the last one counts, as in BERT
    rows, symbols = arrange(path, tokens, SPECIAL_TOKENS["bert"], config.sizes.vocabulary, {})
    lowercase, notes = read_lowercase(model_dir)
    return Vocabulary(rows, symbols, {"vocab.txt": content}, {"bpe": "bert", "lowercase": lowercase}, notes)


def read_lowercase(model_dir: Path) -> tuple[bool, list[str]]:
    """Whether BERT's tokenizer lower-cases, and what to tell about how that was found.

    bpe.json can say nothing else about the tokenizer, so other deviations from BERT's are refused.
    """
    settings: dict[str, Any] = {}
    path, tokenizer = model_dir / "tokenizer_config.json", model_dir / "tokenizer.json"
    stated = _optional_json(path)
    normalizer = _optional_json(tokenizer).get("normalizer") or {}
    if not isinstance(normalizer, dict):
        refuse(tokenizer, f"normalizer is {normalizer!r}", "a JSON object is needed")
    if "lowercase" in normalizer:
        settings = {key: normalizer.get(theirs) for key, theirs in NORMALIZER_KEYS.items()}
    own = {key: stated[key] for key in NORMALIZER_KEYS if stated.get(key) is not None}
    path = tokenizer if settings and not own else path
    settings.update(own)
    if settings.get("do_lower_case") is None:
        return True, ["nothing says whether the tokenizer lower-cases: BERT's default, it does, is written to bpe.json"]
    lowercase: bool = settings["do_lower_case"]
    if not isinstance(lowercase, bool):
        refuse(path, f"lower-casing (do_lower_case, lowercase) is {lowercase!r}", "allowed: true, false")
    if settings.get("strip_accents") not in (None, lowercase):
        refuse(path, f"strip_accents is {settings['strip_accents']}", f"allowed: null or do_lower_case, {lowercase}")
    if settings.get("tokenize_chinese_chars") is False:
        refuse(path, "tokenize_chinese_chars is False", "allowed: True, as in BERT")
    return lowercase, []
