"""`smart_sentence_prediction`: fairseq's `sentence_prediction` plus the two terms of SMART.

Paper: Jiang et al. (2020), equation 1 and Algorithm 1:

    loss = task loss + smart_weight * R_s + bregman_weight * D_Breg
    R_s     divergence(output at the perturbed embeddings, clean output)
    D_Breg  divergence(clean output, teacher's output)
"""

import logging
from dataclasses import dataclass
from typing import Any, Dict, List

from fairseq.criterions import register_criterion
from fairseq.logging import metrics

from ..config.flags import AdversaryFlags, ByRecipe, RegularizedConfig, flag, with_recipe
from ..encoder import Encoder, Forward
from ..errors import require
from ..method.adversary import Adversary
from ..method.divergence import DIVERGENCES, squared_change, squared_change_of_classes, symmetric_kl_of_change
from ..method.ranking import of_groups
from ..terms import Term
from ..terms.precision import Form, FormOfTerm, choose_form, measure_place, working_precision
from ..terms.smoothness import Settings, smoothness
from ..training.checks import check_adversary, check_weight, divergence_name
from ..training.criterion import RegularizedCriterion

logger = logging.getLogger(__name__)

# of the training set, at which the form of the term is chosen
EXAMPLES = 32


# fairseq reads these annotations at run time: no `from __future__ import annotations` in this file
@dataclass
class SmartSentencePredictionConfig(RegularizedConfig, AdversaryFlags):
    smart_weight: ByRecipe = flag(None, "weight of the smoothness term; 0 switches it off")
    smart_every: int = flag(1, "approximation: the smoothness term at every n-th update alone, n times as heavy")


@register_criterion("smart_sentence_prediction", dataclass=SmartSentencePredictionConfig)
class SmartSentencePredictionCriterion(RegularizedCriterion):
    """The criterion; its flags are `SmartSentencePredictionConfig`."""

    def __init__(self, cfg: SmartSentencePredictionConfig, task: Any) -> None:
        given, cfg = cfg.smart_epsilon, with_recipe(cfg, "smart")
        weight = check_weight("--smart-weight", cfg.smart_weight)
        require(cfg.smart_every >= 1, "--smart-every", cfg.smart_every, "a whole number from 1")
        if 1 < (cfg.smart_max_update or 0) <= cfg.smart_every:
            logger.warning(
                f"--smart-every {cfg.smart_every} is no shorter than the run, {cfg.smart_max_update} updates: the term "
                "acts at its first update alone"
            )
        if given is not None and cfg.smart_projection == "normalize":
            logger.warning(
                f"--smart-epsilon {given:g} changes nothing with --smart-projection normalize, which brings every "
                "perturbation to the norm 1; leave it out, or give --smart-projection ball"
            )
        super().__init__(cfg, task, weights={"smart": weight}, every=cfg.smart_every)
        check_adversary(cfg, weight, all(objective.regression for objective in self.objectives))
        self.place = str(cfg.smart_embedding)
        self.divergences[False] = DIVERGENCES[divergence_name(cfg, regression=False)]
        self.adversary = Adversary(
            radius=cfg.smart_epsilon,
            step_size=cfg.smart_step_size,
            steps=cfg.smart_steps,
            norm=str(cfg.smart_norm),
            scope=str(cfg.smart_norm_scope),
            projection=str(cfg.smart_projection),
        )
        self.forms: Dict[str, Form] = {}  # of the term by the objective's name, once it is chosen

    @property
    def settings(self) -> Settings:
        """For the batch at hand: the divergences are those of its task, for a ranking of its groups."""
        cfg = self.cfg
        # kl and js have the symmetric KL's direction; their value of a change is not there
        of_classes = squared_change_of_classes if cfg.smart_divergence == "squared" else symmetric_kl_of_change
        of_change = squared_change if self.regression_target else of_classes
        return Settings(
            adversary=self.adversary,
            noise_std=cfg.smart_noise_std,
            relative=cfg.smart_epsilon_unit == "relative",
            dropout=str(cfg.smart_dropout),
            recompute=cfg.smart_recompute,
            divergence=self.divergence,
            divergence_of_change=of_change if self.groups is None else of_groups(of_change, self.groups, change=True),
        )

    def prepare(self, encoder: Encoder) -> str:
        if not self.weights["smart"]:
            return "SMART: smoothness term not at all, "
        words: Dict[str, List[str]] = {}
        for objective in self.objectives:
            self.judge_by(objective)
            words.setdefault(self.form_for(encoder, sample={}).in_words(), []).append(objective.name)
        said = [f"{form} ({', '.join(names)})" if words.keys() - {form} else form for form, names in words.items()]
        return f"SMART: smoothness term {'; '.join(said)}, "

    def form_for(self, encoder: Encoder, sample: Dict[str, Any]) -> Form:
        """The form of the term, chosen at the training set's first examples, which every worker has.

        ``sample`` stands in for them where no training set is loaded.
        """
        name = self.objective.name
        if name not in self.forms:
            data = self.objective.task.datasets.get(self.cfg.smart_train_subset)
            if data is not None:
                sample = data.collater([data[index] for index in range(min(len(data), EXAMPLES))])
            # of candidates an example has as many outputs as it has of these
            several = "candidates" in sample["net_input"]
            self.forms[name] = choose_form(
                self.cfg,
                encoder,
                measure_place(encoder, self.place, sample["net_input"]),
                sample["target"].shape[1] if several else self.objective.num_classes,
                working_precision(encoder, self.cfg.smart_amp),
            )
        return self.forms[name]

    def term(self, name: str, forward: Forward, sample: Dict[str, Any]) -> Term:
        return smoothness(self.settings, self.form_for(forward.encoder, sample), forward, sample)

    def forward(self, model: Any, sample: Dict[str, Any], reduce: bool = True) -> Any:
        result = super().forward(model, sample, reduce)
        if "smart_loss" in result[2]:
            result[2]["smart_form"] = result[1] * list(FormOfTerm).index(self.forms[self.objective.name].term)
        return result

    @classmethod
    def reduce_metrics(cls, logging_outputs: List[Dict[str, Any]]) -> None:
        super().reduce_metrics(logging_outputs)
        if any("smart_form" in log for log in logging_outputs):
            number, size = (sum(log.get(key, 0) for log in logging_outputs) for key in ("smart_form", "sample_size"))
            mean = float(number / size)
            # batches of several tasks may have different ones
            form = list(FormOfTerm)[round(mean)].value if mean.is_integer() else "several"
            metrics.log_derived("smart_form", lambda _: form)
