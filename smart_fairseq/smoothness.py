"""The smoothness term of one batch: Algorithm 1, lines 3 to 9, on the model's own forwards.

Paper: Jiang et al. (2020), equation 1: R_s, the divergence between the output at the perturbed embeddings x~ and
the clean one. `TwoForwards` finds the perturbation after the clean pass and runs a second one at x~;
`CarriedChange` finds it before, and the clean pass carries the change of the output along. `forms` says which is
right where. Either is used in the same way:

    term = smoothness_term(...)
    with term.clean_pass():
        clean = ...                 # the ordinary forward, whatever wraps it
    value = term.value(clean)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .forms import CARRIED_CHANGE, CLEAN_PASS, OWN_PASS, TWO_FORWARDS, Form, few_outputs
from .method.adversary import (
    Adversary,
    GradientFn,
    ascend,
    find_perturbation,
    gradient_by_change,
    gradient_of,
    gradient_to_first_order,
    linearized,
    norm,
)
from .method.divergence import Divergence
from .method.dropout import RandomState, without_dropout
from .method.noise import example_noise
from .method.reuse import PerturbationMemory
from .perturb import (
    Forward,
    captured,
    changed,
    embedding_weight,
    recomputed,
    token_mask,
    without_gelu_outputs,
)

__all__ = ["CarriedChange", "Settings", "SmoothnessTerm", "TwoForwards", "smoothness_term"]


@dataclass
class Settings:
    """What is the same for every batch.

    cfg: the criterion's flags.
    num_classes: number of outputs K.
    divergence: l_s, of two outputs.
    divergence_of_change: the same of an output and its change.
    """

    cfg: Any
    num_classes: int
    adversary: Adversary
    divergence: Divergence
    divergence_of_change: Divergence
    memory: PerturbationMemory | None = None


class SmoothnessTerm:
    """R_s of one batch, its perturbation, and what the log says of it.

    perturbation: [B, T, C], float32 or wider, once the value is there.
    """

    def __init__(self, settings: Settings, form: Form, forward: Forward, sample: Any) -> None:
        self.settings, self.form, self.forward, self.sample = settings, form, forward, sample
        tokens = sample["net_input"]["src_tokens"]
        embeddings = embedding_weight(forward.model)
        self.masks = RandomState(tokens.device)
        self.mask = token_mask(forward.model, tokens)
        # Algorithm 1, line 3; seeded as fairseq seeds torch on every worker: with its --seed plus the update's number
        noise = example_noise(sample["id"], tokens.shape[1], embeddings.shape[1], seed=torch.initial_seed())
        # at least float32, whatever the model's precision
        self.noise = noise.to(torch.promote_types(embeddings.dtype, torch.float32)) * settings.cfg.smart_noise_std
        self.perturbation: Tensor

    def clean_pass(self) -> Any:
        """The context that the ordinary forward runs in."""
        raise NotImplementedError

    def value(self, clean: Tensor) -> Tensor:
        """R_s summed over the batch, in float32 or wider; ``clean`` [B, K]: the clean pass's logits."""
        raise NotImplementedError

    def noise_floor(self, clean: Tensor) -> Tensor:
        """What the term would be if its outputs were off by the working precision's rounding; a sum."""
        raise NotImplementedError

    def sizes(self) -> Tensor:
        """Norms of the perturbation (of each example, or of the mean token of each), summed over the batch."""
        sizes = norm(self.perturbation.detach(), self.settings.adversary)
        if self.settings.adversary.scope == "token":
            sizes = (sizes * self.mask).sum(dim=1) / self.mask.sum(dim=1)
        return sizes.sum()

    @contextmanager
    def _dropout(self) -> Iterator[None]:
        """The dropout of a pass of this term, as ``--smart-dropout`` says."""
        chosen = self.settings.cfg.smart_dropout
        if chosen == "shared":
            with self.masks.replayed():
                yield
        elif chosen == "off":
            with without_dropout(self.forward.model):
                yield
        else:
            yield

    def _first_order(self) -> GradientFn:
        """The gradient to first order, from a pass of its own before the clean one."""
        forward, weights = self.forward, self.forward.frozen_weights()

        def products(direction: Tensor) -> Any:
            with self._dropout():
                return forward.products(weights, direction)

        if not few_outputs(self.settings.num_classes):
            return gradient_to_first_order(products, self.settings.divergence_of_change)
        with self._dropout(), captured(forward.model, forward.place, leaf=True) as entered:
            outputs = forward(weights)
        return gradient_of(linearized(outputs, entered[0]), outputs.detach(), self.settings.divergence)

    def _rounded(self, clean: Tensor, rounded: Tensor) -> Tensor:
        with torch.no_grad():
            wide = torch.promote_types(clean.dtype, torch.float32)
            signs = torch.ones_like(clean, dtype=wide)
            signs[:, ::2] = -1
            off = torch.finfo(self.form.dtype).eps / 2 * rounded.to(wide).abs() * signs
            return self.settings.divergence_of_change(clean.to(wide), off).sum()


class TwoForwards(SmoothnessTerm):
    """The divergence between the outputs of two forwards."""

    def __init__(self, settings: Settings, form: Form, forward: Forward, sample: Any) -> None:
        super().__init__(settings, form, forward, sample)
        memory = settings.memory
        self._known = memory.recall(sample["id"], self.noise) if memory else None
        self._first_gradient: Tensor | None = None
        if self._known is None and form.first_step == OWN_PASS:
            self._first_gradient = self._first_order()(self.noise * self.mask)
        self._looked_up: list[Tensor] = []
        self._entered: list[Tensor] = []  # what the clean outputs are linearized in, if they are

    @contextmanager
    def clean_pass(self) -> Iterator[None]:
        model = self.forward.model
        saving = recomputed(model) if self.settings.cfg.smart_recompute else without_gelu_outputs(model)
        with saving, captured(model, "token") as self._looked_up, self._entering():
            yield

    def value(self, clean: Tensor) -> Tensor:
        settings, forward = self.settings, self.forward
        if settings.cfg.smart_dropout == "off":
            with without_dropout(forward.model), self._entering():
                clean = forward()
        perturbation = self._find(clean) if self._known is None else self._known
        if settings.memory:
            perturbation = settings.memory.watched(self.sample["id"], perturbation, self.mask)
        self.perturbation = perturbation
        with self._dropout(), without_gelu_outputs(forward.model):
            # the clean pass's embeddings
            adversarial = forward(perturbation=perturbation, lookup=self._looked_up[0])
        return settings.divergence(adversarial, clean).sum()

    def noise_floor(self, clean: Tensor) -> Tensor:
        return self._rounded(clean, clean)

    @contextmanager
    def _entering(self) -> Iterator[None]:
        if self.form.first_step != CLEAN_PASS:
            yield
            return
        layers = self.form.search_layers or 0
        with captured(self.forward.model, self.forward.place, layers, differentiable=True) as self._entered:
            yield

    def _find(self, clean: Tensor) -> Tensor:
        """Algorithm 1, lines 4 to 8."""
        settings, forward, layers = self.settings, self.forward, self.form.search_layers
        weights, gradient = forward.frozen_weights(), self._first_gradient

        def logits_fn(perturbation: Tensor) -> Tensor:
            with self._dropout():
                return forward(weights, perturbation)

        def upper_layers_linear(perturbation: Tensor) -> Tensor:
            if not layers:
                return linear(perturbation)
            with self._dropout():
                return linear(forward.hidden(weights, perturbation, layers) - self._entered[0].detach())

        if self._entered:
            linear = linearized(clean, self._entered[0])
            if layers is None:
                gradient = gradient_of(linear, clean, settings.divergence)(self.noise * self.mask)
            else:
                logits_fn = upper_layers_linear
        return find_perturbation(
            logits_fn, clean, self.noise, self.mask, settings.divergence, settings.adversary, gradient
        )


class CarriedChange(SmoothnessTerm):
    """The divergence of the change that the clean pass carries along, exactly or to first order."""

    @contextmanager
    def clean_pass(self) -> Iterator[None]:
        settings, exact = self.settings, self.form.term == CARRIED_CHANGE
        gradient_fn = self._at_the_point() if exact else self._first_order()
        self.perturbation = ascend(gradient_fn, self.noise, self.mask, settings.adversary)
        size = settings.adversary.size
        direction = self.perturbation / size
        with changed(self.forward.model, direction, self.forward.place, size if exact else 0.0) as change:
            yield
        self._moved = size * change[0].to(self.perturbation.dtype)

    def value(self, clean: Tensor) -> Tensor:
        return self.settings.divergence_of_change(clean, self._moved).sum()

    def noise_floor(self, clean: Tensor) -> Tensor:
        return self._rounded(clean, self._moved)

    def _at_the_point(self) -> GradientFn:
        """The gradient at the perturbed point, whatever the precision."""
        forward, weights, size = self.forward, self.forward.frozen_weights(), self.settings.adversary.size

        def products(perturbation: Tensor) -> Any:
            with self._dropout():
                logits, back, pull_back = forward.products(weights, perturbation / size, size)
            back = size * back.to(perturbation.dtype)
            return logits.to(back.dtype) + back, -back, pull_back

        return gradient_by_change(products, self.settings.divergence_of_change)


def smoothness_term(settings: Settings, form: Form, forward: Forward, sample: Any) -> SmoothnessTerm:
    """The term of a batch; ``sample`` as fairseq makes it."""
    kind = TwoForwards if form.term == TWO_FORWARDS else CarriedChange
    return kind(settings, form, forward, sample)
