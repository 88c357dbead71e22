"""Which form of the smoothness term is right: for the flags, the model and the precision that it works in.

Two outputs cannot be told apart when the perturbation between them is below what the precision resolves at the
perturbed place; the first order is off where the perturbation is large. The constants of the rule were measured
against a float64 Algorithm 1 on tuned encoders by `benchmarks/precision.py`; `tests/test_precision.py` holds them.
"""

import logging
import math
from collections.abc import Iterator
from enum import Enum
from typing import Any, NamedTuple

import torch
from fairseq.utils import apply_to_sample
from torch import Tensor

from ..config.flags import AdversaryFlags
from ..encoder import Encoder
from ..errors import UsageError

logger = logging.getLogger(__name__)

# two forwards are off by epsilon over the perturbation, the first order by the perturbation, both relative to what
# is perturbed. From this many roundings on two forwards are the better of the two in half precision, and within 1 %
# in float32, where the first order, which costs more, would be better still
ROUNDINGS = {torch.bfloat16: 2.25, torch.float16: 6.5, torch.float32: 200.0, torch.float64: 200.0}
# up to this share of what is perturbed the first order is within 5 %; above it, on few examples that react strongly,
# it was off by up to 50 %, its direction still at cosine 0.99
LINEAR_SHARE = 0.003
# changes are carried along at this share of what is perturbed: in float16 those of a trained encoder overflow at size 1
CARRIED_SHARE = 0.25
# up to here, a backward pass for each class but one costs no more than a forward-mode product
FEW_CLASSES = 4


class FormOfTerm(Enum):
    """How the term is computed."""

    TWO_FORWARDS = "two_forwards"
    FIRST_ORDER = "first_order"


class Search(Enum):
    """Where the gradient of the first ascent step comes from; the later ones take a forward each, or none."""

    CLEAN_PASS = "its first ascent step from the clean pass"
    OWN_PASS = "its first ascent step from a pass of its own"
    OWN_PRODUCTS = "its first ascent step from a pass of its own that carries a change along"
    FORWARD = "its first ascent step by a forward, whose fresh masks move the output more than any noise"
    EVERY_STEP = "every ascent step from the clean pass"


class Form(NamedTuple):
    """How the term is computed.

    scale: of the directions along which a change is carried; a power of two, so that it rounds nothing.
    """

    term: FormOfTerm
    search: Search
    scale: float = 1.0

    def in_words(self) -> str:
        if self.term is FormOfTerm.FIRST_ORDER:
            return "to first order (tangent), every ascent step from a pass of its own"
        return f"by two forwards, {self.search.value}"


class PlaceSizes(NamedTuple):
    """What is perturbed, over the real tokens of some examples.

    median: of the entries' sizes.
    root_mean_square: of the entries.
    entries: that an example has, in the mean.
    """

    median: float
    root_mean_square: float
    entries: float


def measure_place(encoder: Encoder, place: str, net_input: dict[str, Any]) -> PlaceSizes:
    """Run a batch as far as the perturbed place; without dropout and gradients."""
    inputs = apply_to_sample(lambda tensor: tensor.to(encoder.table.device), net_input)
    with encoder.turned_to(inputs):
        mask = encoder.mask(inputs["src_tokens"]).bool().squeeze(-1)
        values = encoder.embeddings(place, inputs)[mask].float()
    return PlaceSizes(float(values.abs().median()), float(values.square().mean().sqrt()), values.numel() / len(mask))


def choose_form(
    flags: AdversaryFlags, encoder: Encoder, place: PlaceSizes, num_classes: int, dtype: torch.dtype
) -> Form:
    """The form for the flags of the criterion and a number of outputs.

    Raises:
        UsageError: the precision does not resolve the perturbation, and the flags allow no form that would.
    """
    name, mode = str(dtype).split(".")[1], str(flags.smart_mode)
    scale = 2.0 ** math.floor(math.log2(CARRIED_SHARE * place.root_mean_square))
    first_order = Form(FormOfTerm.FIRST_ORDER, _own_pass(num_classes), scale)
    # where nothing is dropped, independent masks are the clean pass's
    fresh_masks = flags.smart_dropout == "independent" and encoder.has_dropout
    two_forwards = Form(FormOfTerm.TWO_FORWARDS, _search(flags, fresh_masks, num_classes), scale)
    unknown = next(_unknown_to_first_order(flags, fresh_masks), None)
    if mode == "tangent":
        if unknown:
            raise UsageError(f"--smart-mode is tangent, which {unknown}, or use --smart-mode auto")
        return first_order
    unit, noise = place.root_mean_square, flags.smart_noise_std
    if flags.smart_epsilon_unit == "absolute":
        # an l2 norm is spread over the entries that it is taken over, and the noise is an entry's
        taken_over = encoder.table.shape[1] if flags.smart_norm_scope == "token" else place.entries
        unit = taken_over**-0.5 if flags.smart_norm == "l2" else 1.0
        noise /= unit
    size, limit = _largest_size(flags, noise)
    an_entry = size * unit
    resolving = dtype
    if dtype == torch.float32 and encoder.table.is_cuda and _tf32_is_on():
        # whose products of matrices have float16's mantissa
        resolving, name = torch.float16, "float32 with TF32"
    resolved = ROUNDINGS[resolving] * torch.finfo(resolving).eps * place.median
    if an_entry >= resolved:
        if flags.smart_embedding == "input" and dtype == torch.bfloat16:
            logger.warning(
                "--smart-embedding input in bfloat16: batches of tuned encoders had a term up to 9 % off "
                "(docs/precision.md); token is closer"
            )
        if flags.smart_steps > 1 and torch.finfo(dtype).bits == 16 and not flags.smart_linear_search:
            logger.warning(
                f"--smart-steps {flags.smart_steps} in {name}: the later steps follow a gradient taken in it at the "
                "perturbed point; batches of tuned encoders had a term up to 30 % too small (docs/precision.md)"
            )
        return two_forwards
    why = f"{limit} {size:g} is below what {name} resolves here ({resolved / unit:.0e})"
    if mode == "finite":
        logger.warning(f"--smart-mode finite: {why}; the term will be partly rounding, and --smart-mode auto is right")
        return two_forwards
    if unknown:
        raise UsageError(
            f"{why}: two forwards would measure rounding; the form that is right {unknown}, or a larger size"
        )
    if an_entry > LINEAR_SHARE * place.root_mean_square:
        logger.warning(
            f"--smart-mode auto: {why}, and large for the first order, which is taken: the term may be off by more "
            "than 5 %; take a larger or a smaller size, or a finer precision"
        )
    else:
        logger.info(f"--smart-mode auto: {why}, so the term is computed to first order (tangent)")
    return first_order


def _search(flags: AdversaryFlags, fresh_masks: bool, num_classes: int) -> Search:
    if flags.smart_linear_search:
        if num_classes > FEW_CLASSES:
            logger.warning(
                f"--smart-linear-search takes a backward pass for each of {num_classes} classes but one, more than it "
                "saves unless there are many steps; leave it out"
            )
        return Search.EVERY_STEP
    if fresh_masks:
        return Search.FORWARD
    # recomputing keeps nothing of the clean pass
    few = num_classes <= FEW_CLASSES and not flags.smart_recompute
    return Search.CLEAN_PASS if few else _own_pass(num_classes)


def _own_pass(num_classes: int) -> Search:
    """By the Jacobian, a backward pass for each output but one, or by its products; the forward counts as one more."""
    return Search.OWN_PASS if num_classes + 1 <= FEW_CLASSES else Search.OWN_PRODUCTS


def working_precision(encoder: Encoder, amp: bool) -> torch.dtype:
    """The dtype that the model's products are taken in: autocast's under --amp, otherwise its weights'."""
    weight: Tensor = next(encoder.model.parameters())
    return torch.float16 if amp and weight.is_cuda else weight.dtype


def _tf32_is_on() -> bool:
    """Whether CUDA may round the factors of float32 products of matrices to 10 bits; in torch off unless set."""
    matmul: Any = torch.backends.cuda.matmul
    # torch 2.9 has both, and refuses to answer the old question once the new setting was used
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else bool(matmul.allow_tf32)


def _largest_size(flags: AdversaryFlags, noise: float) -> tuple[float, str]:
    """The size that a perturbation can reach from noise of that size, and the flags that limit it."""
    if flags.smart_projection == "normalize":
        return 1.0, "--smart-projection normalize"
    reach = noise + flags.smart_steps * flags.smart_step_size
    if reach < flags.smart_epsilon:
        return reach, "--smart-noise-std + --smart-steps x --smart-step-size ="
    return flags.smart_epsilon, "--smart-epsilon"


def _unknown_to_first_order(flags: AdversaryFlags, fresh_masks: bool) -> Iterator[str]:
    """Which flags the first-order form does not know, and what to do about each."""
    if fresh_masks or flags.smart_dropout == "off":
        yield f"does not know --smart-dropout {flags.smart_dropout}; use shared"
    for flag in ("recompute", "linear_search"):
        if getattr(flags, f"smart_{flag}"):
            yield f"does not know --smart-{flag.replace('_', '-')}; leave that flag out"
    if flags.smart_divergence in ("kl", "js"):
        yield f"does not know --smart-divergence {flags.smart_divergence}; use auto"
