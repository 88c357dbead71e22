"""`freelb_sentence_prediction`: adversarial training that updates with the gradients of all its ascent steps.

Paper: Zhu et al. (2020), algorithm 1: from a random start, K passes of the loss, each with 1 / K of its weight; an
ascent step, by the gradient that a pass's own backward leaves, between two. One graph is in memory at a time.

In the authors' code ``--adv-steps K`` takes K + 1 passes; the recipes count passes, as the paper does.
"""

from collections.abc import Generator
from contextlib import nullcontext
from typing import Any, cast

import torch
from fairseq.criterions import register_criterion
from torch import Tensor

from ..config.flags import RegularizedConfig
from ..encoder import Forward
from ..method.adversary import ascent_step
from ..method.dropout import RandomState
from ..training.adversarial import AdversarialCriterion, ball_config
from ..training.link import Result

FreeLBConfig = ball_config(
    "FreeLBConfig", "freelb", __name__, "number of passes K, of which one more than of ascent steps"
)


@register_criterion("freelb_sentence_prediction", dataclass=FreeLBConfig)
class FreeLBSentencePrediction(AdversarialCriterion):
    """The criterion; its flags are `FreeLBConfig`."""

    name = "freelb"
    passes_before_ascent = 1

    def __init__(self, cfg: RegularizedConfig, task: Any) -> None:
        super().__init__(cfg, task)
        self.num_passes = self.ball.steps if self.adversarial else 1
        self.entering: Tensor | None = None  # what the pass that is next is perturbed by

    def passes(self, model: Any, sample: dict[str, Any]) -> Generator[Result]:
        if not self.adversarial:
            yield self.forward(model, sample)
            return
        start = self.start(self.forward_of(model, sample), sample)
        point, masks, total = start.noise, RandomState(start.mask.device), torch.zeros(())
        self.before = None
        try:
            for number in range(self.num_passes):
                self.entering, self.delta = (point * start.unit).detach().requires_grad_(), self.norms(point)
                # the last pass leaves the generators behind its masks, so that the next batch has others
                with masks.replayed() if number + 1 < self.num_passes else nullcontext():
                    loss, size, log = self.forward(model, sample)
                if number == 0:
                    self.before = log["task_loss"].detach()
                total = log["loss"] + total
                yield loss / self.num_passes, size, {**log, "loss": total / self.num_passes}
                gradient = cast(Tensor, self.entering.grad)
                point = ascent_step(point, gradient, start.mask, self.adversary)
        finally:  # the driver closes this where it yielded last
            self.entering = None

    def perturbation(self, forward: Forward, sample: dict[str, Any]) -> Tensor:
        if self.entering is None:
            raise RuntimeError("FreeLB takes its passes through the task's train_step, not by a call of its own")
        return self.entering
