"""A Hugging Face vocabulary as fairseq's dictionary and BPE files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode

from smart_fairseq.convert.command import refuse
from smart_fairseq.convert.config import FAIRSEQ_SPECIALS, SPECIAL_TOKENS, Config
from smart_fairseq.convert.folder import read_json, read_lines

__all__ = ["Vocabulary", "read_bert_vocabulary", "read_gpt2_vocabulary"]

END_OF_TEXT = "<|endoftext|>"


class Vocabulary(NamedTuple):
    """The model's tokens in fairseq's order.

    `rows[i]` is the row of the Hugging Face tables for fairseq's id i (specials first, <mask> last); `symbols`
    and `counts` are the lines of dict.txt, ids 4 to len(rows) - 2. `files` are the BPE files, by name.
    """

    rows: list[int]
    symbols: list[str]
    counts: list[int]
    files: dict[str, bytes]
    bpe: dict[str, Any]
    notes: list[str]


def read_tokenizer_json(model_dir: Path, kind: str) -> dict[str, Any]:
    """tokenizer.json's "model" of the given kind ("BPE" or "WordPiece"), its vocabulary with the added tokens."""
    path = model_dir / "tokenizer.json"
    content = read_json(path)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", kind) != kind or not isinstance(model.get("vocab"), dict):
        refuse(path, f"holds no {kind} vocabulary", "give the vocabulary that belongs to the model")
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return {**model, "vocab": {**model["vocab"], **added}}


def arrange(
    path: Path, tokens: dict[str, int], special_tokens: Sequence[str], row_count: int, symbol_of: dict[str, str]
) -> tuple[list[int], list[str], list[int]]:
    """Put the rows of the embedding table into fairseq's order and name them.

    Args:
        path: the vocabulary's file, for messages
        tokens: token to row
        special_tokens: the tokens for FAIRSEQ_SPECIALS
        row_count: rows of the embedding table; at least as many as there are tokens
        symbol_of: dictionary symbols of the tokens that are not called by their own name

    Returns:
        rows, symbols and counts as in `Vocabulary`

    Rows without a token, or with one that dict.txt cannot hold, become madeupwordNNNN, fairseq's name for fillers.
    """
    missing = [token for token in special_tokens if token not in tokens]
    if missing:
        refuse(path, f"has no token {missing[0]}", "needed: " + " ".join(special_tokens))
    strays = [token for token, row in tokens.items() if not isinstance(row, int) or not 0 <= row < row_count]
    if strays:
        refuse(
            path,
            f"{len(tokens)} tokens, of which {strays[0]!r} has the id {tokens[strays[0]]!r}",
            f"config.json's vocab_size {row_count} allows 0 to {row_count - 1}",
        )

    by_row: dict[int, str] = {}
    for token, row in tokens.items():
        if row in by_row:
            refuse(path, f"{by_row[row]!r} and {token!r} share the id {row}", "every token needs its own")
        by_row[row] = token
    special_rows = [tokens[token] for token in special_tokens]
    names: list[str | None] = [None] * row_count
    for token, row in tokens.items():
        names[row] = symbol_of.get(token, token)
    rest = [row for row in range(row_count) if row not in set(special_rows)]

    used: set[str] = set(FAIRSEQ_SPECIALS)
    kept = set()
    for row in rest:
        name = names[row]
        # a dictionary line is "symbol count", split at white space, and no symbol comes twice
        if name and len(name.split()) == 1 and name == name.strip() and name not in used:
            used.add(name)
            kept.add(row)
    numbers = iter(range(row_count))
    symbols, counts = [], []
    for row in rest:
        name = names[row]
        if name is None or row not in kept:
            name = next(filler for filler in (f"madeupword{n:04d}" for n in numbers) if filler not in used)
            used.add(name)
        symbols.append(name)
        counts.append(0 if name.startswith("madeupword") else 1)
    return [*special_rows[:4], *rest, special_rows[4]], symbols, counts


def read_gpt2_vocabulary(model_dir: Path, config: Config) -> Vocabulary:
    """RoBERTa's byte-level vocabulary, with GPT-2's encoder.json and vocab.bpe derived from the merges.

    RoBERTa's dictionary names tokens by GPT-2's ids, in decimal; its own ids are the lines' order. Tokens that are
    no product of the merges (madeupword0000, added ones) keep their names.
    """
    path = model_dir / "vocab.json"
    merges_path = model_dir / "merges.txt"
    if path.exists() or not (model_dir / "tokenizer.json").exists():
        tokens = dict(read_json(path))
        added_path = model_dir / "added_tokens.json"
        if added_path.exists():
            tokens.update(read_json(added_path))
        lines = read_lines(merges_path)
        merges = [
            tuple(line.split()) for line in lines[1 if lines and lines[0].startswith("#version") else 0 :] if line
        ]
    else:
        path = merges_path = model_dir / "tokenizer.json"
        model = read_tokenizer_json(model_dir, "BPE")
        tokens = model["vocab"]
        merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model.get("merges", [])]
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
    foreign = [token for token in tokens if token not in ids and token not in specials]
    numeric = [token for token in foreign if token.isdecimal()]
    if numeric:
        refuse(path, f"token {numeric[0]!r} is no product of the merges", "merges.txt of the same model is needed")

    rows, symbols, counts = arrange(path, tokens, specials, config.sizes.vocabulary, symbol_of)
    notes = []
    tokenizer_config = model_dir / "tokenizer_config.json"
    if tokenizer_config.exists() and read_json(tokenizer_config).get("add_prefix_space") is True:
        notes.append("the tokenizer puts a space before the first word (add_prefix_space); fairseq's BPE does not")
    return Vocabulary(
        rows=rows,
        symbols=symbols,
        counts=counts,
        files={
            "encoder.json": json.dumps(ids).encode("ascii"),
            "vocab.bpe": "".join(["#version: 0.2\n", *(f"{left} {right}\n" for left, right in merges)]).encode(),
        },
        bpe={"bpe": "gpt2"},
        notes=notes,
    )


def read_bert_vocabulary(model_dir: Path, config: Config) -> Vocabulary:
    """BERT's WordPiece vocabulary; vocab.txt is handed on as it is."""
    path = model_dir / "vocab.txt"
    if path.exists() or not (model_dir / "tokenizer.json").exists():
        names = read_lines(path)
        content = path.read_bytes()
    else:
        path = model_dir / "tokenizer.json"
        by_row = {row: token for token, row in read_tokenizer_json(model_dir, "WordPiece")["vocab"].items()}
        if sorted(by_row) != list(range(len(by_row))):
            refuse(path, "the ids have gaps", "vocab.txt cannot be derived; give it in MODEL_DIR")
        names = [by_row[row] for row in range(len(by_row))]
        content = "".join(name + "\n" for name in names).encode()
    if len(names) > config.sizes.vocabulary:
        refuse(path, f"{len(names)} tokens", f"config.json's vocab_size allows {config.sizes.vocabulary}")
    tokens = {name: row for row, name in enumerate(names)}  # of duplicates the last one counts, as in BERT
    rows, symbols, counts = arrange(path, tokens, SPECIAL_TOKENS["bert"], config.sizes.vocabulary, {})
    lowercase, notes = read_lowercase(model_dir)
    return Vocabulary(
        rows=rows,
        symbols=symbols,
        counts=counts,
        files={"vocab.txt": content},
        bpe={"bpe": "bert", "lowercase": lowercase},
        notes=notes,
    )


def read_lowercase(model_dir: Path) -> tuple[bool, list[str]]:
    """Whether BERT's tokenizer lower-cases, and what to tell about how that was found.

    bpe.json can say nothing else about the tokenizer, so other deviations from BERT's are refused.
    """
    config_path, tokenizer_path = model_dir / "tokenizer_config.json", model_dir / "tokenizer.json"
    settings: dict[str, Any] = {}
    path = config_path
    if tokenizer_path.exists():
        normalizer = read_json(tokenizer_path).get("normalizer") or {}
        if "lowercase" in normalizer:
            path = tokenizer_path
            settings["do_lower_case"] = normalizer["lowercase"]
            settings["strip_accents"] = normalizer.get("strip_accents")
            settings["tokenize_chinese_chars"] = normalizer.get("handle_chinese_chars", True)
    if config_path.exists():
        from_config = read_json(config_path)
        for key in ("do_lower_case", "strip_accents", "tokenize_chinese_chars"):
            if from_config.get(key) is not None:
                path = config_path
                settings[key] = from_config[key]
    if settings.get("do_lower_case") is None:
        return True, ["nothing says whether the tokenizer lower-cases: BERT's default, it does, is written to bpe.json"]
    lowercase = bool(settings["do_lower_case"])
    if settings.get("strip_accents") not in (None, lowercase):
        refuse(path, f"strip_accents is {settings['strip_accents']}", f"allowed: null or do_lower_case, {lowercase}")
    if settings.get("tokenize_chinese_chars") is False:
        refuse(path, "tokenize_chinese_chars is False", "allowed: True, as in BERT")
    return lowercase, []
