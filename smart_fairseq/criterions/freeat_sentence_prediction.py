"""`freeat_sentence_prediction`: m updates on each batch, whose backward passes move the perturbation on the way.

Paper: Shafahi et al. (2019), algorithm 1, on the embedding lookup. An update's cost is plain fine-tuning's; an epoch
has m times as many, so the authors train for 1 / m of the epochs. There a perturbation goes on to the next batch; here
sentences differ in length, and each batch begins at a random start, as in Zhu et al. (2020).

The perturbations are not in a checkpoint: a run that is resumed between two updates on a batch starts its ascent anew.
"""

from dataclasses import dataclass
from typing import Any

from fairseq.criterions import register_criterion
from torch import Tensor

from ..config.flags import RegularizedConfig
from ..encoder import Forward
from ..method.adversary import ascent_step
from ..terms.start import Drawn
from ..training.adversarial import AdversarialCriterion, ball_config
from ..training.batches import TASK
from ..training.repeat import repeat_batches

FreeATConfig = ball_config(
    "FreeATConfig", "freeat", __name__, "number of updates m on each batch, an ascent step between two"
)


@dataclass
class _Held:
    """The perturbation of a batch that is not yet through."""

    start: Drawn
    entering: Tensor  # a leaf, whose gradient an update's backward leaves
    update: int
    taken: int = 1  # updates


@register_criterion("freeat_sentence_prediction", dataclass=FreeATConfig)
class FreeATSentencePrediction(AdversarialCriterion):
    """The criterion; its flags are `FreeATConfig`."""

    name = "freeat"
    passes_before_ascent = 1

    def __init__(self, cfg: RegularizedConfig, task: Any) -> None:
        super().__init__(cfg, task)
        self.held: dict[tuple[int, ...], _Held] = {}  # the update's batches, by task and examples
        if self.ball.steps > 1:
            repeat_batches(task, cfg.smart_train_subset, self.ball.steps, cfg.smart_update_freq)

    def perturbation(self, forward: Forward, sample: dict[str, Any]) -> Tensor:
        key, update = (sample.get(TASK, 0), *sample["id"].tolist()), self.link.update_num
        held = self.held.get(key)
        if held is None or held.taken == self.ball.steps:
            self.held = {k: other for k, other in self.held.items() if other.update == update}
            start = self.start(forward, sample)
            entering = (start.noise * start.unit).detach().requires_grad_()
            held = self.held[key] = _Held(start, entering, update)
        else:
            point, gradient = held.entering.detach() / held.start.unit, held.entering.grad
            if gradient is not None:  # there is none of a batch that ran out of memory, which fairseq leaves out
                # of an update that overflowed in float16 nothing is learned
                point = ascent_step(point, gradient.nan_to_num(0, 0, 0), held.start.mask, self.adversary)
            held.entering = (point * held.start.unit).detach().requires_grad_()
            held.taken += 1
        self.delta = self.norms(held.entering / held.start.unit)
        return held.entering
