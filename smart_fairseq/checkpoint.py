"""Loading fairseq's checkpoints with torch's safe loader, which stays on.

From torch 2.6 `torch.load` refuses any class that is not allow-listed, and fairseq's checkpoints hold
some: the command line as an ``argparse.Namespace``, in older ones configurations of omegaconf, and
numbers of numpy among the best metrics. All of them are plain data.
"""

import argparse
import collections
import typing
from typing import Any, List

import numpy as np
import torch

__all__ = ["allow_fairseq_checkpoints"]


def _what_checkpoints_hold() -> List[Any]:
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
