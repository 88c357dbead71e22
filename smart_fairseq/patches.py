"""What is changed in fairseq: in its modules when the plugin is loaded, and on a task object by a criterion.

- From torch 2.6 `torch.load` refuses any class that is not allow-listed, and fairseq's checkpoints hold some: the
  command line as an ``argparse.Namespace``, in older ones configurations of omegaconf, and numbers of numpy among the
  best metrics. All of them are plain data (`allow_fairseq_checkpoints`); the safe loader stays on.
- fairseq writes a checkpoint to a file aside and renames it, but copies it onto checkpoint_last.pt in place: a full
  disk or a killed process would leave half a file where the only whole one was (`copy_checkpoints_whole`).
- Reading a checkpoint (`read_checkpoints_with_care`): what torch says of a file that it cannot or will not load is
  replaced by one line. fairseq-validate builds the criterion from the flags that the checkpoint names, and refuses one
  that it does not know: those that were removed from the plugin are taken out. And at evaluation fairseq draws a random
  classification head where the checkpoint holds none.
- From the last batch of a split it drops all examples when their number is no multiple of
  ``--required-batch-size-multiple``, which is 8 unless changed: RTE would be judged on 272 of its 277 examples in
  batches of 16 (`cover_validation_sets`).
- Its FP16Optimizer copies gradients and weights between two precisions tensor by tensor, 800 launches on a GPU for an
  update of RoBERTa-large (`copy_at_once`).
- Its AMPOptimizer divides the gradients by the loss scale twice, and saves the state of the innermost optimizer, which
  knows no teacher (`mend_amp`).
- A head trained with --spectral-norm-classification-head is saved, and cannot be loaded: fairseq asks for its sizes
  by a name that such a head has not (`load_normalized_heads`).
- A checkpoint names its data folder, and not what was in it: with it goes `data.folders.what_is_in` (`remember_data`).
- Criterion and optimizer meet in ``task.train_step`` alone (`smart_fairseq.training.link`).
"""

import argparse
import contextlib
import functools
import logging
import os
import shutil
import typing
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data.folders import DATA, data_of, what_is_in
from .errors import UsageError, unreadable
from .files import whole_file

logger = logging.getLogger(__name__)

# of the criterion; checkpoints of earlier versions name them
REMOVED_FLAGS = ("smart_reuse", "smart_search_layers", "smart_bregman_every")


def allow_fairseq_checkpoints() -> None:
    """Tell torch's safe loader which classes fairseq's checkpoints hold."""
    from fairseq.distributed.utils import _TensorPlaceholder
    from omegaconf import AnyNode, BooleanNode, DictConfig, EnumNode, FloatNode, IntegerNode, ListConfig, StringNode
    from omegaconf.base import ContainerMetadata, Metadata

    configuration = [DictConfig, ListConfig, ContainerMetadata, Metadata]
    configuration += [AnyNode, StringNode, IntegerNode, FloatNode, BooleanNode, EnumNode]
    numbers: list[Any] = [np.dtype, *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")}]
    numbers.append(np.float64(0).__reduce__()[0])  # the function that numpy pickles its numbers with
    plain = [argparse.Namespace, typing.Any, dict, list, int, defaultdict, OrderedDict]
    # the placeholder stands for a tensor, in a checkpoint on its way from one worker to the others
    torch.serialization.add_safe_globals([*plain, *numbers, *configuration, _TensorPlaceholder])


def copy_checkpoints_whole() -> None:
    """Let fairseq's copies of local files appear completely or not at all."""
    from fairseq.file_io import PathManager

    copy = PathManager.copy

    def copy_whole(src_path: str, dst_path: str, overwrite: bool = False) -> Any:
        if any(PathManager.path_requires_pathmanager(path) for path in (src_path, dst_path)):
            return copy(src_path, dst_path, overwrite)
        with whole_file(Path(dst_path)) as partial:
            shutil.copyfile(src_path, partial)
        return True

    PathManager.copy = staticmethod(copy_whole)


def copy_at_once() -> None:
    """Let fairseq's FP16Optimizer copy all gradients, and all weights, by one operation."""
    from fairseq.optim.fp16_optimizer import FP16Optimizer

    copy_gradients, copy_weights = FP16Optimizer._sync_fp16_grads_to_fp32, FP16Optimizer._sync_fp32_params_to_fp16

    def copy_gradients_at_once(self: Any) -> None:
        pairs = _pairs(self, of_gradients=True) if self._needs_sync else []
        found = [pair for pair in pairs if pair[0] is not None]
        if not found or any(wide is None for _, wide in pairs):
            copy_gradients(self)
            return
        half, wide = zip(*found)
        torch._foreach_copy_(wide, half)
        for ours, theirs in pairs:
            if ours is None:  # of a parameter that took no part
                theirs.zero_()
        self._needs_sync = False

    def copy_weights_at_once(self: Any) -> None:
        pairs = _pairs(self, of_gradients=False)
        if not pairs:
            copy_weights(self)
            return
        half, wide = zip(*pairs)
        torch._foreach_copy_(half, wide)

    FP16Optimizer._sync_fp16_grads_to_fp32 = copy_gradients_at_once
    FP16Optimizer._sync_fp32_params_to_fp16 = copy_weights_at_once


def _pairs(optimizer: Any, of_gradients: bool) -> list[tuple[Any, Any]]:
    """Each tensor of an FP16Optimizer in half precision with that in float32; none where they are on several GPUs."""

    def part(tensor: Any) -> Any:
        return tensor.grad if of_gradients else tensor.data

    half = [parameter for parameter in optimizer.fp16_params if parameter.requires_grad]
    if not optimizer.has_flat_params:
        wide = [parameter for parameter in optimizer.fp32_params if parameter.requires_grad]
        return [(part(ours), part(theirs)) for ours, theirs in zip(half, wide)]
    if len(optimizer.fp32_params) != 1:
        return []
    (flat,) = optimizer.fp32_params.values()
    pieces = part(flat).split([parameter.numel() for parameter in half])
    return [(part(ours), piece.view_as(ours)) for ours, piece in zip(half, pieces)]


def mend_amp() -> None:
    """Let fairseq's AMPOptimizer unscale gradients once, and hold the state of the optimizer that it wraps."""
    from fairseq.optim.amp_optimizer import AMPOptimizer

    clip = AMPOptimizer.clip_grad_norm

    @functools.wraps(clip)
    def clip_and_remember(self: Any, *args: Any, **kwargs: Any) -> Any:
        norm = clip(self, *args, **kwargs)  # unscales for torch's optimizer; `step` names fairseq's around it
        if self.scaler.is_enabled():  # on a CPU it is not
            states = self.scaler._per_optimizer_states
            states[id(self.fp32_optimizer)] = states[id(self.optimizer)]
        return norm

    AMPOptimizer.clip_grad_norm = clip_and_remember
    AMPOptimizer.state_dict = lambda self: self.fp32_optimizer.state_dict()
    AMPOptimizer.load_state_dict = lambda self, *args, **kwargs: self.fp32_optimizer.load_state_dict(*args, **kwargs)


def load_normalized_heads() -> None:
    """Let RoBERTa load the head of R4F, whose weight is `weight_orig`."""
    from fairseq.models.roberta import RobertaModel

    upgrade = RobertaModel.upgrade_state_dict_named

    @functools.wraps(upgrade)
    def upgrade_with_sizes(self: Any, state_dict: dict[str, Any], name: str) -> None:
        end = ".out_proj.weight_orig"
        names = [key for key in state_dict if "classification_heads." in key and key.endswith(end)]
        stand_ins = {key.removesuffix("_orig"): state_dict[key] for key in names}
        state_dict.update(stand_ins)
        upgrade(self, state_dict, name)
        for key in stand_ins:
            state_dict.pop(key, None)

    RobertaModel.upgrade_state_dict_named = upgrade_with_sizes


# by the path of a checkpoint that fairseq has loaded, the data folder and what was in it
_TRAINED_ON: dict[str, tuple[str, dict[str, Any]]] = {}


def trained_on(path: str) -> tuple[str, dict[str, Any]] | None:
    """The data folder of a checkpoint that fairseq has loaded in this process, and what was in it; None for others."""
    return _TRAINED_ON.get(os.path.abspath(path))


def remember_data() -> None:
    """Let `sentence_prediction` keep in its state what is in its data folder when training begins."""
    from fairseq.tasks.sentence_prediction import SentencePredictionTask

    build = SentencePredictionTask.__init__

    @functools.wraps(build)
    def build_and_remember(self: Any, cfg: Any, *args: Any, **kwargs: Any) -> None:
        build(self, cfg, *args, **kwargs)
        self.state.merge_state_dict({DATA: what_is_in(Path(str(cfg.data)))})

    SentencePredictionTask.__init__ = build_and_remember


def read_checkpoints_with_care() -> None:
    """Let fairseq read a checkpoint without the `REMOVED_FLAGS`, and evaluate none that lacks its head.

    It raises `UsageError` for a file that it cannot or will not read.
    """
    from fairseq import checkpoint_utils

    load = checkpoint_utils.load_checkpoint_to_cpu

    @functools.wraps(load)
    def load_with_care(path: str, arg_overrides: dict[str, Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        try:
            state = load(path, arg_overrides, *args, **kwargs)
        except Exception as error:  # torch and fairseq raise whatever the bytes lead them to
            raise UsageError(f"{path}: {unreadable(error)}") from error
        _forget_removed_flags(state.get("cfg"))
        with contextlib.suppress(AttributeError, LookupError, TypeError):  # a configuration of another form
            _TRAINED_ON[os.path.abspath(path)] = (str(state["cfg"]["task"].get("data") or ""), data_of(state))
        if arg_overrides is not None:  # training, which may begin without a head, overrides nothing
            _demand_head(path, state)
        return state

    checkpoint_utils.load_checkpoint_to_cpu = load_with_care


def _forget_removed_flags(cfg: Any) -> None:
    from omegaconf import DictConfig, open_dict

    criterion = cfg.get("criterion") if isinstance(cfg, DictConfig) else None
    if isinstance(criterion, DictConfig):
        with open_dict(criterion):
            for name in REMOVED_FLAGS:
                criterion.pop(name, None)
            if "smart_epsilon" in criterion:  # from before there were others
                criterion.setdefault("smart_epsilon_unit", "absolute")


def _demand_head(path: str, state: dict[str, Any]) -> None:
    from .convert.checkpoint import check_head, scores_candidates
    from .convert.single_task import of_several_tasks

    if of_several_tasks(state) or scores_candidates(state):  # whose heads the task demands, or that has none
        return
    settings = (state.get("cfg") or {}).get("criterion") or state.get("args")
    head = getattr(settings, "classification_head_name", None)
    if head:
        check_head(Path(path), state["model"], head)


def cover_validation_sets(task: Any, train_subset: str) -> None:
    """Let the task's batches hold every example of every split but ``train_subset``."""
    get_batch_iterator = task.get_batch_iterator

    @functools.wraps(get_batch_iterator)
    def get_whole_batch_iterator(dataset: Any, **options: Any) -> Any:
        if dataset is not task.datasets.get(train_subset):
            return get_batch_iterator(dataset, **{**options, "required_batch_size_multiple": 1})
        iterator = get_batch_iterator(dataset, **options)
        used = sum(len(batch) for batch in iterator.frozen_batches)
        if used < len(dataset) and dataset.can_reuse_epoch_itr_across_epochs:  # another epoch takes others
            logger.info(
                f"training uses {used} of {len(dataset)} examples: fairseq leaves out a last batch that is no multiple "
                "of --required-batch-size-multiple (1 takes all), and examples longer than --max-positions"
            )
        return iterator

    task.get_batch_iterator = get_whole_batch_iterator
