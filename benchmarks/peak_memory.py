"""The peak of the memory that tensors hold, counted at every operation: for a CPU, where torch keeps no count."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class PeakMemory(TorchDispatchMode):
    """Within the block, ``peak`` is the largest number of bytes held by tensors that were made in it.

    What was there before counts for nothing, and what an operation takes for itself while it runs is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._seen: Any = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # a view's storage, or that of an operation in place, is not new
        before = {storage._cdata for storage in self._storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in self._storages(result):
            if storage._cdata not in before and storage not in self._seen:
                self._note(storage)
        return result

    def _storages(self, tree: Any) -> list:
        found: list = []
        tree_map_only(torch.Tensor, lambda tensor: found.append(tensor.untyped_storage()), tree)
        return found

    def _note(self, storage: Any) -> None:
        size = storage.nbytes()
        self._seen[storage] = size
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.held -= size
