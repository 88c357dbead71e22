"""`smart_sentence_prediction`: fairseq's `sentence_prediction` plus the two terms of SMART.

Paper: Jiang et al. (2020), equation 1 and Algorithm 1. Per update, with sums over the batch's examples
(fairseq divides by their number over all workers and accumulated batches):

    loss = task loss + smart_weight * R_s + bregman_weight * D_Breg
    R_s     divergence(output at the perturbed embeddings, clean output)
    D_Breg  divergence(clean output, teacher's output)

The task loss, its metrics and the whole of evaluation are those of `sentence_prediction`, whose code runs
unchanged; with both weights 0 so does training.
"""

import contextlib
import logging
import math
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.sentence_prediction import SentencePredictionConfig, SentencePredictionCriterion
from fairseq.dataclass import ChoiceEnum
from fairseq.logging import metrics
from omegaconf import II
from torch import Tensor, nn

from ..forms import Form, choose_form, divergence_name, working_precision
from ..glue_metrics import cover_validation_sets, log_glue_metrics, place_predictions
from ..method.adversary import Adversary
from ..method.divergence import (
    DIVERGENCES,
    squared_change,
    squared_change_of_classes,
    squared_error,
    symmetric_kl_of_change,
)
from ..method.dropout import without_dropout
from ..method.reuse import PerturbationMemory
from ..optim.mbpp import MBPPConfig
from ..perturb import Forward, Substitute
from ..smoothness import Settings, smoothness_term
from ..teacher_link import TeacherLink
from ..training_checks import (
    bregman_weight,
    check_best_metric,
    check_flags,
    check_labels,
    check_model,
    check_restore_file,
)

logger = logging.getLogger(__name__)


# fairseq reads these annotations at run time: no `from __future__ import annotations` in this file
@dataclass
class SmartSentencePredictionConfig(SentencePredictionConfig):
    smart_weight: float = field(
        default=1.0,
        metadata={"help": "weight of the smoothness term; 0 switches it off"},
    )
    smart_epsilon: float = field(
        default=1e-5,
        metadata={"help": "radius of the ball around the embeddings (with --smart-projection ball)"},
    )
    smart_noise_std: float = field(
        default=1e-5,
        metadata={"help": "standard deviation of the noise that the perturbation starts from"},
    )
    smart_step_size: float = field(
        default=1e-3,
        metadata={"help": "length of an ascent step along the normalised gradient"},
    )
    smart_steps: int = field(
        default=1,
        metadata={"help": "number of ascent steps"},
    )
    smart_norm: ChoiceEnum(["inf", "l2"]) = field(  # type: ignore[valid-type]
        default="inf",
        metadata={"help": "norm of the ball and of the gradient's normalisation"},
    )
    smart_norm_scope: ChoiceEnum(["example", "token"]) = field(  # type: ignore[valid-type]
        default="example",
        metadata={"help": "what a norm is taken over: the tokens of an example together, or each token"},
    )
    smart_projection: ChoiceEnum(["ball", "normalize"]) = field(  # type: ignore[valid-type]
        default="ball",
        metadata={
            "help": "after a step: project onto the ball (the paper), or divide by the norm (the authors' release)"
        },
    )
    smart_embedding: ChoiceEnum(["token", "input"]) = field(  # type: ignore[valid-type]
        default="token",
        metadata={"help": "what is perturbed: the embedding lookup, or what enters the first layer"},
    )
    smart_dropout: ChoiceEnum(["shared", "independent", "off"]) = field(  # type: ignore[valid-type]
        default="shared",
        metadata={
            "help": "dropout masks of the perturbed pass: the clean pass's, fresh ones, or none in either pass "
            "of the smoothness term (one more forward)"
        },
    )
    smart_divergence: ChoiceEnum(["auto", "sym_kl", "kl", "js", "squared"]) = field(  # type: ignore[valid-type]
        default="auto",
        metadata={"help": "divergence between outputs; auto: sym_kl for classes, squared for --regression-target"},
    )
    smart_mode: ChoiceEnum(["auto", "finite", "tangent"]) = field(  # type: ignore[valid-type]
        default="auto",
        metadata={
            "help": "how the term is computed: finite, at the perturbed point; tangent, to first order; auto: finite, "
            "and tangent where the radius is below what the precision resolves"
        },
    )
    smart_recompute: bool = field(
        default=False,
        metadata={
            "help": "save memory: keep no activations of the clean pass while the perturbed pass's are held "
            "(one or two more forwards)"
        },
    )
    smart_every: int = field(
        default=1,
        metadata={"help": "approximation: the smoothness term at every n-th update alone, n times as heavy"},
    )
    smart_bregman_every: int = field(
        default=1,
        metadata={"help": "approximation: the Bregman term at every n-th update alone, n times as heavy"},
    )
    smart_reuse: bool = field(
        default=False,
        metadata={
            "help": "approximation: the perturbation is the example's last one, moved along the gradient that training "
            "took anyway, instead of one found anew (an example's first is found)"
        },
    )
    smart_search_layers: Optional[int] = field(
        default=None,
        metadata={
            "help": "approximation: the ascent runs through the first N layers, and takes the others to first order "
            "from the clean pass; 0: no forward of its own at all; not set: through all"
        },
    )
    smart_bregman_weight: Optional[float] = field(
        default=None,
        metadata={"help": "weight of the Bregman term; not set: 1 with --optimizer mbpp, otherwise 0"},
    )
    smart_validate_with: ChoiceEnum(["student", "teacher"]) = field(  # type: ignore[valid-type]
        default="student",
        metadata={
            "help": "whose weights validation runs under: the model's, or the teacher's of --optimizer mbpp "
            "(fairseq-validate: always the model's)"
        },
    )
    # what the checks need to see; bare interpolations, so that they do not become flags
    smart_optimizer: Any = II("optimizer")  # all of it: fairseq-validate has none, and so no name in it
    smart_restore_file: str = II("checkpoint.restore_file")
    smart_best_metric: str = II("checkpoint.best_checkpoint_metric")
    smart_train_subset: str = II("dataset.train_subset")
    smart_save_dir: str = II("checkpoint.save_dir")
    smart_amp: bool = II("common.amp")
    smart_ddp_backend: str = II("distributed_training.ddp_backend")


@register_criterion("smart_sentence_prediction", dataclass=SmartSentencePredictionConfig)
class SmartSentencePredictionCriterion(SentencePredictionCriterion):
    """The criterion; its flags are `SmartSentencePredictionConfig`, errors are `UsageError`s at construction
    or when the first epoch begins."""

    def __init__(self, cfg: SmartSentencePredictionConfig, task: Any) -> None:
        super().__init__(cfg, task)
        self.cfg = cfg
        self.smart_weight = cfg.smart_weight
        self.bregman_weight = bregman_weight(cfg)
        check_flags(cfg, task)
        adversary = Adversary(
            radius=cfg.smart_epsilon,
            step_size=cfg.smart_step_size,
            steps=cfg.smart_steps,
            norm=str(cfg.smart_norm),
            scope=str(cfg.smart_norm_scope),
            projection=str(cfg.smart_projection),
        )
        # kl and js have the symmetric KL's direction; their value of a change is not there
        of_classes = squared_change_of_classes if cfg.smart_divergence == "squared" else symmetric_kl_of_change
        self.smoothness = Settings(
            cfg=cfg,
            num_classes=task.cfg.num_classes,
            adversary=adversary,
            divergence=squared_error if cfg.regression_target else DIVERGENCES[divergence_name(cfg)],
            divergence_of_change=squared_change if cfg.regression_target else of_classes,
            memory=PerturbationMemory(adversary) if cfg.smart_reuse else None,
        )
        self._form: Optional[Form] = None  # of the term, once the model is known
        self._checked = self._warned = False
        self.teacher = TeacherLink(on_epoch=self._check_before_training)
        self.teacher.listen(task)
        cover_validation_sets(task, cfg.smart_train_subset)

    def _check_before_training(self, model: nn.Module) -> None:
        if self._checked:
            return
        check_restore_file(self.cfg.smart_restore_file, self.cfg.smart_save_dir)
        check_labels(self.task, self.regression_target)
        check_best_metric(self.cfg, self.cfg.smart_best_metric)
        if self.smart_weight:
            check_model(model)
            self._form_for(model)
        self._checked = True
        logger.info(self._in_words())

    def _in_words(self) -> str:
        """What is on, in the flags' own words; for the start of the log."""

        def flags(config: Any, values: Any, prefix: str) -> str:
            names = [f.name for f in fields(config) if f.name.startswith(prefix) and "help" in f.metadata]
            return " ".join(f"--{name.replace('_', '-')} {getattr(values, name)}" for name in names)

        form = self._form.in_words() if self._form else "not at all"
        text = f"SMART: smoothness term {form}, Bregman weight {self.bregman_weight:g}; "
        text += flags(SmartSentencePredictionConfig, self.cfg, "smart_")
        if self.bregman_weight:
            text += " " + flags(MBPPConfig, self.cfg.smart_optimizer, "mbpp_")
        return text

    def forward(self, model: nn.Module, sample: Dict[str, Any], reduce: bool = True) -> Any:
        """Loss (sum over the batch), number of examples, log entries; as `sentence_prediction` returns them."""
        if not model.training or not (self.smart_weight or self.bregman_weight):
            result = super().forward(self._evaluated(model), sample, reduce)
            place_predictions(result[2], sample["id"], self.task)
            return result

        smart_weight = self._weight_now(self.smart_weight, self.cfg.smart_every)
        teacher_weight = self._weight_now(self.bregman_weight, self.cfg.smart_bregman_every)
        forward = Forward(model, sample["net_input"], self.classification_head_name, str(self.cfg.smart_embedding))
        # what needs nothing of the clean pass comes before it, while there are no activations to keep
        target = self._teacher_output(forward) if teacher_weight else None
        term = smoothness_term(self.smoothness, self._form_for(model), forward, sample) if smart_weight else None
        with term.clean_pass() if term else contextlib.nullcontext(), _output_of(model) as output:
            loss, sample_size, log = super().forward(model, sample, reduce)
        clean = output[0]
        log["task_loss"] = log["loss"]

        terms = []
        if term:
            terms.append(("smart", smart_weight, term.value(clean)))
            log["smart_delta"] = term.sizes()
            log["smart_noise"] = term.noise_floor(clean)
            log["smart_square"] = sample_size * self.smoothness.adversary.size**2
        if target is not None:
            terms.append(("bregman", teacher_weight, self.smoothness.divergence(clean, target).sum()))

        if terms:
            loss = self._add(loss, terms, log, working_precision(self.cfg, model))
        log["loss"] = loss.detach()
        return loss, sample_size, log

    def _weight_now(self, weight: float, every: int) -> float:
        """The term's weight at this update."""
        return weight * every if self.teacher.update_num % every == 0 else 0.0

    def _add(
        self, loss: Tensor, terms: List[Tuple[str, float, Tensor]], log: Dict[str, Any], dtype: torch.dtype
    ) -> Tensor:
        """The loss with the terms (name, weight, value), which are logged; one that is not finite is left out.

        Not so in float16, where fairseq's loss scaling finds the overflow in the gradients and every worker skips
        the update.
        """
        # the step's one wait for the device
        finite = torch.stack([term.detach() for _, _, term in terms]).isfinite().tolist()
        for (name, weight, term), good in zip(terms, finite):
            # the same keys on every worker, whatever happened
            log[f"{name}_loss"] = term.detach() if good else torch.zeros_like(term)
            log[f"{name}_dropped"] = int(not good)
            if good:
                loss = loss + weight * term
            elif dtype == torch.float16:
                logger.warning(f"{name}_loss is not finite: its pass overflowed in float16, so this update is skipped")
                loss = loss * math.nan
        return loss

    def _evaluated(self, model: nn.Module) -> Any:
        """What a pass without regularisers runs on: the model, or to validate the teacher's weights in it."""
        if model.training or self.cfg.smart_validate_with != "teacher":
            return model
        if not self.teacher.connected:  # fairseq-validate, which has no optimizer
            if not self._warned:
                logger.warning(
                    "--smart-validate-with teacher: there is no optimizer here, so the model's own weights are "
                    "evaluated; for the teacher's: python -m smart_fairseq.export CHECKPOINT OUT.pt --teacher"
                )
            self._warned = True
            return model
        return Substitute(model, self.teacher.weights(model))

    def _form_for(self, model: nn.Module) -> Form:
        if self._form is None:
            self._form = choose_form(self.cfg, model, self.task.cfg.num_classes)
        return self._form

    def _teacher_output(self, forward: Forward) -> Tensor:
        """The teacher's logits [B, K], without dropout and without gradients."""
        with torch.no_grad(), without_dropout(forward.model):
            return forward(self.teacher.weights(forward.model))

    @staticmethod
    def reduce_metrics(logging_outputs: List[Dict[str, Any]]) -> None:
        """Those of `sentence_prediction`, and while training the terms in nats per example, unweighted."""
        SentencePredictionCriterion.reduce_metrics(logging_outputs)
        log_glue_metrics(logging_outputs)
        sample_size = sum(log.get("sample_size", 0) for log in logging_outputs)
        logged = logging_outputs[0] if logging_outputs else {}
        shown = ("task_loss", "smart_loss", "bregman_loss", "smart_delta")
        for key in (*shown, "smart_noise", "smart_square"):
            if key in logged:
                total = sum(log.get(key, 0) for log in logging_outputs)
                # the meter that is saved and averaged is hidden; what is printed keeps significant digits
                metrics.log_scalar("_" + key, total / sample_size, sample_size)
                if key in shown:
                    metrics.log_derived(key, lambda meters, key=key: _significant(meters["_" + key].avg))
        if "smart_noise" in logged:
            for key, of in (("smart_sensitivity", "_smart_square"), ("smart_signal", "_smart_noise")):
                metrics.log_derived(key, lambda meters, of=of: _ratio(meters["_smart_loss"].avg, meters[of].avg))
        for key in ("smart_dropped", "bregman_dropped"):
            dropped = sum(log.get(key, 0) for log in logging_outputs)
            if dropped:
                metrics.log_scalar_sum(key, int(dropped), round=0)


def _significant(value: Any, digits: int = 3) -> Any:
    """A number rounded to significant digits, so that 1.3e-06 is not printed as 0; "-" where there is none."""
    if value is None:  # no update of the interval had the term (--smart-every)
        return "-"
    return float(f"{float(value):.{digits - 1}e}")


def _ratio(value: Any, reference: Any) -> Any:
    if value is None or reference is None:
        return "-"
    return _significant(float(value) / float(reference)) if float(reference) else math.nan


@contextmanager
def _output_of(model: nn.Module) -> Iterator[List[Tensor]]:
    """The logits that the block's forward of ``model`` returns: `sentence_prediction` keeps them to itself."""
    logits: List[Tensor] = []
    handle = model.register_forward_hook(lambda module, args, output: logits.append(output[0]))
    try:
        yield logits
    finally:
        handle.remove()
