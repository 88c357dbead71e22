"""import_hf: exact to the published architectures, in fairseq's order, whole or not at all.

The models are written here as Hugging Face writes them, tiny and random; the reference forward pass below is
written from the papers in float64 and shares no code with fairseq or the importer.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode, get_encoder
from fairseq.models import ARCH_CONFIG_REGISTRY
from fairseq.models.roberta import RobertaModel
from safetensors.torch import load_file, save_file
from toolkit import USER_DIR, _write_indexed, train

from smart_fairseq.errors import UsageError
from smart_fairseq.import_hf import import_hf, main
from smart_fairseq.models.smart_bert import SmartBertModel

LAYERS, DIM, FFN, HEADS, POSITIONS = 2, 16, 40, 4, 24
BERT_TOKENS = [
    *("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "!", ",", "a", "b", "c", "d", "e", "##a", "##b"),
    *("##c", "##d", "##e", "un", "##able", "cat", "##s", "dog", "the", "<s>", "the", "é"),
]
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "c"), ("a", "t"), ("Ġc", "at"), ("1", "2"), ("Ġ", "d")]
DATA = Path(os.environ.get("SMART_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "gpt2_bpe"
MINILM = Path(os.environ.get("SMART_TEST_MINILM", "/nonexistent"))


# Folders as Hugging Face writes them


def config_for(family: str, vocabulary: int) -> dict[str, Any]:
    offset = {"bert": 0, "roberta": 2}[family]
    return {
        "model_type": family,
        "hidden_act": "gelu",
        "hidden_size": DIM,
        "intermediate_size": FFN,
        "layer_norm_eps": {"bert": 1e-12, "roberta": 1e-5}[family],
        "max_position_embeddings": POSITIONS + offset,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "pad_token_id": {"bert": 0, "roberta": 1}[family],
        "position_embedding_type": "absolute",
        "type_vocab_size": {"bert": 2, "roberta": 1}[family],
        "vocab_size": vocabulary,
    }


def body_of(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random weights, gains included, under names without prefix; small embeddings so that epsilon matters."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int, std: float = 0.3) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    def linear(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = normal(rows, columns), normal(rows)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = 1 + normal(DIM), normal(DIM)

    tensors: dict[str, torch.Tensor] = {
        "embeddings.word_embeddings.weight": normal(config["vocab_size"], DIM, std=0.01),
        "embeddings.position_embeddings.weight": normal(config["max_position_embeddings"], DIM, std=0.01),
        "embeddings.token_type_embeddings.weight": normal(config["type_vocab_size"], DIM, std=0.01),
    }
    norm("embeddings.LayerNorm")
    for layer in range(LAYERS):
        start = f"encoder.layer.{layer}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            linear(start + name, DIM, DIM)
        linear(start + "intermediate.dense", FFN, DIM)
        linear(start + "output.dense", DIM, FFN)
        norm(start + "attention.output.LayerNorm")
        norm(start + "output.LayerNorm")
    return tensors


def head_of(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    dense, norm, bias = {
        "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
        "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    }[config["model_type"]]
    return {
        f"{dense}.weight": draw(DIM, DIM),
        f"{dense}.bias": draw(DIM),
        f"{norm}.weight": draw(DIM),
        f"{norm}.bias": draw(DIM),
        bias: draw(config["vocab_size"]),
    }


def roberta_tokens() -> dict[str, int]:
    """A vocab.json: the specials, then GPT-2's tokens in an order of their own, fillers, <mask> last."""
    characters = list(bytes_to_unicode().values())
    products = ["".join(merge) for merge in MERGES]
    names = ["<s>", "<pad>", "</s>", "<unk>", *products[::-1], *characters[::-1], "<|endoftext|>"]
    names += ["madeupword0000", "madeupword0001", "<mask>"]
    return {name: row for row, name in enumerate(names)}


def write_hf(
    folder: Path, family: str, *, head: bool = False, prefix: bool = False, old_names: bool = False, **changes: Any
) -> Path:
    """A model folder; `changes` go into config.json. Returns the folder."""
    folder.mkdir(parents=True)
    if family == "bert":
        names = BERT_TOKENS
        (folder / "vocab.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    else:
        names = list(roberta_tokens())
        (folder / "vocab.json").write_text(json.dumps(roberta_tokens()), encoding="utf-8")
        merges = "".join(f"{left} {right}\n" for left, right in MERGES)
        (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    config = config_for(family, len(names))
    tensors = body_of(config)
    if family == "bert":
        tensors["pooler.dense.weight"] = torch.zeros(DIM, DIM)
    if prefix:
        tensors = {f"{family}.{name}": tensor for name, tensor in tensors.items()}
    if head:
        tensors.update(head_of(config))
    if old_names:
        renaming = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, old in renaming.items():
            tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    save_file(tensors, folder / "model.safetensors")
    return folder


# The architecture as published, in float64


def reference(folder: Path, tokens: torch.Tensor, lm_head: bool = False) -> torch.Tensor:
    """Last hidden state [B, T, C], or log-probabilities of the LM head [B, T, V]; tokens in Hugging Face's ids [B, T].

    Devlin et al. (2019), Vaswani et al. (2017), section 3; all tokens of a row must be real ones (no padding).
    """
    config = json.loads((folder / "config.json").read_text())
    family = config["model_type"]
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        name = name[len(family) + 1 :] if name.startswith(f"{family}.") else name
        weights[name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")] = (
            tensor.double()
        )

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred**2).mean(-1, keepdim=True)
        return (
            centred / (variance + config["layer_norm_eps"]).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]
        )

    def gelu(x: torch.Tensor) -> torch.Tensor:
        if config["hidden_act"] == "gelu_new":
            return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    first = 0 if family == "bert" else 2
    positions = torch.arange(tokens.size(1)) + first
    x = weights["embeddings.word_embeddings.weight"][tokens]
    x = x + weights["embeddings.position_embeddings.weight"][positions]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    heads = config["num_attention_heads"]
    for layer in range(config["num_hidden_layers"]):
        start = f"encoder.layer.{layer}."
        query, key, value = (
            linear(x, f"{start}attention.self.{part}")
            .unflatten(-1, (heads, -1))
            .transpose(1, 2)  # [B, heads, T, C/heads]
            for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.size(-1))
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = norm(x + linear(mixed, start + "attention.output.dense"), start + "attention.output.LayerNorm")
        inner = gelu(linear(x, start + "intermediate.dense"))
        x = norm(x + linear(inner, start + "output.dense"), start + "output.LayerNorm")
    if not lm_head:
        return x
    if family == "bert":
        x = norm(gelu(linear(x, "cls.predictions.transform.dense")), "cls.predictions.transform.LayerNorm")
        bias = weights["cls.predictions.bias"]
    else:
        x = gelu(linear(x, "lm_head.dense"))
        centred = x - x.mean(-1, keepdim=True)
        x = centred / ((centred**2).mean(-1, keepdim=True) + config["layer_norm_eps"]).sqrt()
        x = x * weights["lm_head.layer_norm.weight"] + weights["lm_head.layer_norm.bias"]
        bias = weights["lm_head.bias"]
    return (x @ weights["embeddings.word_embeddings.weight"].T + bias).log_softmax(-1)


def load(folder: Path) -> Any:
    """The imported model through fairseq's hub interface, in eval mode; it loads strictly."""
    arch = json.loads((folder / "import.json").read_text())["flags"][1]
    hub = (SmartBertModel if arch == "smart_bert" else RobertaModel).from_pretrained(str(folder), bpe=None)
    hub.eval()
    return hub


def fairseq_ids(hf_tokens: torch.Tensor, names: list[str], dictionary: Dictionary, family: str) -> torch.Tensor:
    """The same tokens in fairseq's ids, by name alone."""
    if family == "bert":
        to_fairseq = {"[CLS]": "<s>", "[PAD]": "<pad>", "[SEP]": "</s>", "[UNK]": "<unk>", "[MASK]": "<mask>"}
        symbols = [to_fairseq.get(name, name) for name in names]
    else:
        gpt2 = [*bytes_to_unicode().values(), *("".join(merge) for merge in MERGES), "<|endoftext|>"]
        symbols = [str(gpt2.index(name)) if name in gpt2 else name for name in names]
    return torch.tensor([[dictionary.index(symbols[int(token)]) for token in row] for row in hf_tokens])


def sentences(family: str) -> torch.Tensor:
    """Two rows of Hugging Face's ids, special tokens included, no padding and no repeated names."""
    generator = torch.Generator().manual_seed(5)
    if family == "bert":
        usable = [row for row, name in enumerate(BERT_TOKENS) if name not in ("[PAD]", "<s>", "the")] + [25]
        start, end = 3, 4
    else:
        usable = [row for row in range(3, len(roberta_tokens())) if row != 1]
        start, end = 0, 2
    picked = torch.tensor(usable)[torch.randint(len(usable), (2, 17), generator=generator)]
    picked[:, 0], picked[:, -1] = start, end
    return picked


def names_of(family: str) -> list[str]:
    return BERT_TOKENS if family == "bert" else list(roberta_tokens())


# Exactness


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_hidden_states_are_those_of_the_published_architecture(
    tmp_path: Path, family: str, head: bool, prefix: bool
) -> None:
    source = write_hf(tmp_path / "hf", family, head=head, prefix=prefix, old_names=prefix and family == "bert")
    import_hf(source, tmp_path / "out")
    hub = load(tmp_path / "out")
    hf_tokens = sentences(family)
    tokens = fairseq_ids(hf_tokens, names_of(family), hub.task.source_dictionary, family)
    with torch.no_grad():
        features = hub.extract_features(tokens)
    assert (features.double() - reference(source, hf_tokens)).abs().max() < 1e-5

    if head:
        with torch.no_grad():
            logits, _ = hub.model(tokens)
        every_row = torch.arange(len(names_of(family)))[None]
        columns = fairseq_ids(every_row, names_of(family), hub.task.source_dictionary, family)[0]
        # two of BERT's rows have no name in dict.txt (test_bert_dictionary)
        nameless = [BERT_TOKENS.index("the"), BERT_TOKENS.index("<s>")] if family == "bert" else []
        named = [row for row in range(len(columns)) if row not in nameless]
        expected = reference(source, hf_tokens, lm_head=True)[..., named]
        actual = logits.double().log_softmax(-1)[..., columns[named]]
        assert (actual - expected).abs().max() < 5e-5


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_padding_changes_nothing(tmp_path: Path, family: str) -> None:
    import_hf(write_hf(tmp_path / "hf", family), tmp_path / "out")
    hub = load(tmp_path / "out")
    tokens = fairseq_ids(sentences(family), names_of(family), hub.task.source_dictionary, family)
    padded = torch.cat([tokens, tokens.new_full((2, 5), hub.task.source_dictionary.pad())], dim=1)
    with torch.no_grad():
        difference = hub.extract_features(padded)[:, :17] - hub.extract_features(tokens)
    assert difference.abs().max() < 1e-5


def test_tanh_gelu(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", "bert", hidden_act="gelu_new")
    assert "gelu_accurate" in import_hf(source, tmp_path / "out")["flags"]
    hub = load(tmp_path / "out")
    tokens = fairseq_ids(sentences("bert"), BERT_TOKENS, hub.task.source_dictionary, "bert")
    with torch.no_grad():
        assert (hub.extract_features(tokens).double() - reference(source, sentences("bert"))).abs().max() < 1e-5


def test_roberta_of_another_epsilon_becomes_smart_bert(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", "roberta", layer_norm_eps=1e-6)
    flags = import_hf(source, tmp_path / "out")["flags"]
    assert flags[:2] == ["--arch", "smart_bert"] and flags[-2:] == ["--smart-layer-norm-eps", "1e-06"]
    hub = load(tmp_path / "out")
    tokens = fairseq_ids(sentences("roberta"), names_of("roberta"), hub.task.source_dictionary, "roberta")
    with torch.no_grad():
        assert (hub.extract_features(tokens).double() - reference(source, sentences("roberta"))).abs().max() < 1e-5


def test_epsilon_matters_here(tmp_path: Path) -> None:
    """Otherwise the tests above could not tell smart_bert from roberta."""
    source = write_hf(tmp_path / "hf", "bert")
    import_hf(source, tmp_path / "out")
    hub = load(tmp_path / "out")
    for module in hub.modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == (1e-12)
            module.eps = 1e-5
    tokens = fairseq_ids(sentences("bert"), BERT_TOKENS, hub.task.source_dictionary, "bert")
    with torch.no_grad():
        assert (hub.extract_features(tokens).double() - reference(source, sentences("bert"))).abs().max() > 1e-3


def test_untied_lm_head(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", "roberta", head=True, tie_word_embeddings=False)
    tensors = load_file(source / "model.safetensors")
    decoder = torch.randn_like(tensors["embeddings.word_embeddings.weight"])
    save_file({**tensors, "lm_head.decoder.weight": decoder}, source / "model.safetensors")
    assert import_hf(source, tmp_path / "out")["flags"][-1] == "--untie-weights-roberta"
    assert torch.equal(load(tmp_path / "out").model.encoder.lm_head.weight, decoder)


def test_missing_lm_head_is_the_same_every_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_hf(tmp_path / "hf", "roberta")
    for name in ("one", "two"):
        assert main([str(source), str(tmp_path / name)]) == 0
    assert capsys.readouterr().out.count("LM head: the file has none, initialised with seed 0") == 2
    first, second = (torch.load(tmp_path / name / "model.pt", weights_only=True)["model"] for name in ("one", "two"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# Dictionary and BPE files


def test_bert_dictionary(tmp_path: Path) -> None:
    """[CLS] [PAD] [SEP] [UNK] first, [MASK] last, the others in BERT's order.

    Row 23 is the first of two "the" (BERT uses the last), row 24 a token with the name of one of fairseq's: they
    become fillers in their places.
    """
    import_hf(write_hf(tmp_path / "hf", "bert"), tmp_path / "out")
    dictionary = load(tmp_path / "out").task.source_dictionary
    expected = [name for name in BERT_TOKENS if name not in ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")]
    expected[expected.index("the")], expected[expected.index("<s>")] = "madeupword0000", "madeupword0001"
    assert dictionary.symbols == ["<s>", "<pad>", "</s>", "<unk>", *expected, "<mask>"]
    assert dictionary.index("the") == 4 + expected.index("the")
    assert dictionary.count[dictionary.index("the")] == 1
    assert dictionary.count[dictionary.index("madeupword0000")] == 0
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (tmp_path / "hf" / "vocab.txt").read_bytes()
    assert json.loads((tmp_path / "out" / "bpe.json").read_text()) == {"bpe": "bert", "lowercase": True}


def test_rows_without_tokens_become_fillers(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", "bert")
    (source / "vocab.txt").write_text("".join(f"{name}\n" for name in BERT_TOKENS[:-1]), encoding="utf-8")
    import_hf(source, tmp_path / "out")
    assert load(tmp_path / "out").task.source_dictionary.symbols[-2:] == ["madeupword0002", "<mask>"]


def test_tokenizer_json_in_place_of_vocab_txt(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", "bert")
    names = [name for name in BERT_TOKENS if name != "<s>"]
    names[names.index("the")] = "x"
    (source / "vocab.txt").unlink()
    (source / "tokenizer_config.json").unlink()
    content = {
        "normalizer": {
            "type": "BertNormalizer",
            "lowercase": False,
            "strip_accents": None,
            "handle_chinese_chars": True,
        },
        "model": {"type": "WordPiece", "vocab": {name: row for row, name in enumerate(names)}},
    }
    (source / "tokenizer.json").write_text(json.dumps(content))
    import_hf(source, tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text(encoding="utf-8").split("\n") == [*names, ""]
    assert json.loads((tmp_path / "out" / "bpe.json").read_text())["lowercase"] is False


def test_roberta_tokenisation(tmp_path: Path) -> None:
    """ "the cat 12": merges t+h, th+e; Ġ+c and a+t, Ġc+at; Ġ alone, 1+2.

    GPT-2's ids: bytes 0 to 255, so merge i is 256 + i: the = 257, Ġcat = 261, 12 = 262; and Ġ, the space, is 220: after
    the 188 printable bytes come the others in order, the 32 control characters before it.
    """
    import_hf(write_hf(tmp_path / "hf", "roberta"), tmp_path / "out")
    encoder = get_encoder(str(tmp_path / "out" / "encoder.json"), str(tmp_path / "out" / "vocab.bpe"))
    ids = encoder.encode("the cat 12")
    assert ids == [257, 261, 220, 262]
    assert encoder.decode(ids) == "the cat 12"
    dictionary = load(tmp_path / "out").task.source_dictionary
    line = " ".join(map(str, ids))
    tokens = dictionary.encode_line(line, add_if_not_exist=False, append_eos=False).tolist()
    assert tokens == [roberta_tokens()[token] for token in ("the", "Ġcat", "Ġ", "12")]
    assert dictionary.symbols[-4:] == ["264", "madeupword0000", "madeupword0001", "<mask>"]
    assert json.loads((tmp_path / "out" / "bpe.json").read_text()) == {"bpe": "gpt2"}
    files = {"gpt2_encoder_json": "encoder.json", "gpt2_vocab_bpe": "vocab.bpe"}
    paths = {setting: str(tmp_path / "out" / name) for setting, name in files.items()}
    assert RobertaModel.from_pretrained(str(tmp_path / "out"), **paths).encode("the cat 12").tolist() == [0, *tokens, 2]


def test_bert_tokenisation(tmp_path: Path) -> None:
    """ "Unable cats, DOG!" lower-cased: un ##able cat ##s , dog !"""
    tokenizers = pytest.importorskip("tokenizers")
    import_hf(write_hf(tmp_path / "hf", "bert"), tmp_path / "out")
    lowercase = json.loads((tmp_path / "out" / "bpe.json").read_text())["lowercase"]
    tokenizer = tokenizers.BertWordPieceTokenizer(str(tmp_path / "out" / "vocab.txt"), lowercase=lowercase)
    pieces = tokenizer.encode("Unable cats, DOG!", add_special_tokens=False).tokens
    assert pieces == ["un", "##able", "cat", "##s", ",", "dog", "!"]
    dictionary = load(tmp_path / "out").task.source_dictionary
    ids = dictionary.encode_line(" ".join(pieces), add_if_not_exist=False, append_eos=False)
    assert dictionary.unk() not in ids.tolist()
    assert [dictionary[i] for i in ids] == pieces


def test_merges_without_header_or_in_tokenizer_json(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", "roberta")
    import_hf(source, tmp_path / "one")
    merges = (source / "merges.txt").read_text(encoding="utf-8")
    (source / "merges.txt").write_text(merges.split("\n", 1)[1], encoding="utf-8")
    import_hf(source, tmp_path / "two")
    for name in ("merges.txt", "vocab.json"):
        (source / name).unlink()
    model = {"type": "BPE", "vocab": roberta_tokens(), "merges": [list(merge) for merge in MERGES]}
    (source / "tokenizer.json").write_text(json.dumps({"model": model}))
    import_hf(source, tmp_path / "three")
    for name in ("encoder.json", "vocab.bpe", "dict.txt"):
        contents = {(tmp_path / run / name).read_bytes() for run in ("one", "two", "three")}
        assert len(contents) == 1, name


@pytest.mark.skipif(not DATA.is_dir(), reason="GPT-2's files are not there (SMART_TEST_DATA)")
def test_real_roberta_vocabulary_gives_the_official_files(tmp_path: Path) -> None:
    """vocab.json as Hugging Face made it from the official files, back to encoder.json, vocab.bpe and dict.txt."""
    encoder = json.loads((DATA / "encoder.json").read_text())
    by_id = {str(number): token for token, number in encoder.items()}
    symbols = [line.split()[0] for line in (DATA / "dict.txt").read_text().splitlines()]
    names = ["<s>", "<pad>", "</s>", "<unk>", *(by_id.get(symbol, symbol) for symbol in symbols), "<mask>"]
    source = write_hf(tmp_path / "hf", "roberta", vocab_size=len(names))
    (source / "vocab.json").write_text(json.dumps({name: row for row, name in enumerate(names)}))
    (source / "merges.txt").write_bytes((DATA / "vocab.bpe").read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"] = torch.randn(len(names), DIM)
    save_file(tensors, source / "model.safetensors")
    import_hf(source, tmp_path / "out")

    assert (tmp_path / "out" / "encoder.json").read_bytes().strip() == (DATA / "encoder.json").read_bytes().strip()
    assert (tmp_path / "out" / "vocab.bpe").read_bytes() == (DATA / "vocab.bpe").read_bytes()
    written = [line.split()[0] for line in (tmp_path / "out" / "dict.txt").read_text().splitlines()]
    assert written == symbols
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)["model"]
    types = tensors["embeddings.token_type_embeddings.weight"][0]
    embeddings = state["encoder.sentence_encoder.embed_tokens.weight"]
    assert torch.equal(embeddings, tensors["embeddings.word_embeddings.weight"] + types)  # no row moved


# Use


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_fairseq_train_starts_from_it(tmp_path: Path, family: str) -> None:
    """The flags that are printed, and the strict load of --restore-file; one update."""
    report = import_hf(write_hf(tmp_path / "hf", family), tmp_path / "out")
    data = write_task_data(tmp_path / "data", tmp_path / "out" / "dict.txt")
    arguments = [str(data), "--user-dir", USER_DIR]
    arguments += ["--task", "sentence_prediction", "--num-classes", "2", "--criterion", "sentence_prediction"]
    arguments += ["--restore-file", str(tmp_path / "out" / "model.pt")]
    arguments += ["--reset-optimizer", "--reset-dataloader", "--reset-meters", *report["flags"]]
    arguments += ["--optimizer", "adam", "--lr", "1e-9", "--batch-size", "4", "--max-update", "1", "--cpu"]
    arguments += ["--save-dir", str(tmp_path / "checkpoints"), "--num-workers", "0", "--disable-validation"]
    arguments += ["--log-format", "json", "--no-epoch-checkpoints"]
    train(arguments)
    start = torch.load(tmp_path / "out" / "model.pt", weights_only=True)["model"]
    end = torch.load(tmp_path / "checkpoints" / "checkpoint_last.pt", weights_only=True)["model"]
    assert start.keys() == {key for key in end if not key.startswith("classification_heads.")}
    for key, tensor in start.items():
        torch.testing.assert_close(end[key], tensor, rtol=0, atol=1e-7)


def write_task_data(folder: Path, dictionary_file: Path) -> Path:
    """A data folder for --task sentence_prediction over the imported dictionary."""
    words, labels = Dictionary.load(str(dictionary_file)), Dictionary()
    labels.add_symbol("0")
    labels.add_symbol("1")
    for part, dictionary in (("input0", words), ("label", labels)):
        (folder / part).mkdir(parents=True)
        dictionary.save(str(folder / part / "dict.txt"))
    lines = [" ".join(words[4 + (3 * i + j) % 15] for j in range(3 + i % 4)) for i in range(8)]
    _write_indexed(folder / "input0" / "train", lines, words)
    _write_indexed(folder / "label" / "train", [str(i % 2) for i in range(8)], labels)
    return folder


def test_no_class_but_containers_and_tensors_in_the_file(tmp_path: Path) -> None:
    """torch's safe loader takes model.pt in a process that allow-lists nothing."""
    import_hf(write_hf(tmp_path / "hf", "bert"), tmp_path / "out")
    code = f"import torch; torch.load({str(tmp_path / 'out' / 'model.pt')!r}, weights_only=True)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_hf(tmp_path / "hf", "bert")
    assert main([str(source), str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "import.json").read_text())
    assert report["source"]["sha256"] == hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    flags = "--arch smart_bert --encoder-layers 2 --encoder-embed-dim 16 --encoder-ffn-embed-dim 40"
    flags += " --encoder-attention-heads 4 --activation-fn gelu --max-positions 24 --smart-layer-norm-eps 1e-12"
    assert report["flags"] == flags.split()
    assert capsys.readouterr().out.splitlines()[-1] == flags
    assert report["left_out"] == ["pooler.dense.weight"]


def test_architectures() -> None:
    for name, layers, dim, ffn, heads in (
        ("smart_bert", 12, 768, 3072, 12),
        ("smart_bert_large", 24, 1024, 4096, 16),
        ("smart_bert_minilm_l6", 6, 384, 1536, 12),
    ):
        args = Namespace()
        ARCH_CONFIG_REGISTRY[name](args)
        sizes = (args.encoder_layers, args.encoder_embed_dim, args.encoder_ffn_embed_dim, args.encoder_attention_heads)
        assert sizes == (layers, dim, ffn, heads) and args.smart_layer_norm_eps == 1e-12


def test_impossible_epsilon_is_refused() -> None:
    args = Namespace(encoder_layers=1, encoder_embed_dim=4, encoder_ffn_embed_dim=4, encoder_attention_heads=1)
    args.max_positions, args.smart_layer_norm_eps = 4, -1.0
    ARCH_CONFIG_REGISTRY["smart_bert"](args)
    with pytest.raises(UsageError, match=r"--smart-layer-norm-eps is -1\.0; it must be a positive number"):
        SmartBertModel.build_model(args, SimpleNamespace(source_dictionary=Dictionary()))


# Errors


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


ERRORS = [
    ("bert", remove("config.json"), ["config.json", "no such file"]),
    ("bert", write("config.json", "{"), ["config.json", "cannot be read as JSON"]),
    ("bert", write("config.json", "[]"), ["config.json", "holds a list"]),
    ("bert", remove("vocab.txt"), ["vocab.txt", "no such file"]),
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
    ("roberta", remove("merges.txt"), ["merges.txt", "no such file"]),
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


@pytest.mark.parametrize("family, damage, expected", ERRORS, ids=[e[2][-1] + " / " + e[2][0] for e in ERRORS])
def test_errors_are_one_line_and_leave_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
    damage: Callable[[Path], None],
    expected: list[str],
) -> None:
    source = write_hf(tmp_path / "hf", family)
    damage(source)
    assert main([str(source), str(tmp_path / "new" / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("import_hf: error: ")
    for part in expected:
        assert part in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_existing_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused without --overwrite; replaced with it, the other family's vocabulary included, other files kept."""
    bert, roberta, out = write_hf(tmp_path / "b", "bert"), write_hf(tmp_path / "r", "roberta"), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    assert main([str(bert), str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert main([str(roberta), str(out)]) == 2
    assert "model.pt: exists already; choose another OUT_DIR or give --overwrite" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    assert main([str(roberta), str(out), "--overwrite"]) == 0
    names = {"mine.txt", "model.pt", "dict.txt", "encoder.json", "vocab.bpe", "bpe.json", "import.json"}
    assert {path.name for path in out.iterdir()} == names
    assert {path.name for path in tmp_path.iterdir()} == {"b", "r", "out"}


@pytest.mark.parametrize("where", ["hf", "hf/config.json"])
def test_impossible_output(tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str) -> None:
    source = write_hf(tmp_path / "hf", "bert")
    before = sorted(path.name for path in source.iterdir())
    assert main([str(source), str(tmp_path / where)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert sorted(path.name for path in source.iterdir()) == before


def test_interrupted_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("smart_fairseq.import_hf.torch.save", full)
    assert main([str(write_hf(tmp_path / "hf", "bert")), str(tmp_path / "out")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# The real thing


@pytest.mark.skipif(not (MINILM / "model.safetensors").exists(), reason="no MiniLM folder (SMART_TEST_MINILM)")
def test_minilm(tmp_path: Path, record_property: Callable[[str, float | None], None]) -> None:
    """all-MiniLM-L6-v2: below 1e-5 on real token ids, of short sentences and of all 512 positions."""
    from tokenizers import BertWordPieceTokenizer

    import_hf(MINILM, tmp_path / "out")
    hub = load(tmp_path / "out")
    tokenizer = BertWordPieceTokenizer(str(MINILM / "vocab.txt"), lowercase=True)
    names = (MINILM / "vocab.txt").read_text(encoding="utf-8").splitlines()
    texts = [
        "The cat sat on the mat.",
        "Stanford's researchers didn't re-evaluate 3,141 results: naïve, über, 東京!",
        (Path(__file__).parent.parent / "LICENSE").read_text() * 4,
    ]
    worst = 0.0
    for text in texts:
        hf_tokens = torch.tensor([tokenizer.encode(text).ids[:512]])
        tokens = fairseq_ids(hf_tokens, names, hub.task.source_dictionary, "bert")
        with torch.no_grad():
            worst = max(
                worst, (hub.extract_features(tokens).double() - reference(MINILM, hf_tokens)).abs().max().item()
            )
    record_property("max_abs_difference", worst)
    print(f"MiniLM: max abs difference {worst:.2e}")
    assert worst < 1e-5
