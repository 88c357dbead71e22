"""`pgd_sentence_prediction`: adversarial training, the task loss at the worst point of a ball around the embeddings.

Paper: Madry et al. (2018), equation 2.1, min_theta E[max_{|d| <= epsilon} L(theta, x + d, y)], the inner maximum by K
steps of projected gradient ascent (section 2.1), on the embedding lookup as Zhu et al. (2020) have it.
"""

from typing import Any

from fairseq.criterions import register_criterion
from torch import Tensor

from ..encoder import Forward
from ..method.adversary import ascend, gradient_of
from ..method.dropout import RandomState
from ..training.adversarial import AdversarialCriterion, ball_config

PGDConfig = ball_config("PGDConfig", "pgd", __name__, "number of ascent steps K")


@register_criterion("pgd_sentence_prediction", dataclass=PGDConfig)
class PGDSentencePrediction(AdversarialCriterion):
    """The criterion; its flags are `PGDConfig`."""

    name = "pgd"

    def perturbation(self, forward: Forward, sample: dict[str, Any]) -> Tensor:
        start, weights = self.start(forward, sample), forward.encoder.frozen_weights()
        masks = RandomState(start.mask.device)
        seen: list[Tensor] = []

        def logits_fn(point: Tensor) -> Tensor:
            with masks.replayed():
                return forward(weights, point * start.unit)

        def loss(outputs: Tensor) -> Tensor:
            losses = self.task_losses(outputs, sample)
            seen.append(losses.detach().sum())
            return losses

        point = ascend(gradient_of(logits_fn, loss), start.noise, start.mask, self.adversary)
        self.delta, self.before = self.norms(point), seen[0]
        return point * start.unit
