"""The tensors of model.safetensors as the state of fairseq's RobertaModel, and back."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import refuse
from ..models.smart_bert import never_trained
from .checkpoint import EMBEDDINGS, LM_HEAD, POOLER, TOKEN_TYPES
from .config import Config, Sizes

LM_HEAD_SEED = 0
POOLER_STD = 0.02  # of the weights with which BERT starts, beside biases of 0
ENCODER = "encoder.sentence_encoder."
# the LM head's prefix, and in it its dense layer and LayerNorm
LM_HEADS = {
    "bert": ("cls.predictions.", "transform.dense", "transform.LayerNorm"),
    "roberta": ("lm_head.", "dense", "layer_norm"),
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
# fairseq's head of two layers as Hugging Face holds it: BERT's first one is its pooler
CLASSIFIERS = {"bert": ("bert.pooler.dense", "classifier"), "roberta": ("classifier.dense", "classifier.out_proj")}


def modules(sizes: Sizes) -> Iterator[tuple[str, str, list[int]]]:
    """The encoder's modules of a weight and a bias: Hugging Face's name, fairseq's, the shape of the weight."""
    yield "embeddings.LayerNorm", ENCODER + "layernorm_embedding", [sizes.embed_dim]
    for layer in range(sizes.layers):
        for source, (target, shape) in LAYER_MODULES.items():
            numbers = [getattr(sizes, size) for size in shape]
            yield f"encoder.layer.{layer}.{source}", f"{ENCODER}layers.{layer}.{target}", numbers


class Weights:
    """Named tensors of which each is taken once.

    Raises `UsageError` from every method where ``path`` does not hold what ``promise`` promises.

    Args:
        keys: what to call a tensor, and its name in the file.
        get: the tensor of a name in the file.
    """

    def __init__(self, path: Path, promise: str, keys: dict[str, str], get: Callable[[str], Tensor]):
        self.path = path
        self._promise = f"{promise} promises"
        self._keys, self._get = dict(keys), get

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name as float32, [*shape]; it is no longer among the `rest`."""
        if name not in self._keys:
            refuse(self.path, f"has no tensor {name}", f"{self._promise} one of shape {list(shape)}")
        tensor = self._get(self._keys.pop(name))
        if tuple(tensor.shape) != shape:
            refuse(self.path, f"{name} has shape {list(tensor.shape)}", f"{self._promise} {list(shape)}")
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
        others = [*model_dir.glob("*.safetensors.index.json"), *model_dir.glob("pytorch_model*.bin")]
        found = f" (there is {others[0].name})" if others else ""
        refuse(path, f"no such file{found}", "the weights must be in one file of that name")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            # TensorFlow's names, in BERT's own release
            keys = {key.removeprefix(config.model_type + "."): key for key in file.keys()}
            for old, new in (("gamma", "weight"), ("beta", "bias")):
                keys = {re.sub(rf"LayerNorm\.{old}$", f"LayerNorm.{new}", name): key for name, key in keys.items()}
            yield Weights(path, config.path.name, keys, file.get_tensor)
    except (SafetensorError, OSError) as error:
        advice = "it may have been cut short: copy or download it again"
        refuse(path, f"not a readable safetensors file ({error})", advice)


def convert_weights(weights: Weights, config: Config, rows: Sequence[int]) -> tuple[dict[str, Tensor], bool, list[str]]:
    """Rename, permute and fold the tensors into the state of fairseq's RobertaModel or of smart_bert, all float32.

    ``rows``: Hugging Face's row for each of fairseq's ids. Returns the state, whether the LM head came from the file,
    and the names of the tensors left out. Raises `UsageError` for layers beyond those that config.json promises.
    """
    sizes = config.sizes
    order = torch.tensor(rows)
    state = {ENCODER + "version": torch.tensor([3.0])}

    words = weights.take("embeddings.word_embeddings.weight", sizes.vocabulary, sizes.embed_dim)
    types = weights.take("embeddings.token_type_embeddings.weight", sizes.token_types, sizes.embed_dim)
    positions = weights.take("embeddings.position_embeddings.weight", sizes.position_rows, sizes.embed_dim)
    if config.model_type == "bert" and sizes.token_types > 1:
        state[TOKEN_TYPES] = types[:2].contiguous()
    else:
        words = words + types[0]
    state[EMBEDDINGS] = words[order]
    if config.model_type == "bert":
        positions = torch.cat([positions.new_zeros(2, sizes.embed_dim), positions])
    state[ENCODER + "embed_positions.weight"] = positions

    def module(source: str, target: str, *shape: int) -> None:
        state[target + ".weight"] = weights.take(source + ".weight", *shape)
        state[target + ".bias"] = weights.take(source + ".bias", shape[0])

    for source, target, shape in modules(sizes):
        module(source, target, *shape)
    if config.model_type == "bert" and "pooler.dense.weight" in weights:
        module("pooler.dense", POOLER, sizes.embed_dim, sizes.embed_dim)
        if never_trained(state[POOLER + ".bias"]):
            weight = state[POOLER + ".weight"]
            weight *= POOLER_STD / max(float(weight.std()), 1e-9)

    head, dense, layer_norm = LM_HEADS[config.model_type]
    from_file = f"{head}{dense}.weight" in weights
    state[LM_HEAD] = state[EMBEDDINGS]
    if from_file:
        bias = head + "bias" if head + "bias" in weights else head + "decoder.bias"
        state["encoder.lm_head.bias"] = weights.take(bias, sizes.vocabulary)[order]
        module(head + dense, "encoder.lm_head.dense", sizes.embed_dim, sizes.embed_dim)
        module(head + layer_norm, "encoder.lm_head.layer_norm", sizes.embed_dim)
        if not config.tied_embeddings:
            state[LM_HEAD] = weights.take(head + "decoder.weight", sizes.vocabulary, sizes.embed_dim)[order]
    else:
        # BERT's initialisation, the same numbers every time
        generator = torch.Generator().manual_seed(LM_HEAD_SEED)
        drawn = torch.empty(sizes.embed_dim, sizes.embed_dim).normal_(std=0.02, generator=generator)
        state["encoder.lm_head.bias"] = torch.zeros(sizes.vocabulary)
        state["encoder.lm_head.dense.weight"] = drawn
        state["encoder.lm_head.dense.bias"] = torch.zeros(sizes.embed_dim)
        state["encoder.lm_head.layer_norm.weight"] = torch.ones(sizes.embed_dim)
        state["encoder.lm_head.layer_norm.bias"] = torch.zeros(sizes.embed_dim)

    rest = [name for name in weights.rest() if name != "embeddings.position_ids"]
    surplus = [name for name in rest if name.startswith(("encoder.", "embeddings."))]
    if surplus:
        limit = f"config.json says num_hidden_layers {sizes.layers}, and fairseq has no further kinds of layers"
        refuse(weights.path, f"holds {surplus[0]}, which no layer of the model uses", limit)
    tied_copies = (head + "decoder.weight", head + "decoder.bias")
    return state, from_file, [name for name in rest if name not in tied_copies]


def revert_weights(weights: Weights, config: Config, rows: Sequence[int], head: str, labels: int) -> dict[str, Tensor]:
    """The tensors of model.safetensors for sequence classification from such a state, all float32.

    Where it holds no token types, they are zeros, as type 0 is within the word embeddings; the LM head and all
    classification heads but ``head``, of ``labels`` outputs, are left out; ``rows`` as in `convert_weights`. Raises
    `UsageError` for what Hugging Face's model has no place for.
    """
    sizes, start = config.sizes, config.model_type + ".embeddings."
    words = weights.take(EMBEDDINGS, sizes.vocabulary, sizes.embed_dim)
    padding_rows = 2 if config.model_type == "bert" else 0  # BERT's positions begin at row 0
    positions = weights.take(ENCODER + "embed_positions.weight", sizes.position_rows + padding_rows, sizes.embed_dim)
    types = torch.zeros(sizes.token_types, sizes.embed_dim)
    if TOKEN_TYPES in weights:
        types = weights.take(TOKEN_TYPES, *types.shape)
    tensors = {
        start + "word_embeddings.weight": torch.empty_like(words).index_copy_(0, torch.tensor(rows), words),
        start + "position_embeddings.weight": positions[padding_rows:].contiguous(),
        start + "token_type_embeddings.weight": types,
    }
    dense, out = CLASSIFIERS[config.model_type]
    pairs = [(f"{config.model_type}.{target}", source, shape) for target, source, shape in modules(sizes)]
    pairs.append((dense, f"classification_heads.{head}.dense", [sizes.embed_dim, sizes.embed_dim]))
    pairs.append((out, f"classification_heads.{head}.out_proj", [labels, sizes.embed_dim]))
    for target, source, shape in pairs:
        tensors[target + ".weight"] = weights.take(source + ".weight", *shape)
        tensors[target + ".bias"] = weights.take(source + ".bias", shape[0])
    left_out = ("encoder.lm_head.", "classification_heads.", ENCODER + "version")
    surplus = [name for name in weights.rest() if not name.startswith(left_out)]
    surplus += [name for name in weights.rest() if name.startswith(f"classification_heads.{head}.")]
    if surplus:
        refuse(weights.path, f"holds {surplus[0]}", f"Hugging Face's {config.model_type} has no place for it")
    return tensors
