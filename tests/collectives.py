"""What workers send each other in a run of fairseq-train: every collective, in order, in a file for each worker."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fairseq.tasks import FairseqTask
from torch.utils._python_dispatch import TorchDispatchMode


class Collective(NamedTuple):
    """``place``: "backward", "forward" (all else of a train_step, so all passes of ours), or "around" (fairseq's)."""

    place: str
    kind: str
    shapes: list[list[int]]


class _Recorder(TorchDispatchMode):
    """Sees what torch's reducer sends from C++ too."""

    def __init__(self, out: str) -> None:
        super().__init__()
        self.out, self.place = out, "around"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            shapes = [list(tensor.shape) for tensor in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(tensor)]
            rank = torch.distributed.get_rank()
            with open(f"{self.out}.{rank}.collectives", "a") as lines:
                print(json.dumps([self.place, func.__name__, shapes]), file=lines)
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def at(self, place: str) -> Iterator[None]:
        before, self.place = self.place, place
        try:
            yield
        finally:
            self.place = before


def recorded(out: str) -> None:
    """For ``prepare`` of `processes.start`, with the same ``out``."""
    recorder = _Recorder(out)
    train_step, backward = FairseqTask.train_step, torch.Tensor.backward

    def watched_train_step(*args: Any, **kwargs: Any) -> Any:
        with recorder.at("forward"):
            return train_step(*args, **kwargs)

    def watched_backward(*args: Any, **kwargs: Any) -> Any:
        with recorder.at("backward"):
            return backward(*args, **kwargs)

    FairseqTask.train_step, torch.Tensor.backward = watched_train_step, watched_backward
    recorder.__enter__()


def collectives(out: Path, rank: int) -> list[Collective]:
    """Of a worker, in order."""
    return [Collective(*json.loads(line)) for line in Path(f"{out}.{rank}.collectives").read_text().splitlines()]
