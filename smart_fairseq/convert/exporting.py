"""A checkpoint of this plugin as plain fairseq would have written it, with the same predictions.

It has `--arch roberta`, criterion `sentence_prediction`, optimizer `adam`, no optimizer state, and no object, name or
setting of this package; it holds plain containers and tensors only, which torch's safe loader takes as they are. What
becomes of the epsilon of LayerNorm: epsilon.py. Of BERT's token types plain fairseq can hold the first, within the word
embeddings, so predictions are the same for single texts; a model that was trained on pairs is refused.
"""

from pathlib import Path
from typing import Any

from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.models.roberta import RobertaModel
from fairseq.registry import REGISTRIES
from torch import Tensor

from ..errors import refuse
from ..models.smart_bert import BERT_LAYER_NORM_EPS, SmartBertModel
from .checkpoint import EMBEDDINGS, LM_HEAD, POOLER, TOKEN_TYPES, check_head, fairseq_checkpoint, plain, tied
from .epsilon import scale_residual_stream, stream_scale

OUR_PREFIXES = ("smart_", "mbpp_")
# names that only this package registers, and fairseq's that stand in for them
REPLACEMENTS = {"criterion": "sentence_prediction", "optimizer": "adam"}


def teacher_weights(path: Path, state: dict[str, Any]) -> dict[str, Tensor]:
    """The model's state with the teacher's weights in the place of those that were trained.

    The teacher is a list without names, in the order of the model's parameters, or one flat tensor (--fp16).
    ``state``, read from ``path``, is not changed. Raises `UsageError` where there is no teacher that fits the model.
    """
    teacher = ((state.get("last_optimizer_state") or {}).get("mbpp") or {}).get("teacher")
    if not teacher:
        needed = "a checkpoint of a run with --optimizer mbpp is needed, saved after an update and without "
        refuse(path, "holds no teacher", needed + "--no-save-optimizer-state")
    model: dict[str, Tensor] = dict(state["model"])
    lm_head_shares = tied(model)
    if lm_head_shares:
        del model[LM_HEAD]
    names = [name for name in model if not name.endswith((".version", "._float_tensor"))]  # fairseq's buffers
    shapes = [model[name].shape for name in names]
    sizes = [shape.numel() for shape in shapes]
    if len(names) > 1 and [tuple(weight.shape) for weight in teacher] == [(sum(sizes),)]:
        teacher = [piece.view(shape) for piece, shape in zip(teacher[0].split(sizes), shapes)]
    if [weight.shape for weight in teacher] != shapes:
        what = f"its teacher's {len(teacher)} tensors do not fit the model's {len(names)}"
        refuse(path, what, "allowed: models all of whose parameters were trained, on one device")
    model.update(zip(names, teacher))
    if lm_head_shares:
        model[LM_HEAD] = model[EMBEDDINGS]
    return {name: model[name] for name in state["model"]}


def kind_of(path: Path, arguments: dict[str, Any]) -> type[RobertaModel]:
    """The class of the model that a checkpoint's ``arguments`` name; `UsageError` for another than these two."""
    name = arguments.get("_name") or arguments.get("arch")
    kind: Any = ARCH_MODEL_REGISTRY.get(name)
    if kind not in (SmartBertModel, RobertaModel):
        refuse(path, f"its architecture is {name}", "allowed: those of smart_bert and roberta")
    return kind  # type: ignore[no-any-return]


def without_token_types(path: Path, model: dict[str, Tensor], task: dict[str, Any]) -> dict[str, Tensor]:
    """The model's state with BERT's first token type within the word embeddings, and without its pooler.

    ``task``: the configuration of what the model, read from ``path``, was trained for. Raises `UsageError` for pairs,
    which plain fairseq cannot tell apart.
    """
    model = {name: tensor for name, tensor in model.items() if not name.startswith(f"{POOLER}.")}
    types = model.pop(TOKEN_TYPES, None)
    if types is None:
        return model
    if task.get("_name") == "sentence_prediction" and (Path(task["data"]) / "input1").is_dir():
        advice = "plain fairseq cannot hold the second one; --format huggingface can"
        refuse(path, "was trained on pairs with BERT's two token types", advice)
    shared = tied(model)
    model[EMBEDDINGS] = model[EMBEDDINGS] + types[0]
    if shared:
        model[LM_HEAD] = model[EMBEDDINGS]
    return model


def left_behind(state: dict[str, Any]) -> str:
    """What plain fairseq cannot hold of a checkpoint's model, to be said after its export; "" for nothing."""
    lost = ["second token type, so for single texts"] if TOKEN_TYPES in state["model"] else []
    lost = ["pooler", *lost] if any(name.startswith(f"{POOLER}.") for name in state["model"]) else lost
    return f", without BERT's {' and '.join(lost)}" if lost else ""


def to_plain_roberta(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint as plain fairseq would have written it for `--arch roberta`; arguments as `teacher_weights`.

    Raises `UsageError` for other architectures, for smart_bert with --encoder-normalize-before, whose residual stream
    no LayerNorm rescales, for pairs with BERT's token types, and for a fine-tuned model without its head.
    """
    config = plain(state["cfg"])
    arguments = config["model"]
    kind = kind_of(path, arguments)
    head = (config.get("criterion") or {}).get("classification_head_name")
    if head:  # an imported encoder has none yet
        check_head(path, state["model"], head)

    # halves could not hold what the factors lead to
    model = {k: v.float() if v.is_floating_point() else v for k, v in state["model"].items()}
    if kind is SmartBertModel:
        if arguments.get("encoder_normalize_before"):
            refuse(path, "trained with --encoder-normalize-before", "allowed: models without it")
        model = without_token_types(path, model, config["task"])
        eps = arguments.get("smart_layer_norm_eps")
        model = scale_residual_stream(model, stream_scale(BERT_LAYER_NORM_EPS if eps is None else eps))

    for settings in [settings for settings in config.values() if isinstance(settings, dict)]:
        for ours in [name for name in settings if name.startswith(OUR_PREFIXES)]:
            del settings[ours]
    config["common"]["user_dir"] = None
    for section, replacement in REPLACEMENTS.items():
        # the command line, which fairseq keeps with the model, names them as well
        for settings, key in ((config.get(section), "_name"), (arguments, section)):
            if isinstance(settings, dict) and not _is_fairseqs(section, settings.get(key)):
                settings[key] = replacement
    arguments.update(_name="roberta", arch="roberta")
    arguments.pop("user_dir", None)

    updates = (state.get("optimizer_history") or [{}])[-1].get("num_updates", 0)
    epoch = (state.get("extra_state") or {}).get("train_iterator", {}).get("epoch", 1)
    return fairseq_checkpoint(model, config, "SentencePredictionCriterion", updates, epoch)


def _is_fairseqs(section: str, name: str | None) -> bool:
    """Whether fairseq itself registers this criterion or optimizer (None: none was chosen)."""
    kind = REGISTRIES[section]["registry"].get(name)
    return name is None or (kind is not None and kind.__module__.startswith("fairseq."))
