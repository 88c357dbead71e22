"""What config.json says of a model, and fairseq's settings for the same architecture."""

from pathlib import Path
from typing import Any, NamedTuple

from ..data.lines import read_object
from ..errors import refuse

MODEL_DIR_HOLDS = "MODEL_DIR must hold config.json, model.safetensors and the vocabulary"
FAIRSEQ_LAYER_NORM_EPS = 1e-5
MOST_SYMBOLS = 10_000_000
# the learning rate that suited a MiniLM of width 384 (docs/study.md), for encoders narrower than BERT-base
SMALL_RATE, BASE_WIDTH = "1e-4", 768
FAIRSEQ_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
# by family, their tokens in that order
SPECIAL_TOKENS = {"bert": ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"), "roberta": FAIRSEQ_SPECIALS}
# Hugging Face's names of what fairseq can compute; RoBERTa's LM head always uses "gelu", and fairseq has one
# activation for both
ACTIVATIONS = {
    "bert": {"gelu": "gelu", "gelu_new": "gelu_accurate", "gelu_pytorch_tanh": "gelu_accurate", "relu": "relu"},
    "roberta": {"gelu": "gelu"},
}


class Sizes(NamedTuple):
    """What config.json says about the model, under fairseq's names where it has them."""

    layers: int
    embed_dim: int
    ffn_dim: int
    heads: int
    vocabulary: int  # rows of the embedding table
    position_rows: int  # of which RoBERTa does not use the first two
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


def read_config(model_dir: Path) -> Config:
    """Read config.json; `UsageError` for what fairseq's RoBERTa cannot compute, and for sizes that are none."""
    path = model_dir / "config.json"
    if not path.is_file():
        refuse(path, "no such file", MODEL_DIR_HOLDS)
    raw = read_object(path)

    def choice(key: str, default: Any, *allowed: Any) -> Any:
        value = raw.get(key, default)
        if value not in allowed:
            refuse(path, f"{key} is {value!r}", "allowed: " + ", ".join(map(repr, allowed)))
        return value

    def number(key: str, default: int | None = None, least: int = 1) -> int:
        value = raw.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            refuse(path, f"{key} is {value!r}", f"a whole number of at least {least} is needed")
        return value

    model_type = choice("model_type", None, *SPECIAL_TOKENS)
    choice("position_embedding_type", "absolute", "absolute")
    choice("is_decoder", False, False)
    choice("add_cross_attention", False, False)
    activations = ACTIVATIONS[model_type]
    activation = activations[choice("hidden_act", "gelu", *activations)]
    sizes = Sizes(
        layers=number("num_hidden_layers"),
        embed_dim=number("hidden_size"),
        ffn_dim=number("intermediate_size"),
        heads=number("num_attention_heads"),
        vocabulary=number("vocab_size", least=len(FAIRSEQ_SPECIALS)),
        position_rows=number("max_position_embeddings", least=4),
        token_types=number("type_vocab_size", 2),
    )
    if sizes.vocabulary > MOST_SYMBOLS:  # lists of that length are made before the weights are looked at
        refuse(path, f"vocab_size is {sizes.vocabulary}", f"at most {MOST_SYMBOLS} is allowed")
    if sizes.embed_dim % sizes.heads:
        refuse(path, f"num_attention_heads is {sizes.heads}", f"it must divide hidden_size, {sizes.embed_dim}")
    eps = raw.get("layer_norm_eps", 1e-12)  # Hugging Face's default for both families
    if not isinstance(eps, (int, float)) or not 0 < eps < 1:
        refuse(path, f"layer_norm_eps is {eps!r}", "a number between 0 and 1 is needed")
    pad_token_id = number("pad_token_id", {"bert": 0, "roberta": 1}[model_type], least=0)
    tied_embeddings = bool(raw.get("tie_word_embeddings", True))
    return Config(path, model_type, sizes, activation, float(eps), pad_token_id, tied_embeddings)


def architecture(config: Config, untied: bool) -> dict[str, Any]:
    """The model's settings by fairseq's names: what the flags say and model.pt's configuration holds.

    ``untied``: the LM head does not share the embeddings.
    """
    sizes = config.sizes
    roberta = config.model_type == "roberta"
    plain = roberta and config.layer_norm_eps == FAIRSEQ_LAYER_NORM_EPS
    settings: dict[str, Any] = {
        "arch": "roberta" if plain else "smart_bert",
        "encoder_layers": sizes.layers,
        "encoder_embed_dim": sizes.embed_dim,
        "encoder_ffn_embed_dim": sizes.ffn_dim,
        "encoder_attention_heads": sizes.heads,
        "activation_fn": config.activation,
        # RoBERTa's rows 0 and 1 of the position table stand for no position
        "max_positions": sizes.position_rows - (2 if roberta else 0),
    }
    if not plain:
        settings["smart_layer_norm_eps"] = config.layer_norm_eps
    if untied:
        settings["untie_weights_roberta"] = True
    return settings


def architecture_flags(settings: dict[str, Any]) -> list[str]:
    """fairseq-train's flags for these settings: {"encoder_layers": 6} gives ["--encoder-layers", "6"]."""
    pairs = [("--" + name.replace("_", "-"), [] if value is True else [str(value)]) for name, value in settings.items()]
    return [word for flag, values in pairs for word in (flag, *values)]


def config_json(config: Config) -> dict[str, Any]:
    """The part of config.json that `read_config` reads."""
    sizes = config.sizes
    return {
        "model_type": config.model_type,
        "hidden_act": {ours: theirs for theirs, ours in reversed(ACTIVATIONS["bert"].items())}[config.activation],
        "hidden_size": sizes.embed_dim,
        "intermediate_size": sizes.ffn_dim,
        "layer_norm_eps": config.layer_norm_eps,
        "max_position_embeddings": sizes.position_rows,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "pad_token_id": config.pad_token_id,
        "type_vocab_size": sizes.token_types,
        "vocab_size": sizes.vocabulary,
    }


def recipe_overrides(settings: dict[str, Any], separator: bool) -> list[str]:
    """What a recipe of examples/, which is for RoBERTa-large, needs changed for a model of these settings.

    separator: whether one stands between two texts, as in RoBERTa.
    """
    rest = {name: str(value).lower() if value is True else value for name, value in settings.items() if name != "arch"}
    found = [f"model._name={settings['arch']}", *(f"+model.{name}={value}" for name, value in rest.items())]
    found.append(f"task.max_positions={settings['max_positions']}")
    if not separator:
        found.append("task.separator_token=null")
    if settings["encoder_embed_dim"] < BASE_WIDTH:
        found.append(f"optimization.lr=[{SMALL_RATE}]")
    return found
