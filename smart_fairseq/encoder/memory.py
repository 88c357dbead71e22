"""Savers of memory: what a forward keeps for its gradient. They change no number."""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from fairseq.modules import gelu
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Replacement", "gelus", "recomputed", "replaced", "without_gelu_outputs"]

# module, name, other value
Replacement = tuple[nn.Module, str, Any]


@contextmanager
def replaced(replacements: list[Replacement]) -> Iterator[None]:
    """Run a block with other attributes of some modules."""
    before = [(module, name, vars(module).get(name)) for module, name, _ in replacements]
    for module, name, value in replacements:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, own in before:
            if own is None:  # it is its class's
                delattr(module, name)
            else:
                setattr(module, name, own)


def recomputed(
    layers: Iterable[nn.Module], again: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
) -> AbstractContextManager[None]:
    """The block's forward keeps each layer's input alone, and runs the layer again when its gradient is taken.

    Args:
        again: layer -> the context of that second run, when the block is over.
    """

    def forward(layer: nn.Module) -> Callable[..., Any]:
        return functools.partial(
            checkpoint, layer.forward, use_reentrant=False, context_fn=lambda: (nullcontext(), again(layer))
        )

    return replaced([(layer, "forward", forward(layer)) for layer in layers])


def gelus(model: nn.Module, function: Callable[[Tensor], Tensor]) -> list[Replacement]:
    """For `replaced`: ``function`` as the activation of every module that has gelu."""
    with_gelu = (module for module in model.modules() if getattr(module, "activation_fn", None) is gelu)
    return [(module, "activation_fn", function) for module in with_gelu]


@contextmanager
def without_gelu_outputs(model: nn.Module) -> Iterator[None]:
    """The block's forwards keep the input of each layer's gelu for the gradient, and not the output too.

    The output is what the next linear layer keeps; it is computed again, which costs no product of matrices.
    """
    kept: dict[int, Tensor] = {}  # the input by the output's storage, as long as that lives
    inputs: list[Tensor] | None = None

    def remembered(x: Tensor) -> Tensor:
        nonlocal inputs
        inputs = []
        output = gelu(x)
        # in half precision, what gelu keeps is a copy in float32
        if len(inputs) == 1 and inputs[0].numel() == output.numel():
            key = output.untyped_storage()._cdata
            kept[key] = inputs[0].detach()
            weakref.finalize(output, kept.pop, key, None)
        inputs = None
        return output  # type: ignore[no-any-return]

    def pack(tensor: Tensor) -> Any:
        if inputs is not None:
            inputs.append(tensor)
            return tensor
        source = kept.get(tensor.untyped_storage()._cdata)
        if source is None or tensor.numel() != source.numel() or not tensor.is_contiguous():
            return tensor
        return source, tensor.dtype, tensor.shape

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        source, dtype, shape = packed
        with torch.no_grad():
            return gelu(source).to(dtype).view(shape)  # type: ignore[no-any-return]

    with replaced(gelus(model, remembered)), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
