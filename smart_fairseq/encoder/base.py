"""A model as the method sees it: the one place that knows what is inside.

A perturbation enters through a hook (`place`), and the ordinary forward, the distributed wrapper's included, does the
rest. The hook counts its calls: a forward that the perturbation did not reach is an error, never a regulariser that
does nothing.

Another kind of encoder is a subclass with `fits` and `find_insides`, named in ``smart_fairseq.encoder.KINDS``.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from fairseq.models import BaseFairseqModel
from torch import Tensor, nn

from ..errors import UsageError
from ..method.dropout import without_dropout
from . import forward_mode, memory
from .memory import Replacement, replaced
from .place import NormalizedPlace, Place
from .rounding import rounded
from .weights import Slots, Substitute


class Insides(NamedTuple):
    """What a kind of encoder names.

    places: "token" and "input" -> the module whose output, [B, T, C], is perturbed there; the one at "token" is the
        embedding table. "normalized" -> the LayerNorm that the embeddings enter; left out where there is none.
    layers: the stack whose activations fill the memory.
    padding_idx: the padding's number among the tokens.
    """

    places: dict[str, nn.Module]
    layers: list[nn.Module]
    padding_idx: int


class _Seen(Exception):
    """Ends a forward once what it was for is there."""


class Encoder:
    """A model, whatever wraps it, and what its passes need; built once for a model, and what it found stays."""

    def __init__(self, model: Any) -> None:
        self.given = model
        self._lean = False
        self.rows = 1  # of src_tokens that are one example, in the batch at hand
        while not isinstance(model, BaseFairseqModel) and hasattr(model, "module"):
            model = model.module  # fairseq's distributed wrappers all keep the model as that
        self.model: Any = model

    @classmethod
    def fits(cls, model: Any) -> bool:
        """Whether this class knows the insides of a bare model."""
        return False

    def find_insides(self) -> Insides:
        """The modules that matter; raises `UsageError` where they are not known."""
        raise UsageError(
            f"--arch: {type(self.model).__name__} takes no perturbation of its embeddings; use a RoBERTa-style model "
            "(roberta, roberta_large, xlm, smart_bert, ...), or teach smart_fairseq this one: a subclass of "
            "smart_fairseq.encoder.Encoder with fits and find_insides, named in smart_fairseq.encoder.KINDS"
        )

    @cached_property
    def insides(self) -> Insides:
        return self.find_insides()

    def place(self, name: str) -> Place:
        """Where a perturbation enters; raises `UsageError` where this model has no such place."""
        module = self.insides.places.get(name)
        if module is None:
            raise UsageError(
                f"--smart-embedding is {name}, and this model's embeddings enter no LayerNorm (--smart-recipe sift has "
                f"that value); use {' or '.join(self.insides.places)}"
            )
        return (NormalizedPlace if name == "normalized" else Place)(module, self.rows)

    @property
    def table(self) -> Tensor:
        """The embedding table, [V, C]."""
        return self.insides.places["token"].weight  # type: ignore[return-value]

    @property
    def lm_head(self) -> nn.Module:
        """From features [N, C] to logits of tokens [N, V]; raises `UsageError` where there is none."""
        raise UsageError(
            f"--arch: {type(self.model).__name__} has no masked-LM head, by which candidates are scored; use roberta, "
            "roberta_large, smart_bert or another model of that kind"
        )

    def resting(self, head: str) -> list[str]:
        """The names of trained weights that a classification with this head leaves alone."""
        return []

    @property
    def has_dropout(self) -> bool:
        """Whether two passes in training mode draw masks."""
        rates = (getattr(module, "p", 0) for module in self.model.modules())
        return any(isinstance(rate, float) and rate > 0 for rate in rates)

    def turn_to(self, net_input: Mapping[str, Any]) -> None:
        """Take each row of the batch as an example, or with ``candidates`` [B, K, T] each K rows."""
        self.rows = net_input["candidates"].shape[1] if "candidates" in net_input else 1

    @contextmanager
    def turned_to(self, net_input: Mapping[str, Any]) -> Iterator[None]:
        """`turn_to` another batch within the block."""
        rows = self.rows
        self.turn_to(net_input)
        try:
            yield
        finally:
            self.rows = rows

    def mask(self, src_tokens: Tensor) -> Tensor:
        """1 at real tokens and 0 at padding: [B, T] token ids -> [B, T, 1] float32."""
        found = src_tokens.ne(self.insides.padding_idx).unsqueeze(-1).float()
        return found.reshape(len(found) // self.rows, -1, 1)

    # --- passes ------------------------------------------------------------------------------------

    @cached_property
    def lean_parts(self) -> dict[nn.Module, list[Replacement]]:
        """By layer, and for the model around them, what is replaced for `lean` passes."""
        return {}

    @contextmanager
    def lean(self) -> Iterator[None]:
        """Within the block, forwards compute the same by fewer kernels, and never let the host wait for the device."""
        if self._lean:
            yield
            return
        with replaced([part for parts in self.lean_parts.values() for part in parts]):
            self._lean = True
            try:
                yield
            finally:
                self._lean = False

    @cached_property
    def _all_modules(self) -> list[nn.Module]:
        return list(self.model.modules())

    def without_dropout(self) -> AbstractContextManager[None]:
        """Within the block, every module is in evaluation mode."""
        return without_dropout(self._all_modules)

    @cached_property
    def _slots(self) -> Slots:
        return Slots(self.model)

    def frozen_weights(self) -> Mapping[str, Tensor]:
        """The model's own weights without their gradients: a pass under them keeps no activation for them."""
        return self.cast(self._slots.frozen())

    def cast(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights without gradients, those of linear layers in autocast's precision where it is on."""
        return self._slots.cast(weights)

    def under(self, weights: Mapping[str, Tensor]) -> Substitute:
        """The model under other weights, for a pass of the ordinary criterion."""
        return Substitute(self.model, self._slots, weights)

    @cached_property
    def _attention_written_out(self) -> list[Replacement]:
        return forward_mode.attention_written_out(self.model)

    def attention_written_out(self) -> AbstractContextManager[None]:
        """Within the block, forwards draw the dropout masks that one with `Forward.products` or `changed` draws."""
        return replaced(self._attention_written_out)

    def recomputed(self, written_out: bool = False) -> AbstractContextManager[None]:
        """The block's forward keeps each layer's input alone, and runs the layer again when its gradient is taken.

        Args:
            written_out: the block is also one of `attention_written_out`.
        """
        lean = self.lean_parts if self._lean else {}
        attention = self._attention_written_out if written_out else []

        def again(layer: nn.Module) -> AbstractContextManager[None]:
            return replaced([*lean.get(layer, []), *attention])

        return memory.recomputed(self.insides.layers, again)

    @cached_property
    def _without_gelu_outputs(self) -> list[Replacement]:
        return memory.gelus_and_linears(self.model)

    def without_gelu_outputs(self) -> AbstractContextManager[None]:
        """Within the block, forwards keep the input of each layer's gelu for the gradient, and not the output too."""
        return replaced(self._without_gelu_outputs)

    @contextmanager
    def captured(self, place: str, *, differentiable: bool = False, leaf: bool = False) -> Iterator[list[Tensor]]:
        """What the block's forwards perturb, [B, T, C] each.

        Args:
            place: a name of `Insides.places`.
            differentiable: for gradients with respect to it, or to what stands in for its change.
            leaf: it is cut off from what it was computed from as well.
        """
        found: list[Tensor] = []
        here = self.place(place)

        def note(x: Tensor) -> Tensor:
            x = x.detach() if leaf else x
            if differentiable or leaf:
                x, entered = here.entered(x)
                found.append(entered)
            else:
                found.append(here.embeddings(x))
            return x

        with here.hook(note):
            yield found

    def embeddings(self, place: str, net_input: dict[str, Any]) -> Tensor:
        """What is perturbed, [B, T, C], without dropout and gradients; the forward ends there."""
        found: list[Tensor] = []
        here = self.place(place)

        def stop(x: Tensor) -> Tensor:
            found.append(here.embeddings(x))
            raise _Seen

        with self.lean(), here.hook(stop), contextlib.suppress(_Seen), torch.no_grad(), self.without_dropout():
            self.model(**net_input, features_only=True)
        return found[0]

    @contextmanager
    def perturbed(self, perturbation: Tensor, place: str, lookup: Tensor | None = None) -> Iterator[None]:
        """Add ``perturbation`` to the embeddings of the one forward that runs inside the block.

        Args:
            perturbation: [B, T, C], float32; gradients reach it.
            place: a name of `Insides.places`.
            lookup: [B, T, C], what another pass looked up for the same tokens, to be used again: the gradient of the
                table, which is as large as the table, is then made once for both passes.
        Raises:
            RuntimeError: the block's forward did not pass the perturbed module exactly once.
        """
        calls = 0
        here = self.place(place)

        def add(x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            # the sum is taken in the wider precision of the two and rounded once
            return rounded(x + here.scaled(x, perturbation), x.dtype)

        with contextlib.ExitStack() as hooks:
            hooks.enter_context(here.hook(add))
            if lookup is not None:  # before the sum
                table = self.insides.places["token"]
                hooks.enter_context(table.register_forward_hook(lambda *args: lookup.view_as(args[2]), prepend=True))
            yield
        if calls != 1:
            raise RuntimeError(f"the perturbation entered the forward {calls} times instead of once")

    @cached_property
    def _carrying(self) -> dict[bool, list[Replacement]]:
        return {
            differentiable: forward_mode.written_out(self.model, differentiable) for differentiable in (True, False)
        }

    def changed(
        self, direction: Tensor, place: str, leaf: list[Tensor] | None = None
    ) -> AbstractContextManager[list[Tensor]]:
        """Within the block, one forward also yields J ``direction``; see `forward_mode.changed`.

        Raises `UsageError` where the model's attention is not known there.
        """
        replacements = self._carrying[leaf is None]
        return forward_mode.changed(self.model, self.place(place), direction, replacements, leaf)


class Forward:
    """The classification forward of one batch, under weights and with a perturbation of one's choice.

    It turns the encoder to its batch: one at a time.

    Passes under other weights run on the bare model, its own code with other tensors in place of its parameters, of
    which a distributed wrapper sees nothing.

    Args:
        model: as the criterion was given it, distributed wrapper included.
        net_input: of the batch, as fairseq makes it.
        head: the classification head's name.
        place: a name of `Insides.places`.
    """

    def __init__(self, encoder: Encoder, model: Any, net_input: dict[str, Tensor], head: str, place: str) -> None:
        self.encoder, self.model, self.place = encoder, model, place
        encoder.turn_to(net_input)
        self.inputs = {**net_input, "features_only": True, "classification_head_name": head}

    def __call__(
        self,
        weights: Mapping[str, Tensor] | None = None,
        perturbation: Tensor | None = None,
        lookup: Tensor | None = None,
    ) -> Tensor:
        """The logits [B, K].

        Args:
            weights: parameter name -> tensor to use in its place; names left out keep the model's own.
                None runs the model as it was given.
            perturbation: [B, T, C], or None.
            lookup: see `Encoder.perturbed`.
        """
        if perturbation is not None:
            with self.encoder.perturbed(perturbation, self.place, lookup):
                return self(weights)
        run = self.model if weights is None else self.encoder.under(weights)
        return run(**self.inputs)[0]  # type: ignore[no-any-return]

    def products(
        self, weights: Mapping[str, Tensor], direction: Tensor
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Outputs, their change J d along the ``direction`` d, and the way back (cotangent -> J' cotangent).

        Args:
            direction: d, [B, T, C].
        Returns:
            [B, K], [B, K], and a function from [B, K] to [B, T, C]; dtypes of the model.
        """
        leaf: list[Tensor] = []
        with torch.enable_grad(), self.encoder.changed(direction, self.place, leaf) as change:
            logits = self(weights)

        def pull_back(cotangent: Tensor) -> Tensor:
            return torch.autograd.grad(logits, leaf[0], cotangent.to(logits.dtype))[0]

        return logits, change[0], pull_back
