"""Which form of the smoothness term is right: for the flags, the model and the precision that it works in.

Two outputs cannot be told apart when the perturbation between them is below what the precision resolves; see
`perturb` for what carries a change, and `method.adversary` for what the ascent follows.
"""

import logging
from typing import Any, NamedTuple

import torch
from torch import nn

from .errors import UsageError, require
from .perturb import embedding_weight, layer_count

__all__ = [
    "CARRIED_CHANGE",
    "CLEAN_PASS",
    "FIRST_ORDER",
    "FORWARD",
    "OWN_PASS",
    "TWO_FORWARDS",
    "Form",
    "choose_form",
    "divergence_name",
    "few_outputs",
    "unknown_to_carried_change",
    "working_precision",
]

logger = logging.getLogger(__name__)

# the term, as the log has it
TWO_FORWARDS = "by two forwards"
CARRIED_CHANGE = "by the exact change that a forward carries along"  # the same value, without the rounding
FIRST_ORDER = "to first order (tangent)"

# the gradient of the first ascent step by two forwards
FORWARD = "by a forward like the others"
CLEAN_PASS = "to first order from the clean pass"
OWN_PASS = "to first order from a pass of its own"


class Form(NamedTuple):
    """How the term is computed."""

    term: str
    first_step: str
    dtype: torch.dtype  # in which the model works
    search_layers: int | None = None  # that the ascent runs through, where the others are taken to first order

    def in_words(self) -> str:
        if self.search_layers:
            return f"{self.term}, the ascent through {self.search_layers} layer(s) and {CLEAN_PASS} above them"
        steps = "the first ascent step" if self.search_layers is None else "every ascent step"
        return self.term if self.first_step == FORWARD else f"{self.term}, {steps} {self.first_step}"


def choose_form(cfg: Any, model: nn.Module, num_classes: int) -> Form:
    """The form for the flags of the criterion.

    Raises:
        UsageError: the precision does not resolve the perturbation, and the flags allow no form that would.
    """
    mode, dtype = str(cfg.smart_mode), working_precision(cfg, model)
    name = str(dtype).split(".")[1]
    # measured: two forwards are off by about this over the perturbation's size, relatively
    rounding = _resolution(model, dtype)
    resolved = 16 * rounding
    unknown = unknown_to_carried_change(cfg)
    exact = mode == "finite" and torch.finfo(dtype).bits >= 32
    # an l2 norm is spread over the entries of a token
    spread = embedding_weight(model).shape[1] ** 0.5 if cfg.smart_norm == "l2" else 1
    least_exact = spread * 1e6 * rounding
    least = least_exact if exact and not unknown else spread * resolved
    size, flags = _largest_size(cfg)
    if exact and unknown and size < least_exact:
        logger.warning(
            f"--smart-mode finite: {flags} {size:g} is too small for two forwards to be exact to 1e-5 in {name}, and "
            f"the form that is exact {unknown}; two forwards are taken"
        )
    why = f"{flags} {size:g} is below what {name} resolves here ({least:.0e})"
    if mode == "tangent":
        return Form(FIRST_ORDER, FORWARD, dtype)
    if size >= least:
        _check_search(cfg, model, resolved, name)
        # a step to first order is off by about four times the noise
        harmless = max(resolved, rounding * spread / size / 4)
        first_step = _first_step(cfg, num_classes, resolved, harmless)
        return Form(TWO_FORWARDS, first_step, dtype, cfg.smart_search_layers)
    if unknown:
        raise UsageError(
            f"{why}: two forwards would measure rounding; the form that is right {unknown}, or a larger size"
        )
    if mode == "finite":
        return Form(CARRIED_CHANGE, FORWARD, dtype)
    logger.info(f"--smart-mode auto: {why}, so the term is computed to first order (tangent)")
    return Form(FIRST_ORDER, FORWARD, dtype)


def _first_step(cfg: Any, num_classes: int, resolved: float, harmless: float) -> str:
    """``resolved``: the least noise that two forwards see; below ``harmless``, the first order costs no digits."""
    if cfg.smart_search_layers is not None:
        return CLEAN_PASS
    noise = cfg.smart_noise_std
    if cfg.smart_dropout == "independent":  # fresh masks change the output more than any noise
        return FORWARD
    if few_outputs(num_classes) and not cfg.smart_recompute:  # which keeps nothing of the clean pass
        return CLEAN_PASS if noise < harmless else FORWARD
    return OWN_PASS if noise < resolved else FORWARD


def _check_search(cfg: Any, model: nn.Module, resolved: float, name: str) -> None:
    searched, there = cfg.smart_search_layers or 0, layer_count(model)
    require(searched <= there, "--smart-search-layers", searched, f"at most {there}, the model's number of layers")
    if searched and cfg.smart_noise_std < resolved:
        raise UsageError(
            f"--smart-search-layers is {searched} and --smart-noise-std {cfg.smart_noise_std:g}, below what {name} "
            f"resolves ({resolved:.0e}) after any layer; use 0, or more noise"
        )


def few_outputs(num_classes: int) -> bool:
    """Whether the Jacobian of the outputs, a backward pass for each but one, costs no more than its products."""
    return num_classes <= 3


def working_precision(cfg: Any, model: nn.Module) -> torch.dtype:
    """The dtype that the model's products are taken in: autocast's under --amp, otherwise its weights'."""
    weight = embedding_weight(model)
    return torch.float16 if cfg.smart_amp and weight.is_cuda else weight.dtype


def _resolution(model: nn.Module, dtype: torch.dtype) -> float:
    """The smallest perturbation of the embeddings that ``dtype`` resolves: rounding of their median entry."""
    median = float(embedding_weight(model).detach().float().abs().median())
    return torch.finfo(dtype).eps * median


def _largest_size(cfg: Any) -> tuple[float, str]:
    """The size that a perturbation can reach, and the flags that limit it."""
    if cfg.smart_projection == "normalize":
        return 1.0, "--smart-projection normalize"
    reach = cfg.smart_noise_std + cfg.smart_steps * cfg.smart_step_size
    if reach < cfg.smart_epsilon:
        return reach, "--smart-noise-std + --smart-steps x --smart-step-size ="
    return cfg.smart_epsilon, "--smart-epsilon"


def unknown_to_carried_change(cfg: Any) -> str | None:
    """Which flag the forms that carry a change do not know, and what to do about it; None if they know them all."""
    if cfg.smart_dropout != "shared":
        return f"does not know --smart-dropout {cfg.smart_dropout}; use shared"
    for flag, value in (
        ("--smart-reuse", cfg.smart_reuse),
        ("--smart-recompute", cfg.smart_recompute),
        ("--smart-search-layers", cfg.smart_search_layers is not None),
    ):
        if value:
            return f"does not know {flag}; leave that flag out"
    if divergence_name(cfg) in ("kl", "js"):
        return f"does not know --smart-divergence {divergence_name(cfg)}; use auto"
    return None


def divergence_name(cfg: Any) -> str:
    if cfg.smart_divergence == "auto":
        return "squared" if cfg.regression_target else "sym_kl"
    return str(cfg.smart_divergence)
