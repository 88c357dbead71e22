"""Turn a checkpoint of this plugin into one that plain fairseq loads, with the same predictions.

    python -m smart_fairseq.export CHECKPOINT OUT.pt [--teacher]

With ``--teacher`` the weights are those of the teacher that --optimizer mbpp keeps, instead of the model's.

The result has `--arch roberta`, criterion `sentence_prediction`, optimizer `adam`, no optimizer state, and no
object, name or setting of this package; it holds plain containers and tensors only, which torch's safe loader
takes as they are.

Epsilon. fairseq's RoBERTa divides by sqrt(variance + 1e-5) in every LayerNorm, `smart_bert` by
sqrt(variance + eps). LayerNorm forgets the scale of its input, apart from epsilon, so the whole residual stream
is made larger by a factor s:

    LayerNorm(s x; 1e-5) = LayerNorm(x; 1e-5 / s^2)

Embeddings, the gain and bias of every LayerNorm, and whatever is added to the stream (out_proj, fc2) are
multiplied by s; what reads the stream (the weights of q, k, v and fc1) is divided by s; the last layer's final
LayerNorm keeps its gain and bias, so features and classification heads stay as they are. For eps = 1e-12, s is
2^12 and 1e-5 / s^2 = 6e-13: powers of two cost no precision in float32.

Limits: half precision. Activations are s times as large, beyond float16's 65504 in places: run exported models
in float32 or bfloat16 (float16 weights are written as float32). And the LM head: its LayerNorm follows a
gelu, which does not scale, so that one keeps fairseq's 1e-5; its gain and bias are divided by s when it shares
the embeddings, which leaves the logits as they are apart from that epsilon. Classification does not use it.
"""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq.models import ARCH_MODEL_REGISTRY
from omegaconf import OmegaConf
from torch import Tensor

from smart_fairseq.errors import UsageError
from smart_fairseq.files import whole_file
from smart_fairseq.models.smart_bert import SmartBertModel

FAIRSEQ_LAYER_NORM_EPS = 1e-5
OUR_PREFIXES = ("smart_", "mbpp_")
# names that only this package registers, and fairseq's that stand in for them
REPLACED_CRITERION = ("SentencePredictionCriterion", "sentence_prediction")
REPLACED_OPTIMIZER = ("FairseqAdam", "adam")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint with torch's safe loader; `UsageError` if it is none of fairseq's."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; CHECKPOINT must be a checkpoint written by fairseq-train") from None
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{path}: not a readable checkpoint ({reason}); copy it again") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict) or not state.get("cfg"):
        raise UsageError(f"{path}: holds no model or no configuration; a checkpoint written by fairseq-train is needed")
    return state


def teacher_weights(path: Path, state: dict[str, Any]) -> dict[str, Tensor]:
    """The model's state with the teacher's weights in the place of those that were trained.

    The teacher is a list without names, in the order of the model's parameters, or one flat tensor (--fp16).

    Args:
        path: where `state` is from, for messages
        state: a checkpoint as `load_checkpoint` returns it; not changed

    Raises:
        UsageError: there is no teacher, or it does not fit the model's parameters
    """
    teacher = ((state.get("last_optimizer_state") or {}).get("mbpp") or {}).get("teacher")
    if not teacher:
        raise UsageError(
            f"{path}: holds no teacher; a checkpoint of a run with --optimizer mbpp is needed, saved after an update "
            "and without --no-save-optimizer-state"
        )
    model: dict[str, Tensor] = dict(state["model"])
    embeddings, tied = "encoder.sentence_encoder.embed_tokens.weight", "encoder.lm_head.weight"
    if tied in model and embeddings in model and torch.equal(model[tied], model[embeddings]):
        del model[tied]
    names = [name for name in model if not name.endswith((".version", "._float_tensor"))]  # fairseq's buffers
    shapes = [model[name].shape for name in names]
    if len(teacher) == 1 and teacher[0].dim() == 1 and len(names) > 1:
        sizes = [shape.numel() for shape in shapes]
        if sum(sizes) == teacher[0].numel():
            teacher = [piece.view(shape) for piece, shape in zip(teacher[0].split(sizes), shapes)]
    if [weight.shape for weight in teacher] != shapes:
        raise UsageError(
            f"{path}: its teacher's {len(teacher)} tensors do not fit the model's {len(names)}; allowed: models all of "
            "whose parameters were trained, on one device"
        )
    model.update(zip(names, teacher))
    if tied in state["model"] and tied not in model:
        model[tied] = model[embeddings]
    return {name: model[name] for name in state["model"]}


def plain(value: Any) -> Any:
    """The same as dictionaries, lists, numbers, strings and None; anything else by its text."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True, enum_to_str=True)
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    # enumerations of fairseq's are strings; numpy's numbers know their plain value
    return value.item() if hasattr(value, "item") else str(value)


def without_ours(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without those of this package's flags."""
    return {key: value for key, value in settings.items() if not key.startswith(OUR_PREFIXES)}


def architecture_of(path: Path, model: dict[str, Any]) -> Any:
    """The model class of a checkpoint; `UsageError` unless it is RoBERTa or smart_bert."""
    from fairseq.models.roberta import RobertaModel

    name = model.get("_name") or model.get("arch")
    kind = ARCH_MODEL_REGISTRY.get(name)
    if kind not in (SmartBertModel, RobertaModel):
        raise UsageError(f"{path}: its architecture is {name}; allowed: those of smart_bert and roberta")
    return kind


def stream_scale(eps: float) -> float:
    """The factor s with 1e-5 / s^2 = eps, or so close to it that the difference is lost in any variance.

    For small epsilons (up to 1e-10) the nearest power of two: multiplying by it is exact.
    """
    scale = math.sqrt(FAIRSEQ_LAYER_NORM_EPS / eps)
    return 2.0 ** round(math.log2(scale)) if eps <= 1e-10 else scale


def scale_residual_stream(model: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Multiply the residual stream of a post-norm RoBERTa by `scale`, leaving features and heads unchanged.

    Args:
        model: state of fairseq's RobertaModel, float32
        scale: the factor s of the module's docstring

    Returns:
        a new state; tensors that do not change are shared with `model`
    """
    encoder = "encoder.sentence_encoder."
    layers = [
        int(match[1]) for match in (re.match(re.escape(encoder) + r"layers\.(\d+)\.", key) for key in model) if match
    ]
    last_norm = f"{encoder}layers.{max(layers)}.final_layer_norm."

    def factor(key: str) -> float:
        if re.match(re.escape(encoder) + r"embed_(tokens|positions)\.weight$", key):
            return scale
        if re.match(re.escape(encoder) + r"(layernorm_embedding|layers\.\d+\.\w+_layer_norm)\.(weight|bias)$", key):
            return 1.0 if key.startswith(last_norm) else scale
        if re.match(re.escape(encoder) + r"layers\.\d+\.(self_attn\.out_proj|fc2)\.(weight|bias)$", key):
            return scale
        if re.match(re.escape(encoder) + r"layers\.\d+\.(self_attn\.[qkv]_proj|fc1)\.weight$", key):
            return 1 / scale
        if tied and key == "encoder.lm_head.weight":
            return scale
        if tied and re.match(r"encoder\.lm_head\.layer_norm\.(weight|bias)$", key):
            return 1 / scale
        return 1.0

    embeddings, lm_head = model[encoder + "embed_tokens.weight"], model.get("encoder.lm_head.weight")
    tied = lm_head is not None and torch.equal(embeddings, lm_head)
    factors = {key: factor(key) for key in model}
    scaled = {key: tensor if factors[key] == 1 else tensor * factors[key] for key, tensor in model.items()}
    if tied:
        scaled["encoder.lm_head.weight"] = scaled[encoder + "embed_tokens.weight"]  # one tensor in the file
    return scaled


def to_plain_roberta(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint as plain fairseq would have written it for `--arch roberta`.

    Args:
        path: where `state` is from, for messages
        state: a checkpoint as `load_checkpoint` returns it; not changed

    Raises:
        UsageError: for other architectures, and for smart_bert with --encoder-normalize-before, whose residual
            stream no LayerNorm rescales
    """
    config = plain(state["cfg"])
    arguments = config["model"]
    kind = architecture_of(path, arguments)

    # halves could not hold what the factors lead to
    model = {k: v.float() if v.is_floating_point() else v for k, v in state["model"].items()}
    if kind is SmartBertModel:
        if arguments.get("encoder_normalize_before"):
            raise UsageError(f"{path}: trained with --encoder-normalize-before; allowed: models without it")
        eps = arguments.get("smart_layer_norm_eps")
        model = scale_residual_stream(model, stream_scale(1e-12 if eps is None else eps))

    config = {key: without_ours(value) if isinstance(value, dict) else value for key, value in config.items()}
    config["common"]["user_dir"] = None
    for section, (_, replacement) in (("criterion", REPLACED_CRITERION), ("optimizer", REPLACED_OPTIMIZER)):
        chosen = config.get(section)
        if isinstance(chosen, dict) and not is_fairseqs(section, chosen.get("_name")):
            chosen["_name"] = replacement
        # the command line, which fairseq keeps with the model, names them as well
        if not is_fairseqs(section, config["model"].get(section)):
            config["model"][section] = replacement
    config["model"].update(_name="roberta", arch="roberta")
    # the hub interface overrides load_checkpoint_heads, and only settings that are there can be overridden
    config["model"].setdefault("load_checkpoint_heads", False)
    config["model"].pop("user_dir", None)

    history = (state.get("optimizer_history") or [{}])[-1]
    iterator = (state.get("extra_state") or {}).get("train_iterator", {})
    return {
        "args": None,
        "cfg": config,
        "model": model,
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": REPLACED_CRITERION[0],
                "optimizer_name": REPLACED_OPTIMIZER[0],
                "lr_scheduler_state": {},
                "num_updates": history.get("num_updates", 0),
            }
        ],
        "task_state": {},
        "extra_state": {
            "train_iterator": {"epoch": iterator.get("epoch", 1), "iterations_in_epoch": 0, "shuffle": True}
        },
        "last_optimizer_state": None,
    }


def is_fairseqs(section: str, name: str | None) -> bool:
    """Whether fairseq itself registers this criterion or optimizer (None: none was chosen)."""
    from fairseq.registry import REGISTRIES

    kind = REGISTRIES[section]["registry"].get(name)
    return name is None or (kind is not None and kind.__module__.startswith("fairseq."))


def export(checkpoint: Path, out: Path, teacher: bool = False) -> list[str]:
    """Write `checkpoint`, or the teacher in it, to `out` for plain fairseq; returns lines for the user.

    Raises:
        UsageError: for what is no checkpoint of smart_bert or RoBERTa, and for impossible places
    """
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"{out}: cannot be written; OUT.pt must be a file in an existing folder")
    if out.exists() and checkpoint.exists() and out.samefile(checkpoint):
        raise UsageError(f"{out}: is CHECKPOINT itself; choose another file")
    state = load_checkpoint(checkpoint)
    if teacher:
        state["model"] = teacher_weights(checkpoint, state)
    exported = to_plain_roberta(checkpoint, state)
    with whole_file(out) as partial:
        torch.save(exported, partial)
    whose = "the teacher's weights, " if teacher else ""
    return [f"wrote {out}: {whose}arch roberta, loads without this plugin (float32 or bfloat16)"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 with one line on standard error."""
    parser = argparse.ArgumentParser(
        prog="export", description="turn a checkpoint of this plugin into one that plain fairseq loads"
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="written by fairseq-train or import_hf")
    parser.add_argument("out", metavar="OUT.pt", type=Path, help="the file to write")
    parser.add_argument(
        "--teacher", action="store_true", help="write the teacher's weights, which --optimizer mbpp keeps"
    )
    args = parser.parse_args(argv)
    try:
        lines = export(args.checkpoint, args.out, args.teacher)
    except (UsageError, OSError) as error:
        print("export: error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    for line in lines:
        print(f"export: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
