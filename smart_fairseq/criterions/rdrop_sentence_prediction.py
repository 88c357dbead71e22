"""`rdrop_sentence_prediction`: two dropout masks must give the same output.

Paper: Liang et al. (2021), equations 1 to 4 and algorithm 1, divided by 2 so that a single mask gives plain
fine-tuning: the mean of both passes' task losses + alpha / 2 * (KL(P1, P2) + KL(P2, P1)) / 2. For a regression, which
the paper leaves open, the squared difference in the place of the mean of both KL.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fairseq.criterions import register_criterion
from torch import Tensor

from ..encoder import Forward
from ..method.loss import task_loss
from ..terms import TermValue
from ..training.checks import check_weight
from ..training.criterion import RegularizedCriterion
from ..training.flags import RegularizedConfig


# fairseq reads these annotations at run time: no `from __future__ import annotations` in this file
@dataclass
class RDropConfig(RegularizedConfig):
    rdrop_weight: float = field(
        default=1.0,
        metadata={"help": "the paper's alpha, 1 to 5 there; 0 switches the second pass off as well"},
    )


@register_criterion("rdrop_sentence_prediction", dataclass=RDropConfig)
class RDropSentencePrediction(RegularizedCriterion):
    """The criterion; its flags are `RDropConfig`."""

    def __init__(self, cfg: RDropConfig, task: Any) -> None:
        super().__init__(cfg, task, weights={"rdrop": check_weight("--rdrop-weight", cfg.rdrop_weight) / 2})

    @contextmanager
    def term(self, name: str, forward: Forward, sample: dict[str, Any]) -> Iterator[Callable[[Tensor], TermValue]]:
        targets = sample["target"].view(-1)

        def value(clean: Tensor) -> TermValue:
            second = forward()
            change = self.divergence(clean, second).sum()
            mean = change if self.regression_target else change / 2
            beside = (task_loss(second, targets) - task_loss(clean, targets)).sum() / 2
            return TermValue(mean, beside=beside)

        yield value
