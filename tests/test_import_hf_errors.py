"""import_hf: errors are one line, and what it writes is there whole or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_samples import BERT_TOKENS, DIM, roberta_tokens, write_hf
from safetensors.torch import load_file, save_file
from toolkit import error_line

from smart_fairseq.import_hf import main


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config.update(changes)
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def cut_short(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_text(content, encoding="utf-8")

    return apply


def tokenizer(kind: str, vocabulary: Any, more: Any = None, **content: Any) -> Callable[[Path], None]:
    """tokenizer.json alone, without the older files."""

    def apply(folder: Path) -> None:
        for name in ("vocab.txt", "vocab.json", "merges.txt"):
            (folder / name).unlink(missing_ok=True)
        model = {"type": kind, "vocab": vocabulary, **(more or {})}
        (folder / "tokenizer.json").write_text(json.dumps({"model": model, **content}))

    return apply


def folder_instead(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return apply


def header(length: int, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + content) and None


BERT = {token: row for row, token in enumerate(dict.fromkeys(BERT_TOKENS))}
ROBERTA = roberta_tokens()
HOSTILE = [
    ("bert", edit_config(layer_norm_eps=float("nan")), ["layer_norm_eps is nan"]),
    ("bert", edit_config(layer_norm_eps=10**400), ["layer_norm_eps is 1000"]),
    ("bert", edit_config(num_hidden_layers=0), ["num_hidden_layers is 0"]),
    ("bert", edit_config(num_hidden_layers=10**9), ["has no tensor encoder.layer.2."]),
    ("bert", edit_config(hidden_size=10**12), ["promises [27, 1000000000000]"]),
    ("bert", edit_config(vocab_size=10**10), ["vocab_size is 10000000000", "at most 10000000"]),
    ("bert", edit_config(hidden_act={}), ["hidden_act is {}"]),
    ("bert", edit_config(type_vocab_size=None), ["type_vocab_size is None"]),
    ("bert", folder_instead("config.json"), ["config.json", "no such file"]),
    ("bert", folder_instead("vocab.txt"), ["vocab.txt", "is a folder"]),
    ("bert", folder_instead("model.safetensors"), ["model.safetensors", "no such file"]),
    ("bert", write("config.json", "null"), ["holds a NoneType"]),
    ("bert", write("config.json", "[" * 10_000), ["cannot be read as JSON"]),
    ("bert", write("vocab.txt", ""), ["vocab.txt", "is empty"]),
    ("bert", header(2**60, b"{}"), ["not a readable safetensors file"]),
    ("bert", header(8, b'{"a": 1}'), ["not a readable safetensors file"]),
    ("bert", header(2, b"{}"), ["has no tensor embeddings.word_embeddings.weight"]),
    ("bert", write("tokenizer_config.json", "[]"), ["tokenizer_config.json", "holds a list"]),
    ("bert", write("tokenizer_config.json", '{"do_lower_case": "no"}'), ["lower-casing", "is 'no'", "true, false"]),
    ("bert", write("tokenizer.json", '{"normalizer": [1]}'), ["normalizer is [1]"]),
    ("bert", tokenizer("WordPiece", None), ["holds no WordPiece vocabulary"]),
    ("bert", tokenizer("BPE", BERT), ["holds no WordPiece vocabulary"]),
    ("bert", tokenizer("WordPiece", BERT, added_tokens=5), ["added_tokens or merges are not in order"]),
    ("bert", tokenizer("WordPiece", BERT, added_tokens=[{}]), ["added_tokens or merges are not in order"]),
    ("bert", tokenizer("WordPiece", {**BERT, "x": "y"}), ["'x' has the id 'y'"]),
    ("bert", tokenizer("WordPiece", {**BERT, "x": [1]}), ["'x' has the id [1]"]),
    ("bert", tokenizer("WordPiece", {**BERT, "x": 99}), ["the ids have gaps"]),
    # it would shift the rows of all that follow
    ("bert", tokenizer("WordPiece", {**BERT, "a\nb": len(BERT)}), ["'a\\nb' is no line of a vocab.txt"]),
    ("bert", tokenizer("WordPiece", {**BERT, "\ud800": len(BERT)}), ["cannot be read as JSON", "surrogates"]),
    ("roberta", write("vocab.json", json.dumps({**ROBERTA, "x": None})), ["'x' has the id None"]),
    ("roberta", write("vocab.json", json.dumps({**ROBERTA, "\udfff": 3})), ["cannot be read as JSON", "surrogates"]),
    ("roberta", write("merges.txt", ""), ["merges.txt", "is empty"]),
    ("roberta", tokenizer("BPE", ROBERTA, {"merges": 5}), ["added_tokens or merges are not in order"]),
    ("roberta", tokenizer("BPE", ROBERTA, {"merges": [["a", 1]]}), ["a merge is not of two strings"]),
    ("roberta", tokenizer("BPE", ROBERTA, {"merges": [["a"]]}), ["'a' is not a merge"]),
]
ERRORS = [
    ("bert", remove("config.json"), ["config.json", "no such file"]),
    ("bert", write("config.json", "{"), ["config.json", "cannot be read as JSON"]),
    ("bert", write("config.json", "[]"), ["config.json", "holds a list"]),
    ("bert", remove("vocab.txt"), ["vocab.txt", "No such file"]),
    ("bert", remove("model.safetensors"), ["model.safetensors", "no such file"]),
    ("bert", cut_short, ["model.safetensors", "not a readable safetensors file"]),
    ("bert", edit_config(model_type="xlm-roberta"), ["model_type is 'xlm-roberta'", "allowed: 'bert', 'roberta'"]),
    ("bert", edit_config(model_type="camembert"), ["model_type is 'camembert'"]),
    ("bert", edit_config(hidden_act="silu"), ["hidden_act is 'silu'", "allowed: 'gelu'"]),
    ("roberta", edit_config(hidden_act="relu"), ["hidden_act is 'relu'", "allowed: 'gelu'"]),
    ("bert", edit_config(position_embedding_type="relative_key"), ["'relative_key'", "allowed: 'absolute'"]),
    ("bert", edit_config(is_decoder=True), ["is_decoder is True"]),
    ("bert", edit_config(hidden_size="16"), ["hidden_size is '16'"]),
    ("bert", edit_config(num_attention_heads=3), ["num_attention_heads is 3", "divide hidden_size, 16"]),
    ("bert", edit_config(layer_norm_eps=0), ["layer_norm_eps is 0"]),
    ("bert", edit_config(hidden_size=32), ["word_embeddings.weight has shape [27, 16]", "promises [27, 32]"]),
    ("bert", edit_config(intermediate_size=41), ["intermediate.dense.weight has shape [40, 16]"]),
    ("bert", edit_config(num_hidden_layers=3), ["has no tensor encoder.layer.2."]),
    ("bert", edit_config(num_hidden_layers=1), ["holds encoder.layer.1.", "num_hidden_layers 1"]),
    ("bert", edit_config(vocab_size=20), ["vocab.txt", "27 tokens", "vocab_size allows 20"]),
    ("bert", edit_config(vocab_size=28), ["word_embeddings.weight has shape [27, 16]"]),
    ("bert", edit_config(model_type=["bert"]), ["model_type is ['bert']"]),
    ("roberta", remove("merges.txt"), ["merges.txt", "No such file"]),
    ("roberta", write("added_tokens.json", '{"<x>": 4}'), ["vocab.json", "share the id 4"]),
    ("roberta", edit_config(vocab_size=20), ["vocab.json", "vocab_size 20 allows 0 to 19"]),
    ("roberta", edit_config(pad_token_id=0), ["pad_token_id is 0", "allowed: 1"]),
    ("roberta", write("merges.txt", "#version: 0.2\nt h e\n"), ["merges.txt", "'t h e' is not a merge"]),
    ("roberta", write("merges.txt", "#version: 0.2\nt h\n"), ["vocab.json", "'12' is no product of the merges"]),
    ("roberta", write("vocab.json", '{"<s>": 0}'), ["vocab.json", "has no token <pad>"]),
    ("bert", write("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n"), ["vocab.txt", "has no token [MASK]"]),
    ("bert", write("tokenizer_config.json", '{"do_lower_case": true, "strip_accents": false}'), ["strip_accents"]),
    ("bert", write("tokenizer_config.json", '{"do_lower_case": true, "tokenize_chinese_chars": false}'), ["chinese"]),
    (
        "bert",
        edit_tensors(lambda tensors: tensors.pop("encoder.layer.1.output.LayerNorm.bias")),
        ["has no tensor encoder.layer.1.output.LayerNorm.bias"],
    ),
    (
        "bert",
        edit_tensors(
            lambda tensors: tensors.update({"encoder.layer.0.output.dense.bias": torch.zeros(DIM, dtype=torch.int8)})
        ),
        ["output.dense.bias is of type torch.int8"],
    ),
]


@pytest.mark.parametrize("family, damage, expected", ERRORS + HOSTILE)
def test_errors_are_one_line_and_leave_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
    damage: Callable[[Path], None],
    expected: list[str],
) -> None:
    source = write_hf(tmp_path / "hf", family)
    damage(source)
    line = error_line("import_hf", main, [source, tmp_path / "new" / "out"], capsys)
    for part in expected:
        assert part in line
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_existing_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused without --overwrite; replaced with it, the other family's vocabulary included, other files kept."""
    bert, roberta, out = write_hf(tmp_path / "b", "bert"), write_hf(tmp_path / "r", "roberta"), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    assert main([str(bert), str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    line = error_line("import_hf", main, [roberta, out], capsys)
    assert "model.pt: exists already; choose another OUT_DIR or give --overwrite" in line
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    assert main([str(roberta), str(out), "--overwrite"]) == 0
    names = {"mine.txt", "model.pt", "dict.txt", "encoder.json", "vocab.bpe", "bpe.json", "import.json"}
    assert {path.name for path in out.iterdir()} == names
    assert {path.name for path in tmp_path.iterdir()} == {"b", "r", "out"}


@pytest.mark.parametrize("where", ["hf", "hf/config.json"])
def test_impossible_output(tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str) -> None:
    source = write_hf(tmp_path / "hf", "bert")
    before = sorted(path.name for path in source.iterdir())
    error_line("import_hf", main, [source, tmp_path / where], capsys)
    assert sorted(path.name for path in source.iterdir()) == before


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("unexpected pos") from OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    line = error_line("import_hf", main, [write_hf(tmp_path / "hf", "bert"), tmp_path / "out"], capsys)
    assert line.endswith(f"{tmp_path / 'out'}: cannot be written (No space left on device); nothing was kept")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
