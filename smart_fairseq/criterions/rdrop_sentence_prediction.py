"""`rdrop_sentence_prediction`: two dropout masks must give the same output.

Paper: Liang et al. (2021), equations 1 to 4 and algorithm 1, divided by 2 so that a single mask gives plain
fine-tuning: the mean of both passes' task losses + alpha / 2 * (KL(P1, P2) + KL(P2, P1)) / 2. For a regression, which
the paper leaves open, the squared difference in the place of the mean of both KL.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.criterions import register_criterion
from torch import Tensor

from ..config.flags import ByRecipe, RegularizedConfig, flag, recipe_choices, with_recipe
from ..encoder import Encoder, Forward
from ..terms import TermValue
from ..training.checks import check_weight
from ..training.criterion import RegularizedCriterion

logger = logging.getLogger(__name__)


# fairseq reads these annotations at run time: no `from __future__ import annotations` in this file
@dataclass
class RDropConfig(RegularizedConfig):
    rdrop_recipe: recipe_choices("rdrop") = flag(  # type: ignore[valid-type]
        "paper",
        "values of the flags that are not given: paper (the default), or those of the authors' code for a task of GLUE",
    )
    rdrop_weight: ByRecipe = flag(None, "the paper's alpha, 1 to 5 there; 0 switches the second pass off as well")


@register_criterion("rdrop_sentence_prediction", dataclass=RDropConfig)
class RDropSentencePrediction(RegularizedCriterion):
    """The criterion; its flags are `RDropConfig`."""

    def __init__(self, cfg: RDropConfig, task: Any) -> None:
        cfg = with_recipe(cfg, "rdrop")
        super().__init__(cfg, task, weights={"rdrop": check_weight("--rdrop-weight", cfg.rdrop_weight) / 2})

    def prepare(self, encoder: Encoder) -> str:
        if self.weights["rdrop"] and not encoder.has_dropout:
            logger.warning("R-Drop: every dropout rate is 0, so both passes are the same and the term is 0")
        return "R-Drop: "

    @contextmanager
    def term(self, name: str, forward: Forward, sample: dict[str, Any]) -> Iterator[Callable[[Tensor], TermValue]]:
        tokens = sample["net_input"]["src_tokens"]
        nothing = torch.zeros(*tokens.shape, forward.encoder.table.shape[1], device=tokens.device)

        def value(clean: Tensor) -> TermValue:
            # the clean pass's embeddings: the gradient of the table is made once
            second = forward(perturbation=nothing, lookup=looked_up[0])
            change = self.divergence(clean, second).sum()
            mean = change if self.regression_target else change / 2
            beside = (self.task_losses(second, sample) - self.task_losses(clean, sample)).sum() / 2
            return TermValue(mean, beside=beside)

        with forward.encoder.captured("token") as looked_up:
            yield value
