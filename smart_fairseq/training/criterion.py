"""A base for criteria that add terms to the loss of fairseq's `sentence_prediction`.

Per update, with sums over the batch's examples (fairseq divides by their number over all workers and accumulated
batches): loss = task loss + sum over the terms of weight * term. The task loss, its metrics and the whole of evaluation
are those of `sentence_prediction`, whose code runs unchanged; with every weight 0 so does training. The Bregman term
of ``--optimizer mbpp`` comes with the base.

A criterion says which terms it has, and makes them for a batch:

    @register_criterion("mine_sentence_prediction", dataclass=MineConfig)   # a RegularizedConfig
    class MineSentencePrediction(RegularizedCriterion):
        def __init__(self, cfg: MineConfig, task: Any) -> None:
            super().__init__(cfg, task, weights={"mine": cfg.mine_weight})

        def term(self, name: str, forward: Forward, sample: Any) -> Term:
            ...                                                             # see `smart_fairseq.terms`
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from fairseq.criterions.sentence_prediction import SentencePredictionConfig, SentencePredictionCriterion
from fairseq.optim.adam import FairseqAdamConfig
from torch import Tensor, nn

from ..config.flags import RegularizedConfig
from ..encoder import Encoder, Forward, encoder_of
from ..method.divergence import Divergence, squared_error, symmetric_kl
from ..method.loss import task_loss
from ..method.ranking import of_groups, ranking_loss
from ..optim.mbpp import MBPPConfig
from ..patches import cover_validation_sets
from ..terms import Term, TermValue
from ..terms.bregman import bregman
from ..terms.precision import working_precision
from . import checks
from .acting import Acting
from .batches import GROUPS, TASK
from .link import Result, TrainingLink
from .metrics import log_calibration, log_glue_metrics, log_terms, place_confidence, place_predictions
from .objective import Objective, judge_ranking, objectives_of, place_outputs, spread

logger = logging.getLogger(__name__)


class RegularizedCriterion(SentencePredictionCriterion):
    """The base; errors are `UsageError`s at construction or when the first epoch begins.

    Args:
        weights: the criterion's own terms by name; one with weight 0 is never computed.
        every: these terms are taken at every n-th update alone, n times as heavy.
        adversarial: the task loss is taken at a point of the criterion's choice, `perturbation`.
    """

    place = "token"  # that `term`'s forward perturbs

    def __init__(
        self,
        cfg: RegularizedConfig,
        task: Any,
        weights: Mapping[str, float],
        every: int = 1,
        adversarial: bool = False,
    ) -> None:
        super().__init__(cfg, task)
        checks.check_classes(task)
        self.cfg = cfg
        self.adversarial = adversarial
        self.weights = {**weights, "bregman": checks.bregman_weight(cfg)}
        self.every = every
        self.divergences: dict[bool, Divergence] = {True: squared_error, False: symmetric_kl}  # l_s, by regression
        self.objectives = objectives_of(task, cfg)
        self.groups: Tensor | None = None  # of the batch, if it is of a ranking
        self._rows = 0
        self.judge_by(self.objectives[0])
        checks.check_surroundings(cfg, self.objective, self.regularized)
        self._encoder: Encoder | None = None
        self._checked = self._warned = False
        self.link = TrainingLink(on_epoch=self._check_before_training)
        self.link.listen(task)
        warmup = int(getattr(cfg.smart_lr_scheduler, "warmup_updates", 0) or 0)
        self.acting = Acting(after=warmup, every=every)
        cover_validation_sets(task, cfg.smart_train_subset)

    # --- what a batch is judged by ----------------------------------------------------------------

    def judge_by(self, objective: Objective) -> None:
        """Judge what comes by this objective."""
        self.objective = objective
        self.classification_head_name = objective.head
        self.regression_target = objective.regression
        self.label_dict = objective.task.label_dictionary

    def _turn_to_task_of(self, sample: dict[str, Any]) -> None:
        if TASK in sample:
            self.judge_by(self.objectives[sample[TASK]])
        self.groups, self._rows = sample.get(GROUPS), len(sample.get("id", ()))

    @property
    def divergence(self) -> Divergence:
        """l_s for the batch's task; for a ranking, of its groups."""
        divergence = self.divergences[self.regression_target]
        return divergence if self.groups is None else of_groups(divergence, self.groups)

    def task_losses(self, outputs: Tensor, sample: dict[str, Any]) -> Tensor:
        """The task loss of each example of the batch, for a ranking of each group; outputs [B, K]."""
        targets = sample["target"].view(-1)
        return task_loss(outputs, targets) if self.groups is None else ranking_loss(outputs, targets, self.groups)

    # --- what a criterion adds --------------------------------------------------------------------

    @property
    def examples_of_a_row(self) -> float:
        """1, but in a batch of a ranking, where a group of rows is an example."""
        return 1.0 if self.groups is None else len(self.groups) / self._rows

    def term(self, name: str, forward: Forward, sample: dict[str, Any]) -> Term:
        """The term ``name`` of ``weights`` for one batch."""
        raise NotImplementedError

    def perturbation(self, forward: Forward, sample: dict[str, Any]) -> Tensor:
        """With ``adversarial``: what is added to the embeddings for the task loss of one batch, [B, T, C] float32."""
        raise NotImplementedError

    def log_adversary(self, log: dict[str, Any]) -> dict[str, Tensor]:
        """With ``adversarial``: log the perturbation; by the method's name, what it adds to the task loss, if known."""
        raise NotImplementedError

    def prepare(self, encoder: Encoder) -> str:
        """What the start of the log says of this criterion with this model; may raise `UsageError`."""
        return ""

    @property
    def regularized(self) -> bool:
        """Whether training differs from that of `sentence_prediction`."""
        return self.adversarial or any(self.weights.values())

    # --- before training --------------------------------------------------------------------------

    def encoder_for(self, model: Any) -> Encoder:
        """The encoder object, built once for a model."""
        if self._encoder is None or (model is not self._encoder.given and model is not self._encoder.model):
            self._encoder = encoder_of(model)
        return self._encoder

    def _check_before_training(self, model: nn.Module) -> None:
        if self._checked:
            return
        checks.check_start(self.cfg, self.task.cfg, self.objectives)
        for objective in self.objectives:
            if objective.judge is None:  # otherwise its own data set has looked
                checks.check_labels(self.cfg, objective.task, objective.regression)
        checks.check_workers(self.cfg, self.encoder_for(model), self.objectives)
        checks.check_best_metric(self.cfg, self.cfg.smart_best_metric, self.objectives)
        if self.adversarial or any(weight for name, weight in self.weights.items() if name != "bregman"):
            checks.check_model(self.encoder_for(model))
        words = self.prepare(self.encoder_for(model))
        self._checked = True
        logger.info(f"{words}Bregman weight {self.weights['bregman']:g}; {self._flags()}")

    def _flags(self) -> str:
        """What is on, in the flags' own words; for the start of the log."""
        configs = [(self.cfg, getattr(type(self), "__dataclass"))]
        if self.weights["bregman"]:
            configs.append((self.cfg.smart_optimizer, MBPPConfig))
        inherited = {f.name for base in (SentencePredictionConfig, FairseqAdamConfig) for f in fields(base)}
        return " ".join(
            f"--{f.name.replace('_', '-')} {getattr(values, f.name)}"
            for values, config in configs
            for f in fields(config)
            if f.name not in inherited and "help" in f.metadata and getattr(values, f.name) is not None
        )

    # --- each batch -------------------------------------------------------------------------------

    def forward(self, model: Any, sample: dict[str, Any], reduce: bool = True) -> Result:
        """Loss (sum over the batch), number of examples, log entries; as `sentence_prediction` returns them."""
        self._turn_to_task_of(sample)
        if not model.training or not self.regularized:
            result = self._evaluate(model, sample, reduce)
        else:
            result = self._train(model, sample, reduce)
        if TASK in sample:
            spread(result[2], sample[TASK], len(self.objectives))
        return result

    def _evaluate(self, model: Any, sample: dict[str, Any], reduce: bool) -> Result:
        if model.training:  # without a term
            return self._of_task(model, sample, reduce)
        with _output_of(self.encoder_for(model).model) as output:
            result = self._of_task(self._evaluated(model), sample, reduce)
        place_predictions(result[2], sample["id"], self.task)
        if TASK in sample:
            place_outputs(result[2], output[0], sample, self.objectives)
        elif self.cfg.smart_report_calibration:
            place_confidence(result[2], output[0], sample, self.task)
        return result

    def _of_task(self, model: Any, sample: dict[str, Any], reduce: bool) -> Result:
        """The task loss alone: that of `sentence_prediction`, or of rankings, which it does not know."""
        if self.objective.judge is not None:
            return self.objective.judge(model, sample)
        if self.groups is None:
            return super().forward(model, sample, reduce)  # type: ignore[no-any-return]
        inputs = {**sample["net_input"], "features_only": True}
        return judge_ranking(model(**inputs, classification_head_name=self.classification_head_name)[0], sample)

    def _train(self, model: Any, sample: dict[str, Any], reduce: bool) -> Result:
        forward = self.forward_of(model, sample)
        encoder = forward.encoder
        weights = {name: weight for name in self.weights if (weight := self.weight_now(name))}
        with encoder.lean(), contextlib.ExitStack() as around:
            perturbation = self.perturbation(forward, sample) if self.adversarial else None
            # what needs nothing of the clean pass comes before it; the teacher leaves no graph behind
            values = {
                name: around.enter_context(self._term(name, forward, sample, perturbation))
                for name in sorted(weights, key=lambda name: name != "bregman")
            }
            if perturbation is not None:
                around.enter_context(encoder.perturbed(perturbation, self.place))
            output = around.enter_context(_output_of(model))
            loss, sample_size, log = self._of_task(model, sample, reduce)
        log["task_loss"] = log["loss"]
        with encoder.lean():
            found = {name: values[name](output[0]) for name in weights}
        if found:
            loss = self._add(loss, found, weights, log, working_precision(encoder, self.cfg.smart_amp))
        shares = {name: weights[name] * log[f"{name}_loss"] for name in found}
        if self.adversarial:
            shares |= self.log_adversary(log)
        self.acting.note(self.link.update_num, log["task_loss"].detach(), shares)
        log["loss"] = loss.detach()
        return loss, sample_size, log

    def forward_of(self, model: Any, sample: dict[str, Any]) -> Forward:
        """The classification forward of a batch."""
        self._turn_to_task_of(sample)
        head = self.classification_head_name
        return Forward(self.encoder_for(model), model, sample["net_input"], head, self.place)

    def weight_now(self, name: str) -> float:
        """The term's weight at this update."""
        every = 1 if name == "bregman" else self.every
        return self.weights[name] * every if self.link.update_num % every == 0 else 0.0

    def _term(self, name: str, forward: Forward, sample: dict[str, Any], perturbation: Tensor | None) -> Term:
        if name == "bregman":
            return bregman(forward, self.link.weights(forward.encoder.model), self.divergence, perturbation)
        return self.term(name, forward, sample)

    def _add(
        self,
        loss: Tensor,
        terms: Mapping[str, TermValue],
        weights: Mapping[str, float],
        log: dict[str, Any],
        dtype: torch.dtype,
    ) -> Tensor:
        """The loss with the terms, which are logged; one that is not finite is left out.

        Not so in float16, where fairseq's loss scaling finds the overflow in the gradients and every worker skips
        the update.
        """
        # the step's one wait for the device
        finite = torch.stack([term.value.detach() for term in terms.values()]).isfinite().tolist()
        for (name, term), good in zip(terms.items(), finite):
            # the same keys on every worker, whatever happened
            log[f"{name}_loss"] = term.value.detach() if good else torch.zeros_like(term.value)
            log[f"{name}_dropped"] = int(not good)
            if term.size is not None:
                log[f"{name}_delta"] = term.size * self.examples_of_a_row
            if good:
                loss = loss + weights[name] * term.value
                if term.beside is not None:
                    loss = loss + term.beside
            elif dtype == torch.float16:
                logger.warning(f"{name}_loss is not finite: its pass overflowed in float16, so this update is skipped")
                loss = loss * math.nan
        return loss

    # --- evaluation -------------------------------------------------------------------------------

    def _evaluated(self, model: Any) -> Any:
        """What validation runs on: the model, or the teacher's weights in it."""
        if self.cfg.smart_validate_with != "teacher":
            return model
        if self.link.connected:
            encoder = self.encoder_for(model)
            return encoder.under(self.link.weights(encoder.model))
        if not self._warned:  # fairseq-validate, which has no optimizer
            logger.warning(
                "--smart-validate-with teacher: there is no optimizer here, so the model's own weights are "
                "evaluated; for the teacher's: python -m smart_fairseq.export CHECKPOINT OUT.pt --teacher"
            )
        self._warned = True
        return model

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Those of `sentence_prediction`, and while training the terms."""
        SentencePredictionCriterion.reduce_metrics(logging_outputs)
        log_glue_metrics(logging_outputs)
        log_calibration(logging_outputs)
        log_terms(logging_outputs)


@contextmanager
def _output_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """The logits that the block's forward of ``model`` returns: `sentence_prediction` keeps them to itself."""
    logits: list[Tensor] = []
    with model.register_forward_hook(lambda module, args, output: logits.append(output[0])):
        yield logits
