"""The smoothness term of one batch: Algorithm 1, lines 3 to 9, on the model's own forwards.

Paper: Jiang et al. (2020), equation 1: R_s, the divergence between the output at the perturbed embeddings x~ and the
clean one. `two_forwards` finds the perturbation after the clean pass and runs a second one at x~; `to_first_order`
finds it before, and the clean pass carries the change of the output along. `precision` says which is right where.

The first ascent step follows the gradient to first order, J' H J nu with the curvature H of the divergence: at the
noise nu, from which it starts, two outputs differ by next to nothing, and a difference of them is rounding for
confident examples in float32, and for all in half precision.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..encoder import Forward
from ..method.adversary import (
    Adversary,
    GradientFn,
    LogitsFn,
    ascend,
    away_from,
    gradient_of,
    gradient_to_first_order,
    linearized,
    norm,
)
from ..method.divergence import Divergence
from ..method.dropout import RandomState
from ..method.noise import example_noise
from ..method.relative import noise_in_units
from . import Term, TermValue
from .precision import Form, FormOfTerm, Search
from .start import drawn


@dataclass(frozen=True)
class Settings:
    """What the flags say, and the divergences of a batch's task.

    noise_std: sigma, in the units of the embeddings, or with ``relative`` in their root mean square.
    relative: sizes are shares of the example's embeddings (`method.relative`).
    dropout: masks of the perturbed pass: "shared", "independent" or "off".
    recompute: keep no activations of the clean pass.
    divergence: l_s, of two outputs.
    divergence_of_change: the same of an output and its change.
    """

    adversary: Adversary
    noise_std: float
    relative: bool
    dropout: str
    recompute: bool
    divergence: Divergence
    divergence_of_change: Divergence


class _Batch:
    """What both forms need of one batch; made before the clean pass, whose dropout masks it can replay."""

    def __init__(self, settings: Settings, form: Form, forward: Forward, sample: Any) -> None:
        self.settings, self.form, self.forward, self.encoder = settings, form, forward, forward.encoder
        self.masks = RandomState(sample["net_input"]["src_tokens"].device)
        # Algorithm 1, line 3; the ascent works in the unit
        noise, self.unit, self.mask = drawn(forward, sample, example_noise, settings.adversary, settings.relative)
        self.noise = noise * settings.noise_std
        if settings.relative:
            self.noise = noise_in_units(self.noise, self.mask, settings.adversary)
        # carrying a change needs attention written out, and a fused kernel draws other masks: all passes of the term
        # have the one or the other
        carries = form.search is Search.OWN_PRODUCTS or form.term is FormOfTerm.FIRST_ORDER
        self.written_out = carries and settings.dropout == "shared"
        self.largest_unit = self.unit.amax(dim=1, keepdim=True).clamp_min(torch.finfo(self.unit.dtype).tiny)

    def attention(self) -> AbstractContextManager[None]:
        """The attention of all passes of this term."""
        return self.encoder.attention_written_out() if self.written_out else nullcontext()

    @contextmanager
    def dropout(self) -> Iterator[None]:
        """The dropout of a pass of this term, as ``--smart-dropout`` says."""
        dropout: AbstractContextManager[None] = nullcontext()
        if self.settings.dropout == "shared":
            dropout = self.masks.replayed()
        elif self.settings.dropout == "off":
            dropout = self.encoder.without_dropout()
        with dropout, self.attention():
            yield

    def first_order_gradient(self) -> GradientFn:
        """The gradient to first order at the clean point, from a pass of its own."""
        weights, forward, settings = self.encoder.frozen_weights(), self.forward, self.settings

        def products(direction: Tensor) -> Any:
            with self.dropout():
                return forward.products(weights, self.carried(direction))

        if self.form.search is Search.OWN_PRODUCTS:
            return gradient_to_first_order(products, settings.divergence_of_change)
        with self.dropout(), self.encoder.captured(forward.place, leaf=True) as entered:
            outputs = forward(weights)
        near = self.in_units(linearized(outputs, entered[0]))
        return gradient_of(near, away_from(outputs, settings.divergence))

    def in_units(self, logits_fn: LogitsFn) -> LogitsFn:
        """A function of the perturbation as one of the perturbation in the unit of the ascent."""
        return lambda perturbation: logits_fn(perturbation * self.unit)

    def carried(self, direction: Tensor) -> Tensor:
        """A direction in the unit of the ascent, along which a change is carried: of the size of the form's scale."""
        return self.form.scale * direction * (self.unit / self.largest_unit)

    def result(self, value: Tensor, perturbation: Tensor) -> TermValue:
        """The value with the perturbation, whose size is logged in the unit of --smart-epsilon."""
        sizes = norm(perturbation, self.settings.adversary)
        if self.settings.adversary.scope == "token":  # of the mean token
            sizes = (sizes * self.mask).sum(dim=1) / self.mask.sum(dim=1)
        return TermValue(value, sizes.sum(), perturbation * self.unit)


def smoothness(settings: Settings, form: Form, forward: Forward, sample: Any) -> Term:
    """R_s of one batch, in the form that is right for it; ``sample`` as fairseq makes it."""
    run = two_forwards if form.term is FormOfTerm.TWO_FORWARDS else to_first_order
    return run(_Batch(settings, form, forward, sample))


@contextmanager
def two_forwards(batch: _Batch) -> Iterator[Callable[[Tensor], TermValue]]:
    """The divergence between the outputs of two forwards."""
    settings, form, forward, encoder = batch.settings, batch.form, batch.forward, batch.encoder
    own = form.search in (Search.OWN_PASS, Search.OWN_PRODUCTS)
    known = batch.first_order_gradient()(batch.noise * batch.mask) if own else None
    linear = form.search in (Search.CLEAN_PASS, Search.EVERY_STEP)

    def entering() -> AbstractContextManager[list[Tensor]]:
        """What the clean outputs are linearized in, if they are."""
        return encoder.captured(forward.place, differentiable=True) if linear else nullcontext([])

    def find(clean: Tensor, entered: list[Tensor]) -> Tensor:
        """Algorithm 1, lines 4 to 8."""
        weights, first_gradient = cache(encoder.frozen_weights), known
        from_clean = away_from(clean, settings.divergence)

        def at_the_point(perturbation: Tensor) -> Tensor:
            with batch.dropout():
                return forward(weights(), perturbation)

        logits_fn = batch.in_units(at_the_point)
        if entered:
            near = batch.in_units(linearized(clean, entered[0]))
            if form.search is Search.EVERY_STEP:
                logits_fn = near
            else:
                first_gradient = gradient_of(near, from_clean)(batch.noise * batch.mask)
        gradient_fn = gradient_of(logits_fn, from_clean)
        return ascend(gradient_fn, batch.noise, batch.mask, settings.adversary, first_gradient)

    def value(clean: Tensor) -> TermValue:
        found = entered
        if settings.dropout == "off":
            with encoder.without_dropout(), entering() as found:
                clean = forward()
        perturbation = find(clean, found)
        with batch.dropout(), encoder.without_gelu_outputs():
            # the clean pass's embeddings
            adversarial = forward(perturbation=perturbation * batch.unit, lookup=looked_up[0])
        return batch.result(settings.divergence(adversarial, clean).sum(), perturbation)

    saving = encoder.recomputed(batch.written_out) if settings.recompute else encoder.without_gelu_outputs()
    with batch.attention(), saving, encoder.captured("token") as looked_up, entering() as entered:
        yield value


@contextmanager
def to_first_order(batch: _Batch) -> Iterator[Callable[[Tensor], TermValue]]:
    """The divergence of the change, to first order, that the clean pass carries along."""
    settings, adversary, scale = batch.settings, batch.settings.adversary, batch.form.scale
    perturbation = ascend(batch.first_order_gradient(), batch.noise, batch.mask, adversary)

    def value(clean: Tensor) -> TermValue:
        change = adversary.size / scale * batch.largest_unit[:, 0] * changes[0].to(perturbation.dtype)
        return batch.result(settings.divergence_of_change(clean, change).sum(), perturbation)

    with batch.encoder.changed(batch.carried(perturbation / adversary.size), batch.forward.place) as changes:
        yield value
