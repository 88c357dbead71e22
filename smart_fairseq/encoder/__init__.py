"""Everything that the method needs of a model's insides; see `base.Encoder`."""

from typing import Any

from .base import Encoder, Forward
from .roberta import RobertaEncoder

__all__ = ["KINDS", "Encoder", "Forward", "RobertaEncoder", "encoder_of"]

# the kinds of encoder that can be perturbed; the first that fits a model is its own
KINDS: list[type[Encoder]] = [RobertaEncoder]


def encoder_of(model: Any) -> Encoder:
    """The encoder object of a model, which may stand in distributed wrappers.

    A model of no known kind gets the plain `Encoder`, which runs it, and refuses a perturbation.
    """
    plain = Encoder(model)
    return next((kind(model) for kind in KINDS if kind.fits(plain.model)), plain)
