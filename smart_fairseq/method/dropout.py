"""Dropout between passes: the same masks again, or none.

With independent masks the divergence of two passes is mostly dropout; with the same masks it measures
what its definition says. Masks are functions of the generators' states, so replaying the states replays
the masks.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class RandomState:
    """The states of torch's generators at one moment, on the CPU and on one CUDA device.

    >>> state, first = RandomState(torch.device("cpu")), torch.rand(1)
    >>> with state.replayed():
    ...     first == torch.rand(1)
    tensor([True])
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu: Tensor = torch.get_rng_state()
        self.cuda: Tensor | None = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run a block from this state, then go on as if the block had drawn nothing."""
        with torch.random.fork_rng([] if self.cuda is None else [self.device]):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield


@contextmanager
def without_dropout(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run a block with every one of ``modules`` in evaluation mode, then restore each as it was.

    >>> model = nn.Dropout(0.5)
    >>> with without_dropout(model.modules()):
    ...     model(torch.ones(3))
    tensor([1., 1., 1.])
    """
    # as nn.Module.__setattr__ would, which first looks whether each is a parameter or a module
    training = [vars(module) for module in modules if module.training]
    for attributes in training:
        attributes["training"] = False
    try:
        yield
    finally:
        for attributes in training:
            attributes["training"] = True
