"""Loading fairseq's checkpoints with torch's safe loader, which stays on, and never leaving half of one behind.

From torch 2.6 `torch.load` refuses any class that is not allow-listed, and fairseq's checkpoints hold
some: the command line as an ``argparse.Namespace``, in older ones configurations of omegaconf, and
numbers of numpy among the best metrics. All of them are plain data.

fairseq writes a checkpoint to a file aside and renames it, but copies it onto checkpoint_last.pt in place: a
full disk or a killed process would leave half a file where the only whole one was. `copy_checkpoints_whole`
makes the copy in the same way as the file.
"""

import argparse
import collections
import os
import shutil
import typing
from typing import Any

import numpy as np
import torch

__all__ = ["allow_fairseq_checkpoints", "copy_checkpoints_whole"]


def _what_checkpoints_hold() -> list[Any]:
    from fairseq.distributed.utils import _TensorPlaceholder
    from omegaconf import DictConfig, ListConfig, nodes
    from omegaconf.base import ContainerMetadata, Metadata

    scalar = np.float64(0).__reduce__()[0]  # the function that numpy pickles its numbers with
    number_types = [np.dtype, *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")}]
    configuration = [DictConfig, ListConfig, ContainerMetadata, Metadata]
    configuration += [
        getattr(nodes, name)
        for name in ("AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode", "EnumNode")
    ]
    return [
        argparse.Namespace,
        _TensorPlaceholder,  # where a tensor stood, in a checkpoint on its way from one worker to the others
        scalar,
        *number_types,
        *configuration,
        typing.Any,
        collections.defaultdict,
        collections.OrderedDict,
        dict,
        list,
        int,
    ]


def allow_fairseq_checkpoints() -> None:
    """Tell torch's safe loader which classes fairseq's checkpoints hold; nothing to do before torch 2.4."""
    add_safe_globals = getattr(torch.serialization, "add_safe_globals", None)
    if add_safe_globals is not None:
        add_safe_globals(_what_checkpoints_hold())


def copy_checkpoints_whole() -> None:
    """Let fairseq's copies of local files appear completely or not at all."""
    from fairseq.file_io import PathManager

    copy = PathManager.copy

    def copy_whole(src_path: str, dst_path: str, overwrite: bool = False) -> Any:
        if any(PathManager.path_requires_pathmanager(path) for path in (src_path, dst_path)):
            return copy(src_path, dst_path, overwrite)
        part = f"{dst_path}.tmp"  # as fairseq names what it writes
        try:
            shutil.copyfile(src_path, part)
            os.replace(part, dst_path)
        finally:
            if os.path.exists(part):
                os.unlink(part)
        return True

    PathManager.copy = staticmethod(copy_whole)
