"""A criterion of several backward passes, for tests: what FreeLB needs of the seam, and no more.

Paper: Zhu et al. (2020), algorithm 1: from a random start, K - 1 ascent steps and K passes of the loss, each with
1 / K of its weight; the gradient of the perturbation is a by-product of a pass's own backward.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.criterions import register_criterion
from torch import Tensor

from smart_fairseq.config.flags import AdversaryFlags, RegularizedConfig
from smart_fairseq.encoder import Encoder, Forward
from smart_fairseq.method.adversary import Adversary, norm, normalize
from smart_fairseq.method.dropout import RandomState
from smart_fairseq.method.noise import example_noise
from smart_fairseq.terms import Term, TermValue
from smart_fairseq.training.criterion import RegularizedCriterion

NAME = "k_passes_sentence_prediction"
L2 = Adversary(norm="l2")


# fairseq reads these annotations at run time: no `from __future__ import annotations` in this file
@dataclass
class KPassesConfig(RegularizedConfig, AdversaryFlags):
    test_passes: int = field(default=2, metadata={"help": "number of passes K"})


@register_criterion(NAME, dataclass=KPassesConfig)
class KPassesSentencePrediction(RegularizedCriterion):
    """The perturbation comes in as a term of value 0 around the clean pass, after the teacher's pass.

    --smart-noise-std: of its start; --smart-step-size: of an ascent step, in the l2 norm of an example.
    """

    def __init__(self, cfg: KPassesConfig, task: Any) -> None:
        super().__init__(cfg, task, weights={"passes": 1.0})
        self.num_passes = cfg.test_passes
        self.perturbations: list[Tensor] = []  # of the batch's passes so far

    def passes(self, model: Any, sample: Any) -> Generator[Any, None, None]:
        encoder: Encoder = self.encoder_for(model)
        tokens = sample["net_input"]["src_tokens"]
        mask, masks = encoder.mask(tokens), RandomState(tokens.device)
        noise = example_noise(sample["id"], tokens.shape[1], encoder.table.shape[1], seed=torch.initial_seed())
        perturbation = self.cfg.smart_noise_std * noise * mask
        self.perturbations = []
        total = 0
        for _ in range(self.num_passes):
            self.perturbations.append(perturbation.detach().requires_grad_())
            with masks.replayed():
                loss, size, log = self.forward(model, sample)
            total = total + log["loss"]
            yield loss / self.num_passes, size, {**log, "loss": total / self.num_passes}
            gradient = self.perturbations[-1].grad
            perturbation = perturbation + self.cfg.smart_step_size * normalize(gradient * mask, L2)

    @contextmanager
    def term(self, name: str, forward: Forward, sample: Any) -> Term:
        perturbation = self.perturbations[-1]
        with forward.encoder.perturbed(perturbation, self.place):
            yield lambda clean: TermValue(
                clean.new_zeros((), dtype=torch.float32), norm(perturbation.detach(), L2).sum()
            )


def registered() -> None:
    """For a process of its own: to import this file is all there is to do."""
