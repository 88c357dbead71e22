"""Turn a Hugging Face folder of the RoBERTa or BERT family into a checkpoint that fairseq trains from.

    python -m smart_fairseq.import_hf MODEL_DIR OUT_DIR

MODEL_DIR holds config.json, model.safetensors and the vocabulary (vocab.json and merges.txt, or vocab.txt,
or tokenizer.json). OUT_DIR receives

    model.pt      the weights and a fairseq configuration, plain containers and tensors only
    dict.txt      fairseq's dictionary. Its counts are not known to Hugging Face: 1 for every symbol, 0 for the
                  fillers of rows that have no token (masked language modelling uses counts with
                  --freq-weighted-replacement; fine-tuning for sentences does not)
    bpe.json      {"bpe": "gpt2"} or {"bpe": "bert", "lowercase": true}
    encoder.json, vocab.bpe (gpt2) or vocab.txt (bert)
    import.json   sizes, the source file's SHA-256, and fairseq-train's architecture flags as a list

Where the two models differ, and what is done about it:

- fairseq starts every dictionary with <s> <pad> </s> <unk> and its tasks append <mask>. Rows of the embedding
  (and of the LM head's bias) are permuted to that order; all others keep their order.
- fairseq has no token types. Type 0 is added to the word embeddings, in the order in which BERT adds them, so
  nothing is lost; type 1 is left out, and a second sentence is told apart by its separators alone, as in
  RoBERTa. An LM head that shares the embeddings adds the same number to the logits of all symbols, which no
  probability can see.
- fairseq counts positions from 2 (padding index + 1): BERT's row i becomes row i + 2; RoBERTa's have that offset.
- fairseq's LayerNorm has epsilon 1e-5; other epsilons need `--arch smart_bert` (models/smart_bert.py).
- The pooler is left out: fairseq's classification head has its own dense layer, initialised anew.

Sources: Devlin et al. (2019), arXiv:1810.04805; Liu et al. (2019), arXiv:1907.11692; Radford et al. (2019) for
the byte-level vocabulary: ids 0 to 255 are the bytes, 256 + i is merge i, then <|endoftext|>.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from fairseq.criterions.masked_lm import MaskedLmConfig
from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode
from fairseq.dataclass.configs import FairseqConfig
from fairseq.tasks.masked_lm import MaskedLMConfig
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smart_fairseq.errors import UsageError
from smart_fairseq.files import hidden_folder, sha256

WRITTEN_FILES = ("model.pt", "dict.txt", "encoder.json", "vocab.bpe", "vocab.txt", "bpe.json", "import.json")
FAIRSEQ_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
END_OF_TEXT = "<|endoftext|>"
FAIRSEQ_LAYER_NORM_EPS = 1e-5
LM_HEAD_SEED = 0

# Hugging Face's names of what fairseq can compute; RoBERTa's LM head always uses "gelu", and fairseq has one
# activation for both
ACTIVATIONS = {
    "bert": {"gelu": "gelu", "gelu_new": "gelu_accurate", "gelu_pytorch_tanh": "gelu_accurate", "relu": "relu"},
    "roberta": {"gelu": "gelu"},
}
# their tokens in the order of FAIRSEQ_SPECIALS
SPECIAL_TOKENS = {"bert": ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"), "roberta": FAIRSEQ_SPECIALS}
LM_HEADS = {
    "bert": {
        "dense": "cls.predictions.transform.dense",
        "layer_norm": "cls.predictions.transform.LayerNorm",
        "bias": "cls.predictions.bias",
        "decoder": "cls.predictions.decoder",
    },
    "roberta": {
        "dense": "lm_head.dense",
        "layer_norm": "lm_head.layer_norm",
        "bias": "lm_head.bias",
        "decoder": "lm_head.decoder",
    },
}
LAYER_MODULES = {  # Hugging Face's -> fairseq's, and which sizes its weight joins
    "attention.self.query": ("self_attn.q_proj", ("embed_dim", "embed_dim")),
    "attention.self.key": ("self_attn.k_proj", ("embed_dim", "embed_dim")),
    "attention.self.value": ("self_attn.v_proj", ("embed_dim", "embed_dim")),
    "attention.output.dense": ("self_attn.out_proj", ("embed_dim", "embed_dim")),
    "attention.output.LayerNorm": ("self_attn_layer_norm", ("embed_dim",)),
    "intermediate.dense": ("fc1", ("ffn_dim", "embed_dim")),
    "output.dense": ("fc2", ("embed_dim", "ffn_dim")),
    "output.LayerNorm": ("final_layer_norm", ("embed_dim",)),
}


class Sizes(NamedTuple):
    """What config.json says about the model, under fairseq's names where it has them.

    `vocabulary` counts the rows of the embedding table, `position_rows` those of the position table, of which
    RoBERTa does not use the first two.
    """

    layers: int
    embed_dim: int
    ffn_dim: int
    heads: int
    vocabulary: int
    position_rows: int
    token_types: int


class Config(NamedTuple):
    """The parts of config.json that decide what is computed."""

    path: Path
    model_type: str
    sizes: Sizes
    activation: str  # fairseq's name
    layer_norm_eps: float
    pad_token_id: int
    tied_embeddings: bool


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


def refuse(where: Any, what: str, allowed: str) -> NoReturn:
    """Raise the error that names the file, what is wrong with it, and what would be right."""
    raise UsageError(f"{where}: {what}; {allowed}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; `UsageError` if the file is missing, broken, or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        refuse(path, "no such file", "MODEL_DIR must hold config.json, model.safetensors and the vocabulary")
    except (OSError, ValueError) as error:
        refuse(path, f"cannot be read as JSON ({error})", "copy or download it again")
    if not isinstance(content, dict):
        refuse(path, f"holds a {type(content).__name__}", "a JSON object is needed")
    return content


def read_config(model_dir: Path) -> Config:
    """Read config.json and refuse what fairseq's RoBERTa cannot compute.

    Raises `UsageError` for a model of another family, an activation or a kind of positions that fairseq does not
    have, and missing or impossible sizes.
    """
    path = model_dir / "config.json"
    raw = read_json(path)

    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in SPECIAL_TOKENS:
        refuse(path, f"model_type is {model_type!r}", "allowed: 'bert', 'roberta'")
    for key, allowed in (
        ("position_embedding_type", "absolute"),
        ("is_decoder", False),
        ("add_cross_attention", False),
    ):
        if raw.get(key, allowed) != allowed:
            refuse(path, f"{key} is {raw[key]!r}", f"allowed: {allowed!r}")
    activations = ACTIVATIONS[model_type]
    hidden_act = raw.get("hidden_act", "gelu")
    if not isinstance(hidden_act, str) or hidden_act not in activations:
        refuse(path, f"hidden_act is {hidden_act!r}", "allowed: " + ", ".join(map(repr, activations)))

    def number(key: str, default: int | None = None, least: int = 1) -> int:
        value = raw.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            refuse(path, f"{key} is {value!r}", f"a whole number of at least {least} is needed")
        return value

    sizes = Sizes(
        layers=number("num_hidden_layers"),
        embed_dim=number("hidden_size"),
        ffn_dim=number("intermediate_size"),
        heads=number("num_attention_heads"),
        vocabulary=number("vocab_size", least=len(FAIRSEQ_SPECIALS)),
        position_rows=number("max_position_embeddings", least=4),
        token_types=number("type_vocab_size", 2),
    )
    if sizes.embed_dim % sizes.heads:
        refuse(path, f"num_attention_heads is {sizes.heads}", f"it must divide hidden_size, {sizes.embed_dim}")
    eps = raw.get("layer_norm_eps", 1e-12)  # Hugging Face's default for both families
    if not isinstance(eps, (int, float)) or not 0 < eps < 1:
        refuse(path, f"layer_norm_eps is {eps!r}", "a number between 0 and 1 is needed")
    return Config(
        path=path,
        model_type=model_type,
        sizes=sizes,
        activation=activations[hidden_act],
        layer_norm_eps=float(eps),
        pad_token_id=number("pad_token_id", {"bert": 0, "roberta": 1}[model_type], least=0),
        tied_embeddings=bool(raw.get("tie_word_embeddings", True)),
    )


# Vocabulary


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


def read_lines(path: Path) -> list[str]:
    """The file's lines without line ends; `UsageError` if it is missing or not UTF-8."""
    try:
        with path.open(encoding="utf-8") as file:
            return [line.rstrip("\n") for line in file]
    except FileNotFoundError:
        refuse(path, "no such file", "MODEL_DIR must hold config.json, model.safetensors and the vocabulary")
    except (OSError, ValueError) as error:
        refuse(path, f"cannot be read as UTF-8 text ({error})", "copy or download it again")


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


# Weights


class Weights:
    """The tensors of a safetensors file under names without the model's prefix, each taken once.

    Raises `UsageError` from every method where the file does not hold what config.json promises.
    """

    def __init__(self, path: Path, config: Config, file: Any):
        self.path = path
        self.config = config
        self._file = file
        keys = list(file.keys())
        prefix = config.model_type + "."
        if not any(key.startswith(prefix + "embeddings.") for key in keys):
            prefix = ""
        # TensorFlow's names, in BERT's own release
        renamed = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
        self._keys: dict[str, str] = {}
        for key in keys:
            name = key[len(prefix) :] if key.startswith(prefix) else key
            for old, new in renamed.items():
                if name.endswith(old):
                    name = name[: -len(old)] + new
            self._keys[name] = key

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name as float32, [*shape]."""
        if name not in self._keys:
            refuse(self.path, f"has no tensor {name}", f"{self.config.path.name} promises one of shape {list(shape)}")
        tensor: Tensor = self._file.get_tensor(self._keys.pop(name))
        if tuple(tensor.shape) != shape:
            refuse(
                self.path,
                f"{name} has shape {list(tensor.shape)}",
                f"{self.config.path.name} promises {list(shape)}",
            )
        if not tensor.is_floating_point():
            refuse(self.path, f"{name} is of type {tensor.dtype}", "allowed: floating point")
        return tensor.float().contiguous()

    def rest(self) -> list[str]:
        """Names of what was not taken."""
        return sorted(self._keys)


@contextlib.contextmanager
def open_weights(model_dir: Path, config: Config) -> Iterator[Weights]:
    """Open model.safetensors; `UsageError` if it is missing or cut short."""
    path = model_dir / "model.safetensors"
    if not path.is_file():
        others = [path for path in (*model_dir.glob("*.safetensors.index.json"), *model_dir.glob("pytorch_model*.bin"))]
        found = f" (there is {others[0].name})" if others else ""
        refuse(path, f"no such file{found}", "the weights must be in one file of that name")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            yield Weights(path, config, file)
    except (SafetensorError, OSError) as error:
        refuse(
            path, f"not a readable safetensors file ({error})", "it may have been cut short: copy or download it again"
        )


def convert_weights(weights: Weights, config: Config, rows: Sequence[int]) -> tuple[dict[str, Tensor], bool, list[str]]:
    """Rename, permute and fold the tensors into the state of fairseq's RobertaModel.

    Args:
        rows: Hugging Face's row for each of fairseq's ids

    Returns:
        the state, all float32; whether the LM head came from the file; names of the tensors left out
    """
    sizes = config.sizes
    order = torch.tensor(rows)
    encoder = "encoder.sentence_encoder."
    state = {encoder + "version": torch.tensor([3.0])}

    words = weights.take("embeddings.word_embeddings.weight", sizes.vocabulary, sizes.embed_dim)
    types = weights.take("embeddings.token_type_embeddings.weight", sizes.token_types, sizes.embed_dim)
    positions = weights.take("embeddings.position_embeddings.weight", sizes.position_rows, sizes.embed_dim)
    state[encoder + "embed_tokens.weight"] = (words + types[0])[order]
    if config.model_type == "bert":
        positions = torch.cat([positions.new_zeros(2, sizes.embed_dim), positions])
    state[encoder + "embed_positions.weight"] = positions

    def module(source: str, target: str, *shape: int) -> None:
        state[target + ".weight"] = weights.take(source + ".weight", *shape)
        state[target + ".bias"] = weights.take(source + ".bias", shape[0])

    module("embeddings.LayerNorm", encoder + "layernorm_embedding", sizes.embed_dim)
    for layer in range(sizes.layers):
        for source, (target, shape) in LAYER_MODULES.items():
            shape_in_numbers = [getattr(sizes, size) for size in shape]
            module(f"encoder.layer.{layer}.{source}", f"{encoder}layers.{layer}.{target}", *shape_in_numbers)

    head = LM_HEADS[config.model_type]
    from_file = f"{head['dense']}.weight" in weights
    state["encoder.lm_head.weight"] = state[encoder + "embed_tokens.weight"]
    if from_file:
        bias = head["bias"] if head["bias"] in weights else head["decoder"] + ".bias"
        state["encoder.lm_head.bias"] = weights.take(bias, sizes.vocabulary)[order]
        module(head["dense"], "encoder.lm_head.dense", sizes.embed_dim, sizes.embed_dim)
        module(head["layer_norm"], "encoder.lm_head.layer_norm", sizes.embed_dim)
        if not config.tied_embeddings:
            decoder = weights.take(head["decoder"] + ".weight", sizes.vocabulary, sizes.embed_dim)
            state["encoder.lm_head.weight"] = decoder[order]
    else:
        # BERT's initialisation, the same numbers every time
        generator = torch.Generator().manual_seed(LM_HEAD_SEED)
        dense = torch.empty(sizes.embed_dim, sizes.embed_dim).normal_(std=0.02, generator=generator)
        state["encoder.lm_head.bias"] = torch.zeros(sizes.vocabulary)
        state["encoder.lm_head.dense.weight"] = dense
        state["encoder.lm_head.dense.bias"] = torch.zeros(sizes.embed_dim)
        state["encoder.lm_head.layer_norm.weight"] = torch.ones(sizes.embed_dim)
        state["encoder.lm_head.layer_norm.bias"] = torch.zeros(sizes.embed_dim)

    rest = [name for name in weights.rest() if name != "embeddings.position_ids"]
    surplus = [name for name in rest if name.startswith(("encoder.", "embeddings."))]
    if surplus:
        refuse(
            weights.path,
            f"holds {surplus[0]}, which no layer of the model uses",
            f"config.json says num_hidden_layers {sizes.layers}, and fairseq has no further kinds of layers",
        )
    tied_copies = (head["decoder"] + ".weight", head["decoder"] + ".bias")
    return state, from_file, [name for name in rest if name not in tied_copies]


# Output


def architecture(config: Config, untied: bool) -> dict[str, Any]:
    """The model's settings by fairseq's names: what the flags say and model.pt's configuration holds."""
    sizes = config.sizes
    # RoBERTa's rows 0 and 1 of the position table stand for no position
    positions = sizes.position_rows - (2 if config.model_type == "roberta" else 0)
    settings: dict[str, Any] = {
        "arch": "smart_bert",
        "encoder_layers": sizes.layers,
        "encoder_embed_dim": sizes.embed_dim,
        "encoder_ffn_embed_dim": sizes.ffn_dim,
        "encoder_attention_heads": sizes.heads,
        "activation_fn": config.activation,
        "max_positions": positions,
    }
    if config.model_type == "roberta" and config.layer_norm_eps == FAIRSEQ_LAYER_NORM_EPS:
        settings["arch"] = "roberta"
    else:
        settings["smart_layer_norm_eps"] = config.layer_norm_eps
    if untied:
        settings["untie_weights_roberta"] = True
    return settings


def architecture_flags(settings: dict[str, Any]) -> list[str]:
    """fairseq-train's flags for these settings: {"encoder_layers": 6} gives ["--encoder-layers", "6"]."""
    flags = []
    for name, value in settings.items():
        flags.append("--" + name.replace("_", "-"))
        if value is not True:
            flags.append(str(value))
    return flags


def build_checkpoint(state: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint as fairseq-train writes it after 0 updates, task masked_lm, of plain containers and tensors."""
    config = OmegaConf.structured(FairseqConfig())
    config.task = MaskedLMConfig(data=".", tokens_per_sample=settings["max_positions"])
    config.task._name = "masked_lm"
    config.criterion = MaskedLmConfig()
    config.criterion._name = "masked_lm"
    # the hub interface overrides load_checkpoint_heads, and only settings that are there can be overridden
    config.model = {"_name": settings["arch"], "load_checkpoint_heads": False, **settings}
    return {
        "args": None,
        "cfg": OmegaConf.to_container(config, resolve=True, enum_to_str=True),
        "model": state,
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "MaskedLmLoss",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {},
                "num_updates": 0,
            }
        ],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0, "shuffle": True}},
        "last_optimizer_state": None,
    }


@contextlib.contextmanager
def staged(out_dir: Path) -> Iterator[Path]:
    """A new folder beside `out_dir` whose files move there when the block ends well, and vanish when it does not.

    model.pt moves last: where it is, the import is complete.
    """
    with hidden_folder(out_dir) as staging:
        yield staging
        if out_dir.exists():
            replaces_import = (out_dir / "model.pt").exists()
            with contextlib.suppress(FileNotFoundError):
                (out_dir / "model.pt").unlink()
            for name in reversed(WRITTEN_FILES):
                if (staging / name).exists():
                    os.replace(staging / name, out_dir / name)
                elif replaces_import and (out_dir / name).exists():
                    # another family's vocabulary, of the import that is replaced
                    (out_dir / name).unlink()
        else:
            staging.rename(out_dir)


def import_hf(model_dir: Path, out_dir: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Convert `model_dir` and write `out_dir`, completely or not at all.

    Args:
        model_dir: folder with config.json, model.safetensors and the vocabulary
        out_dir: folder to write; made if missing
        overwrite: replace an import that is there

    Returns:
        what import.json holds, and under "notes" the lines for the user

    Raises:
        UsageError: for a folder that is not of the two families, is incomplete or contradicts itself, and for
            an `out_dir` that holds a model.pt already
    """
    if not model_dir.is_dir():
        refuse(model_dir, "no such folder", "MODEL_DIR must hold config.json, model.safetensors and the vocabulary")
    if out_dir.exists():
        if not out_dir.is_dir():
            refuse(out_dir, "is not a folder", "OUT_DIR must be a folder or not exist")
        if out_dir.samefile(model_dir):
            refuse(out_dir, "is MODEL_DIR itself", "OUT_DIR must be another folder")
        if (out_dir / "model.pt").exists() and not overwrite:
            refuse(out_dir / "model.pt", "exists already", "choose another OUT_DIR or give --overwrite")

    config = read_config(model_dir)
    if config.model_type == "bert":
        vocabulary = read_bert_vocabulary(model_dir, config)
    else:
        vocabulary = read_gpt2_vocabulary(model_dir, config)
        # fairseq computes positions from the padding index, which is 1 in all of its dictionaries
        if config.pad_token_id != 1 or vocabulary.rows[1] != 1:
            refuse(
                config.path,
                f"pad_token_id is {config.pad_token_id} and <pad> has the id {vocabulary.rows[1]}",
                "RoBERTa's positions start at 2 because both are 1; allowed: 1",
            )
    with open_weights(model_dir, config) as weights:
        state, head_from_file, left_out = convert_weights(weights, config, vocabulary.rows)

    untied = state["encoder.lm_head.weight"] is not state["encoder.sentence_encoder.embed_tokens.weight"]
    settings = architecture(config, untied)
    report: dict[str, Any] = {
        "model_type": config.model_type,
        "sizes": {**config.sizes._asdict(), "max_positions": settings["max_positions"]},
        "layer_norm_eps": config.layer_norm_eps,
        "source": {"file": "model.safetensors", "sha256": sha256(model_dir / "model.safetensors")},
        "lm_head": "file" if head_from_file else "initialised",
        "left_out": left_out,
        "flags": architecture_flags(settings),
    }
    with staged(out_dir) as staging:
        for name, content in vocabulary.files.items():
            (staging / name).write_bytes(content)
        (staging / "bpe.json").write_text(json.dumps(vocabulary.bpe) + "\n", encoding="utf-8")
        with (staging / "dict.txt").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{symbol} {count}\n" for symbol, count in zip(vocabulary.symbols, vocabulary.counts))
        (staging / "import.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        torch.save(build_checkpoint(state, settings), staging / "model.pt")

    notes = list(vocabulary.notes)
    notes.append("counts in dict.txt are not known to Hugging Face files: 1 for symbols, 0 for fillers (madeupword)")
    if head_from_file:
        notes.append("LM head: taken from the file")
    else:
        notes.append(
            f"LM head: the file has none, initialised with seed {LM_HEAD_SEED}; classification does not use it"
        )
    if left_out:
        notes.append("left out: " + ", ".join(left_out))
    return {**report, "notes": notes}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 with one line on standard error."""
    parser = argparse.ArgumentParser(
        prog="import_hf", description="turn a Hugging Face folder (BERT, RoBERTa) into a checkpoint for fairseq"
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR", type=Path, help="config.json, model.safetensors, vocabulary")
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="folder for model.pt, dict.txt and the BPE files")
    parser.add_argument("--overwrite", action="store_true", help="replace an import that is in OUT_DIR")
    args = parser.parse_args(argv)
    try:
        report = import_hf(args.model_dir, args.out_dir, overwrite=args.overwrite)
    except (UsageError, OSError) as error:
        print("import_hf: error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    for note in report["notes"]:
        print(f"import_hf: {note}")
    print(f"import_hf: wrote {args.out_dir}; train with")
    print(" ".join(report["flags"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
