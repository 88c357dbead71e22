"""A model under other weights, and its own without their gradients.

`torch.func.functional_call` looks for every parameter and its doubles anew at each call; a model's `Slots` are found
once.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Slots:
    """Where each parameter of a model stands; one that is shared stands in several modules."""

    def __init__(self, model: nn.Module) -> None:
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._places: dict[str, list[tuple[dict[str, Any], str]]] = {name: [] for name in names.values()}
        linear: list[str] = []
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self._places[names[parameter]].append((module._parameters, key))
                    if type(module) is nn.Linear and key in ("weight", "bias"):
                        linear.append(names[parameter])
        # what autocast casts each time that it is used; a shared one may be used otherwise
        self._linear = [name for name in linear if len(self._places[name]) == 1]

    def frozen(self) -> dict[str, Tensor]:
        """The parameters by name, without gradients."""
        return {name: places[0][0][places[0][1]].detach() for name, places in self._places.items()}

    def cast(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights without gradients, those of linear layers in autocast's precision where it is on.

        By a few launches for all of them; autocast itself keeps the casts of weights with gradients alone, and has one
        more launch for each of the others whenever it is used.
        """
        kind = next(iter(weights.values())).device.type
        if not torch.is_autocast_enabled(kind):
            return weights
        dtype = torch.get_autocast_dtype(kind)
        names = [name for name in self._linear if name in weights and weights[name].dtype == torch.float32]
        copies = [torch.empty_like(weights[name], dtype=dtype) for name in names]
        if copies:
            torch._foreach_copy_(copies, [weights[name] for name in names])
        return {**weights, **dict(zip(names, copies))}

    @contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the block the model has other weights; names left out keep its own."""
        places = [(place, weight) for name, weight in weights.items() for place in self._places[name]]
        own = [(parameters, key, parameters[key]) for (parameters, key), _ in places]
        try:
            for (parameters, key), weight in places:
                parameters[key] = weight
            yield
        finally:
            for parameters, key, parameter in own:
                parameters[key] = parameter


class Substitute:
    """A bare model under other weights; nothing is copied."""

    def __init__(self, model: nn.Module, slots: Slots, weights: Mapping[str, Tensor]) -> None:
        self.model, self.slots, self.weights = model, slots, weights

    def __getattr__(self, name: str) -> Any:  # the model's heads and targets, for which the criterion asks
        return getattr(self.model, name)

    def __call__(self, **inputs: Any) -> Any:
        with self.slots.holding(self.weights):
            return self.model(**inputs)
