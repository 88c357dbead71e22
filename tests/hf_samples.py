"""Models as Hugging Face writes them, tiny and random, and what they compute.

The reference is the architecture as published, in float64; it shares no code with fairseq or the importer.
"""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode
from fairseq.models.roberta import RobertaModel
from safetensors.torch import load_file, save_file
from toolkit import USER_DIR, _write_indexed

from smart_fairseq.models.smart_bert import SmartBertModel

LAYERS, DIM, FFN, HEADS, POSITIONS = 2, 16, 40, 4, 24
BERT_TOKENS = [
    *("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "!", ",", "a", "b", "c", "d", "e", "##a", "##b"),
    *("##c", "##d", "##e", "un", "##able", "cat", "##s", "dog", "the", "<s>", "the", "é"),
]
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "c"), ("a", "t"), ("Ġc", "at"), ("1", "2"), ("Ġ", "d")]


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
        generator = torch.Generator().manual_seed(6)
        tensors["pooler.dense.weight"] = torch.randn(DIM, DIM, generator=generator) * 0.3
        tensors["pooler.dense.bias"] = torch.randn(DIM, generator=generator) * 0.3
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


def reference(folder: Path, tokens: torch.Tensor, lm_head: bool = False, types: Any = 0) -> torch.Tensor:
    """Last hidden state [B, T, C], or log-probabilities of the LM head [B, T, V]; tokens in Hugging Face's ids [B, T].

    ``types``: token types, [B, T] or one for all. Devlin et al. (2019), Vaswani et al. (2017), section 3; all tokens of
    a row must be real ones (no padding).
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
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][types], "embeddings.LayerNorm")
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


def pooled(folder: Path, hidden: torch.Tensor) -> torch.Tensor:
    """BERT's pooled output [B, C] of last hidden states [B, T, C]: a dense layer and tanh over [CLS]."""
    file = {name.removeprefix("bert."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    weight, bias = file["pooler.dense.weight"].double(), file["pooler.dense.bias"].double()
    return torch.tanh(hidden[:, 0] @ weight.T + bias)


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
    """Two rows of Hugging Face's ids, special tokens included; no padding, no repeated names, no separator within."""
    generator = torch.Generator().manual_seed(5)
    if family == "bert":
        usable = [row for row, name in enumerate(BERT_TOKENS) if name not in ("[PAD]", "[SEP]", "<s>", "the")] + [25]
        start, end = 3, 4
    else:
        usable = [row for row in range(3, len(roberta_tokens())) if row != 1]
        start, end = 0, 2
    picked = torch.tensor(usable)[torch.randint(len(usable), (2, 17), generator=generator)]
    picked[:, 0], picked[:, -1] = start, end
    return picked


def names_of(family: str) -> list[str]:
    return BERT_TOKENS if family == "bert" else list(roberta_tokens())


def fine_tuning(data: Path, imported: Path, save_dir: Path, *flags: str) -> list[str]:
    """Arguments for fairseq-train that start from an imported encoder; later flags win over these."""
    architecture = json.loads((imported / "import.json").read_text())["flags"]
    return [
        *(str(data), "--user-dir", USER_DIR, "--task", "sentence_prediction", "--num-classes", "2", *architecture),
        *("--restore-file", str(imported / "model.pt"), "--reset-optimizer", "--reset-dataloader", "--reset-meters"),
        *("--criterion", "smart_sentence_prediction", "--optimizer", "mbpp", "--batch-size", "4", "--cpu"),
        *("--num-workers", "0", "--disable-validation", "--no-epoch-checkpoints", "--log-format", "json"),
        *("--save-dir", str(save_dir), *flags),
    ]


def write_task_data(folder: Path, dictionary_file: Path, pairs: bool = False) -> Path:
    """A data folder for --task sentence_prediction over the imported dictionary, of single texts or of pairs."""
    words, labels = Dictionary.load(str(dictionary_file)), Dictionary()
    labels.add_symbol("0")
    labels.add_symbol("1")
    for part, dictionary in (("input0", words), ("label", labels), *([("input1", words)] if pairs else [])):
        (folder / part).mkdir(parents=True)
        dictionary.save(str(folder / part / "dict.txt"))
    lines = [" ".join(words[4 + (3 * i + j) % 15] for j in range(3 + i % 4)) for i in range(8)]
    _write_indexed(folder / "input0" / "train", lines, words)
    if pairs:
        _write_indexed(folder / "input1" / "train", lines[::-1], words)
    _write_indexed(folder / "label" / "train", [str(i % 2) for i in range(8)], labels)
    return folder


# transformers itself

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
AROUND = """
import json, sys
sys.modules["torchaudio"] = None  # one for CUDA does not load without it, and transformers would try
import torch
asked, found = json.loads(sys.stdin.read()), {}
CODE
assert not {"fairseq", "smart_fairseq"} & {name.split(".")[0] for name in sys.modules}
print("RESULT" + json.dumps(found))
"""


def in_transformers(code: str, asked: Any, folder: Path) -> Any:
    """What ``code`` puts into `found` of ``asked``, in a process that knows neither fairseq nor this package."""
    program = [sys.executable, "-c", AROUND.replace("CODE", code)]
    done = subprocess.run(program, input=json.dumps(asked), capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("RESULT")[1])
