"""Savers of memory: what a forward keeps for its gradient. They change no number."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from fairseq.modules import gelu
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# module, name, other value
Replacement = tuple[nn.Module, str, Any]
_ABSENT = object()


@contextmanager
def replaced(replacements: Iterable[Replacement]) -> Iterator[None]:
    """Run a block with other attributes of some modules; the last of several for the same one holds."""
    before = []
    for module, name, value in replacements:
        own = vars(module)  # nn.Module would first look whether the value is a parameter or a module
        before.append((own, name, own.get(name, _ABSENT)))
        own[name] = value
    try:
        yield
    finally:
        for own, name, value in reversed(before):
            if value is _ABSENT:  # it is its class's
                del own[name]
            else:
                own[name] = value


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


def gelu_at_once(x: Tensor) -> Tensor:
    """fairseq's gelu, which widens half precision to float32 and back, by a kernel that does so on its way."""
    return nn.functional.gelu(x)


def _with_gelu(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if getattr(module, "activation_fn", None) in (gelu, gelu_at_once))


def gelus(model: nn.Module, function: Callable[[Tensor], Tensor]) -> list[Replacement]:
    """For `replaced`: ``function`` as the activation of every module that has gelu."""
    return [(module, "activation_fn", function) for module in _with_gelu(model)]


class GeluAndLinear:
    """gelu and the linear layer after it, which keeps gelu's inputs for the gradient in the place of its outputs.

    The inputs are kept by gelu itself; the outputs are computed again, which costs no product of matrices.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self._made: tuple[Tensor, ...] | None = None  # gelu's output as the linear layer gets it, and its inputs

    def activation(self, x: Tensor) -> Tensor:
        output = gelu_at_once(x)
        if torch.is_grad_enabled():
            self._made = output, x.detach()
        return output

    def parts(self, x: Tensor) -> Sequence[Tensor]:
        """The tensors that gelu's output is made of."""
        return (x,)

    def again(self, *inputs: Tensor) -> Sequence[Tensor]:
        """These from gelu's inputs."""
        return (gelu_at_once(*inputs),)

    def project(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.linear.weight, self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        made, self._made = self._made, None
        if made is None or made[0] is not x:  # a dropout stands between the two
            return self.project(x)
        # nothing of what the hooks hold is an output
        places = {part.untyped_storage()._cdata: place for place, part in enumerate(self.parts(x))}
        entries, inputs = x.numel(), made[1:]
        held: dict[int, Tensor] = {}  # what was computed with another and not yet asked for

        def pack(tensor: Tensor) -> Any:
            place = places.get(tensor.untyped_storage()._cdata)
            return tensor if place is None or tensor.numel() != entries else (place, tensor.shape)

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            place, shape = packed
            if place not in held:
                with torch.no_grad():
                    held.update(enumerate(self.again(*inputs)))
            return held.pop(place).view(shape)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return self.project(x)


def gelus_and_linears(model: nn.Module, kind: type[GeluAndLinear] = GeluAndLinear) -> list[Replacement]:
    """For `replaced`: a ``kind(linear)`` for every gelu with the linear layer after it."""
    found: list[Replacement] = []
    for module in _with_gelu(model):
        linear = getattr(module, "fc2", None)
        if type(linear) is nn.Linear:
            both = kind(linear)
            found += [(module, "activation_fn", both.activation), (linear, "forward", both.forward)]
    return found
