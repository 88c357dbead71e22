"""Checkpoints of plain containers and tensors, as fairseq-train writes them."""

import argparse
import contextlib
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ..data.lines import located
from ..errors import UsageError, refuse, unreadable

EMBEDDINGS, LM_HEAD = "encoder.sentence_encoder.embed_tokens.weight", "encoder.lm_head.weight"
HEAD_PARTS = frozenset({"dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"})
# of smart_bert alone: [2, C], and a module that stands in no model but in its checkpoint
TOKEN_TYPES, POOLER = "encoder.sentence_encoder.token_types", "pooler"


def tied(model: dict[str, Tensor]) -> bool:
    """Whether the LM head of a model's state shares the embeddings."""
    return LM_HEAD in model and EMBEDDINGS in model and torch.equal(model[LM_HEAD], model[EMBEDDINGS])


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint with torch's safe loader; `UsageError` if it is none of fairseq's."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise located(path, unreadable(error)) from None
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict) or not state.get("cfg"):
        refuse(path, "holds no model or no configuration", "a checkpoint written by fairseq-train is needed")
    return state


@contextlib.contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Turn whatever a checkpoint's configuration or weights of another form lead to into a `UsageError`."""
    try:
        yield
    except UsageError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        what = f"its configuration or weights are not as fairseq-train writes them ({type(error).__name__})"
        raise located(path, f"{what}; a checkpoint that nothing else has changed is needed") from error


def check_head(path: Path, weights: Iterable[str], head: str, parts: Set[str] = HEAD_PARTS) -> None:
    """Raise `UsageError` where a checkpoint's weights lack a classification head or one of its ``parts``.

    fairseq would take random numbers for them, without a word.
    """
    found: dict[str, set[str]] = {}
    for name in weights:
        if name.startswith("classification_heads."):
            _, owner, part = name.split(".", 2)
            found.setdefault(owner, set()).add(part.removesuffix("_orig"))  # --spectral-norm-classification-head
    if head not in found:
        there = f"its heads are {', '.join(sorted(found))}" if found else "it holds none: it is not fine-tuned"
        refuse(path, f"has no classification head {head!r}", f"{there}; a whole, fine-tuned checkpoint is needed")
    missing = parts - found[head]
    if missing:
        refuse(path, f"has no {min(missing)} of its classification head {head!r}", "a whole checkpoint is needed")


def task_settings(state: dict[str, Any]) -> Any:
    """The task's part of a checkpoint's configuration; empty where there is none."""
    return (state.get("cfg") or {}).get("task") or {}


def scores_candidates(state: dict[str, Any]) -> bool:
    """Whether a checkpoint is smart_wnli's, whose head is the LM head."""
    return bool(task_settings(state).get("_name") == "smart_wnli")


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


def fairseq_checkpoint(
    model: dict[str, Tensor], config: dict[str, Any], criterion: str, updates: int = 0, epoch: int = 1
) -> dict[str, Any]:
    """A checkpoint without optimizer state, for optimizer adam, with which training goes on at an epoch.

    ``config``: fairseq's configuration, plain containers only; ``criterion``: its class's name.
    """
    # the hub interface overrides load_checkpoint_heads, and only settings that are there can be overridden
    config["model"].setdefault("load_checkpoint_heads", False)
    history = {"criterion_name": criterion, "optimizer_name": "FairseqAdam", "lr_scheduler_state": {}}
    return {
        "args": None,
        "cfg": config,
        "model": model,
        "criterion": None,
        "optimizer_history": [{**history, "num_updates": updates}],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": epoch, "iterations_in_epoch": 0, "shuffle": True}},
        "last_optimizer_state": None,
    }
