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
from typing import Any, ContextManager, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.sentence_prediction import SentencePredictionConfig, SentencePredictionCriterion
from fairseq.dataclass import ChoiceEnum
from fairseq.logging import metrics
from omegaconf import II
from torch import Tensor, nn

from ..errors import NOT_SHARDED, UsageError, require
from ..glue_metrics import cover_validation_sets, log_glue_metrics, place_predictions
from ..method.adversary import (
    Adversary,
    GradientFn,
    ascend,
    find_perturbation,
    gradient_by_change,
    gradient_of,
    gradient_to_first_order,
    linearized,
    norm,
)
from ..method.divergence import (
    DIVERGENCES,
    squared_change,
    squared_change_of_classes,
    squared_error,
    symmetric_kl_of_change,
)
from ..method.dropout import RandomState, without_dropout
from ..method.noise import example_noise
from ..method.reuse import PerturbationMemory
from ..optim.mbpp import MBPPConfig
from ..perturb import (
    Forward,
    Substitute,
    captured,
    changed,
    embedding_weight,
    layer_count,
    recomputed,
    token_mask,
    without_gelu_outputs,
)
from ..teacher_link import TeacherLink
from ..training_checks import check_best_metric, check_labels, check_model, check_restore_file, resolution

logger = logging.getLogger(__name__)

# the forms of the smoothness term, as the log has them
TWO_FORWARDS = "by two forwards"
CARRIED_CHANGE = "by the change that a forward carries along"  # the same value, without the rounding
FIRST_ORDER = "to first order (tangent)"


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
            "(one more forward)"
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
        self.bregman_weight = _bregman_weight(cfg)
        _check_flags(cfg, task)
        self.adversary = Adversary(
            radius=cfg.smart_epsilon,
            step_size=cfg.smart_step_size,
            steps=cfg.smart_steps,
            norm=str(cfg.smart_norm),
            scope=str(cfg.smart_norm_scope),
            projection=str(cfg.smart_projection),
        )
        self.divergence = squared_error if cfg.regression_target else DIVERGENCES[_divergence_name(cfg)]
        # kl and js have the symmetric KL's direction; their value of a change is not there
        of_classes = squared_change_of_classes if cfg.smart_divergence == "squared" else symmetric_kl_of_change
        self.divergence_of_change = squared_change if cfg.regression_target else of_classes
        # the size at which the change of the output is taken; the divergence is of that change times the size
        self.size = cfg.smart_epsilon if cfg.smart_projection == "ball" else 1.0
        self.memory = PerturbationMemory(self.adversary) if cfg.smart_reuse else None
        self._form: Optional[str] = None  # of the term, once the model is known
        self._resolved = 0.0  # the least entry of a perturbation that the working precision resolves
        self._first_order_below = 0.0  # noise from which it costs no digits of the term that two forwards have
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
            self._choose_form(model)
        self._checked = True
        logger.info(self._in_words())

    def _in_words(self) -> str:
        """What is on, in the flags' own words; for the start of the log."""

        def flags(config: Any, values: Any, prefix: str) -> str:
            names = [f.name for f in fields(config) if f.name.startswith(prefix) and "help" in f.metadata]
            return " ".join(f"--{name.replace('_', '-')} {getattr(values, name)}" for name in names)

        form = self._form or "not at all"
        if self._form == TWO_FORWARDS and self._starts_to_first_order():
            form += ", the first ascent step to first order"
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
        bregman_weight = self._weight_now(self.bregman_weight, self.cfg.smart_bregman_every)
        masks = RandomState(sample["net_input"]["src_tokens"].device)
        forward = Forward(model, sample["net_input"], self.classification_head_name, str(self.cfg.smart_embedding))
        carried = smart_weight > 0 and self._choose_form(model) != TWO_FORWARDS
        # what needs nothing of the clean pass comes before it, while there are no activations to keep
        target = self._teacher_output(forward) if bregman_weight else None
        start = self._start(forward, sample, masks) if smart_weight else None
        with contextlib.ExitStack() as passes:
            if start is not None and carried:
                size = self.size if self._form == CARRIED_CHANGE else 0.0
                gradient_fn = self._gradient_of_change(forward, masks) if size else self._first_order(forward, masks)
                perturbation = ascend(gradient_fn, start.noise, start.mask, self.adversary)
                change = passes.enter_context(changed(model, perturbation / self.size, forward.place, size))
            elif start is not None:
                passes.enter_context(recomputed(model) if self.cfg.smart_recompute else without_gelu_outputs(model))
                lookup = passes.enter_context(captured(model, "token"))
                entered = passes.enter_context(self._entered(forward))
            output = passes.enter_context(_output_of(model))
            loss, sample_size, log = super().forward(model, sample, reduce)
        clean = output[0]
        log["task_loss"] = log["loss"]

        terms = []
        if start is not None:
            if carried:
                moved = self.size * change[0].to(perturbation.dtype)
                smoothness = self.divergence_of_change(clean, moved).sum()
                rounding = moved
            else:
                smoothness, perturbation = self._finite_smoothness(
                    forward, sample, clean, masks, start, lookup[0], entered
                )
                rounding = clean
            terms.append(("smart", smart_weight, smoothness))
            log["smart_delta"] = self._size(perturbation.detach(), start.mask)
            log["smart_noise"] = self._noise_floor(clean, rounding, model)
            log["smart_square"] = sample_size * self.size**2
        if target is not None:
            terms.append(("bregman", bregman_weight, self.divergence(clean, target).sum()))

        if terms:
            loss = self._add(loss, terms, log, model)
        log["loss"] = loss.detach()
        return loss, sample_size, log

    def _weight_now(self, weight: float, every: int) -> float:
        """The term's weight at this update."""
        return weight * every if self.teacher.update_num % every == 0 else 0.0

    def _add(
        self, loss: Tensor, terms: List[Tuple[str, float, Tensor]], log: Dict[str, Any], model: nn.Module
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
            elif self._working_precision(model) == torch.float16:
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

    def _start(self, forward: Forward, sample: Dict[str, Any], masks: RandomState) -> "_Start":
        """Algorithm 1, line 3: where the ascent starts; in half precision with the gradient there."""
        tokens = sample["net_input"]["src_tokens"]
        embeddings = embedding_weight(forward.model)
        mask = token_mask(forward.model, tokens)
        # seeded as fairseq seeds torch on every worker: with its --seed plus the number of the update
        noise = example_noise(sample["id"], tokens.shape[1], embeddings.shape[1], seed=torch.initial_seed())
        # at least float32, whatever the model's precision
        noise = noise.to(torch.promote_types(embeddings.dtype, torch.float32)) * self.cfg.smart_noise_std
        known = self.memory.recall(sample["id"], noise) if self.memory else None
        gradient = None
        if known is None and self._form == TWO_FORWARDS and self._starts_to_first_order() and not self._from_clean_pass:
            gradient = self._first_order(forward, masks)(noise * mask)
        return _Start(noise, mask, gradient, known)

    @property
    def _few_outputs(self) -> bool:
        """Whether the Jacobian of the outputs, a backward pass for each but one, costs no more than its products."""
        return int(self.task.cfg.num_classes) <= 3

    @property
    def _from_clean_pass(self) -> bool:
        """Whether the first order is taken from the clean pass, which then keeps its activations for it."""
        return self.cfg.smart_search_layers is not None or (self._few_outputs and not self.cfg.smart_recompute)

    def _starts_to_first_order(self) -> bool:
        """Whether the first ascent step is taken to first order: two forwards would be off by as much, or by more."""
        if self.cfg.smart_dropout == "independent":  # fresh masks change the output more than any noise
            return False
        return self.cfg.smart_noise_std < (self._first_order_below if self._from_clean_pass else self._resolved)

    def _entered(self, forward: Forward) -> ContextManager[List[Tensor]]:
        """What the clean pass's outputs are linearized in."""
        layers = self.cfg.smart_search_layers
        if self._from_clean_pass and (layers is not None or self._starts_to_first_order()):
            return captured(forward.model, forward.place, layers or 0, differentiable=True)
        return contextlib.nullcontext([])

    def _first_order(self, forward: Forward, masks: RandomState) -> GradientFn:
        """The gradient to first order, from a pass of its own before the clean one."""
        weights = forward.frozen_weights()

        def products(direction: Tensor) -> Any:
            with self._dropout(forward.model, masks):
                return forward.products(weights, direction)

        if not self._few_outputs:
            return gradient_to_first_order(products, self.divergence_of_change)
        with self._dropout(forward.model, masks), captured(forward.model, forward.place, leaf=True) as entered:
            outputs = forward(weights)
        return gradient_of(linearized(outputs, entered[0]), outputs.detach(), self.divergence)

    def _gradient_of_change(self, forward: Forward, masks: RandomState) -> GradientFn:
        """The gradient at the perturbed point, whatever the precision."""
        weights = forward.frozen_weights()

        def products(perturbation: Tensor) -> Any:
            with self._dropout(forward.model, masks):
                logits, back, pull_back = forward.products(weights, perturbation / self.size, self.size)
            back = self.size * back.to(perturbation.dtype)
            return logits.to(back.dtype) + back, -back, pull_back

        return gradient_by_change(products, self.divergence_of_change)

    def _finite_smoothness(
        self,
        forward: Forward,
        sample: Dict[str, Any],
        clean: Tensor,
        masks: RandomState,
        start: "_Start",
        lookup: Tensor,
        entered: List[Tensor],
    ) -> Tuple[Tensor, Tensor]:
        """R_s summed over the batch as the divergence of two outputs, and the perturbation [B, T, C].

        ``lookup`` [B, T, C]: the clean pass's embeddings. ``entered``: what it is linearized in, if it is.
        """
        if self.cfg.smart_dropout == "off":
            with without_dropout(forward.model), self._entered(forward) as entered:
                clean = forward()
        perturbation = start.known
        if perturbation is None:
            perturbation = self._find(forward, clean, masks, start, entered)
        if self.memory:
            perturbation = self.memory.watched(sample["id"], perturbation, start.mask)
        with self._dropout(forward.model, masks), without_gelu_outputs(forward.model):
            adversarial = forward(perturbation=perturbation, lookup=lookup)
        return self.divergence(adversarial, clean).sum(), perturbation

    def _find(
        self, forward: Forward, clean: Tensor, masks: RandomState, start: "_Start", entered: List[Tensor]
    ) -> Tensor:
        """Algorithm 1, lines 4 to 8; arguments as for `_finite_smoothness`."""
        weights, layers, gradient = forward.frozen_weights(), self.cfg.smart_search_layers, start.gradient

        def logits_fn(perturbation: Tensor) -> Tensor:
            with self._dropout(forward.model, masks):
                return forward(weights, perturbation)

        def upper_layers_linear(perturbation: Tensor) -> Tensor:
            if not layers:
                return linear(perturbation)
            with self._dropout(forward.model, masks):
                return linear(forward.hidden(weights, perturbation, layers) - entered[0].detach())

        if entered:
            linear = linearized(clean, entered[0])
            if layers is None:
                gradient = gradient_of(linear, clean, self.divergence)(start.noise * start.mask)
            else:
                logits_fn = upper_layers_linear
        return find_perturbation(logits_fn, clean, start.noise, start.mask, self.divergence, self.adversary, gradient)

    def _working_precision(self, model: nn.Module) -> torch.dtype:
        """The dtype that the model's products are taken in: autocast's under --amp, otherwise its weights'."""
        weight = embedding_weight(model)
        return torch.float16 if self.cfg.smart_amp and weight.is_cuda else weight.dtype

    def _choose_form(self, model: nn.Module) -> str:
        """The form of the term; notes what the precision resolves.

        Raises:
            UsageError: the precision does not resolve the radius, and the flags allow no form that would.
        """
        if self._form is not None:
            return self._form
        mode, dtype = str(self.cfg.smart_mode), self._working_precision(model)
        # measured: two forwards are off by about this over the perturbation's size, relatively
        rounding = resolution(model, dtype)
        self._resolved = 16 * rounding
        unknown = _unknown_to_carried_change(self.cfg)
        exact = mode == "finite" and torch.finfo(dtype).bits >= 32 and not unknown
        # an l2 norm is spread over the entries of a token
        spread = embedding_weight(model).shape[1] ** 0.5 if self.adversary.norm == "l2" else 1
        least = spread * (1e6 * rounding if exact else self._resolved)
        size, flags = _largest_size(self.cfg)
        # and an ascent step to first order by about four times the size of the noise
        self._first_order_below = max(self._resolved, rounding * spread / size / 4)
        self._check_search(model, dtype)
        why = f"{flags} {size:g} is below what {str(dtype).split('.')[1]} resolves here ({least:.0e})"
        if mode == "tangent":
            self._form = FIRST_ORDER
        elif size >= least:
            self._form = TWO_FORWARDS
        elif unknown:
            raise UsageError(
                f"{why}: two forwards would measure rounding; the form that is right {unknown}, or a larger size"
            )
        elif mode == "finite":
            self._form = CARRIED_CHANGE
        else:
            logger.info(f"--smart-mode auto: {why}, so the term is computed to first order (tangent)")
            self._form = FIRST_ORDER
        return self._form

    def _check_search(self, model: nn.Module, dtype: torch.dtype) -> None:
        searched, there = self.cfg.smart_search_layers or 0, layer_count(model)
        require(searched <= there, "--smart-search-layers", searched, f"at most {there}, the model's number of layers")
        noise = self.cfg.smart_noise_std
        if searched and noise < self._resolved:
            raise UsageError(
                f"--smart-search-layers is {searched} and --smart-noise-std {noise:g}, below what "
                f"{str(dtype).split('.')[1]} resolves ({self._resolved:.0e}) after any layer; use 0, or more noise"
            )

    def _noise_floor(self, clean: Tensor, rounded: Tensor, model: nn.Module) -> Tensor:
        """What the term would be if ``rounded`` [B, K] were off by the working precision's rounding; a sum."""
        with torch.no_grad():
            wide = torch.promote_types(clean.dtype, torch.float32)
            signs = torch.ones_like(clean, dtype=wide)
            signs[:, ::2] = -1
            off = torch.finfo(self._working_precision(model)).eps / 2 * rounded.to(wide).abs() * signs
            return self.divergence_of_change(clean.to(wide), off).sum()

    @contextmanager
    def _dropout(self, model: nn.Module, masks: RandomState) -> Iterator[None]:
        """The dropout of a pass of the smoothness term, as ``--smart-dropout`` says."""
        if self.cfg.smart_dropout == "shared":
            with masks.replayed():
                yield
        elif self.cfg.smart_dropout == "off":
            with without_dropout(model):
                yield
        else:
            yield

    def _teacher_output(self, forward: Forward) -> Tensor:
        """The teacher's logits [B, K], without dropout and without gradients."""
        with torch.no_grad(), without_dropout(forward.model):
            return forward(self.teacher.weights(forward.model))

    def _size(self, perturbation: Tensor, mask: Tensor) -> Tensor:
        """Norms of the perturbation (of each example, or of the mean token of each), summed over the batch."""
        sizes = norm(perturbation, self.adversary)
        if self.adversary.scope == "token":
            sizes = (sizes * mask).sum(dim=1) / mask.sum(dim=1)
        return sizes.sum()

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


class _Start(NamedTuple):
    """Where the ascent of a batch starts."""

    noise: Tensor  # [B, T, C], float32 or wider
    mask: Tensor  # [B, T, 1]
    gradient: Optional[Tensor]  # [B, T, C], to first order at the noise, where the precision does not resolve that
    known: Optional[Tensor]  # [B, T, C], with --smart-reuse the perturbation, which then is not looked for


def _significant(value: Any, digits: int = 3) -> Any:
    """A number rounded to significant digits, so that 1.3e-06 is not printed as 0; "-" where there is none."""
    if value is None:  # no update of the interval had the term (--smart-every)
        return "-"
    return float(f"{float(value):.{digits - 1}e}")


def _ratio(value: Any, reference: Any) -> Any:
    if value is None or reference is None:
        return "-"
    return _significant(float(value) / float(reference)) if float(reference) else math.nan


def _largest_size(cfg: SmartSentencePredictionConfig) -> Tuple[float, str]:
    """The size that a perturbation can reach, and the flags that limit it."""
    if cfg.smart_projection == "normalize":
        return 1.0, "--smart-projection normalize"
    reach = cfg.smart_noise_std + cfg.smart_steps * cfg.smart_step_size
    if reach < cfg.smart_epsilon:
        return reach, "--smart-noise-std + --smart-steps x --smart-step-size ="
    return cfg.smart_epsilon, "--smart-epsilon"


def _unknown_to_carried_change(cfg: SmartSentencePredictionConfig) -> Optional[str]:
    """Which flag the forms that carry a change do not know, and what to do about it; None if they know them all."""
    if cfg.smart_dropout != "shared":
        return f"does not know --smart-dropout {cfg.smart_dropout}; use shared"
    for flag, value in (
        ("--smart-reuse", cfg.smart_reuse),
        ("--smart-recompute", cfg.smart_recompute),
        ("--smart-search-layers", cfg.smart_search_layers is not None),
    ):
        if value:
            return f"does not know {flag}; leave it out"
    if _divergence_name(cfg) in ("kl", "js"):
        return f"does not know --smart-divergence {_divergence_name(cfg)}; use auto"
    return None


@contextmanager
def _output_of(model: nn.Module) -> Iterator[List[Tensor]]:
    """The logits that the block's forward of ``model`` returns: `sentence_prediction` keeps them to itself."""
    logits: List[Tensor] = []
    handle = model.register_forward_hook(lambda module, args, output: logits.append(output[0]))
    try:
        yield logits
    finally:
        handle.remove()


def _optimizer_name(cfg: SmartSentencePredictionConfig) -> Optional[str]:
    """The value of --optimizer; None in fairseq-validate, which has none."""
    return getattr(cfg.smart_optimizer, "_name", None)


def _bregman_weight(cfg: SmartSentencePredictionConfig) -> float:
    optimizer = _optimizer_name(cfg)
    has_teacher = optimizer == "mbpp"
    weight = cfg.smart_bregman_weight
    if weight is None:
        if optimizer is not None and not has_teacher:
            logger.info(
                f"--smart-bregman-weight is not set and --optimizer is {optimizer}: no Bregman term "
                "(--optimizer mbpp brings it, with weight 1)"
            )
        return 1.0 if has_teacher else 0.0
    require(weight >= 0 and math.isfinite(weight), "--smart-bregman-weight", weight, "0 or above")
    if weight > 0 and optimizer is not None and not has_teacher:
        raise UsageError(
            f"--smart-bregman-weight is {weight:g} but --optimizer is {optimizer}; "
            "a value above 0 needs --optimizer mbpp, which keeps the teacher"
        )
    return weight


def _divergence_name(cfg: SmartSentencePredictionConfig) -> str:
    if cfg.smart_divergence == "auto":
        return "squared" if cfg.regression_target else "sym_kl"
    return str(cfg.smart_divergence)


def _check_flags(cfg: SmartSentencePredictionConfig, task: Any) -> None:
    """Raise `UsageError` for values that would train something else than the user believes."""
    require(cfg.smart_weight >= 0 and math.isfinite(cfg.smart_weight), "--smart-weight", cfg.smart_weight, "0 or above")
    for flag, value in (
        ("--smart-epsilon", cfg.smart_epsilon),
        ("--smart-noise-std", cfg.smart_noise_std),  # at the clean point itself the gradient is 0
        ("--smart-step-size", cfg.smart_step_size),
    ):
        require(value > 0 and math.isfinite(value), flag, value, "above 0 (--smart-weight 0 switches the term off)")
    if cfg.smart_ddp_backend == "fully_sharded":
        raise UsageError(NOT_SHARDED)
    optimizer = _optimizer_name(cfg)
    if cfg.smart_validate_with == "teacher" and optimizer not in (None, "mbpp"):
        raise UsageError(
            f"--smart-validate-with is teacher but --optimizer is {optimizer}; it needs --optimizer mbpp, which keeps "
            "the teacher"
        )
    lowest = 1 if cfg.smart_weight else 0
    require(
        cfg.smart_steps >= lowest,
        "--smart-steps",
        cfg.smart_steps,
        f"{lowest} or more (--smart-weight 0 switches the term off)",
    )
    for flag, number in (
        ("--smart-every", cfg.smart_every),
        ("--smart-bregman-every", cfg.smart_bregman_every),
    ):
        require(number >= 1, flag, number, "a whole number from 1")
    if cfg.smart_search_layers is not None:
        layers = cfg.smart_search_layers
        require(layers >= 0, "--smart-search-layers", layers, "a whole number from 0 to the model's number of layers")
        if cfg.smart_recompute or cfg.smart_dropout == "independent":
            flag = "--smart-recompute" if cfg.smart_recompute else "--smart-dropout independent"
            raise UsageError(
                f"--smart-search-layers needs the clean pass as it was, which {flag} does not keep; leave one out"
            )
    if cfg.smart_recompute and cfg.smart_dropout == "off":
        raise UsageError(
            "--smart-recompute is set with --smart-dropout off, which takes a second clean pass; use shared or "
            "independent"
        )
    if cfg.smart_mode == "tangent" and _unknown_to_carried_change(cfg):
        raise UsageError(f"--smart-mode is tangent, which {_unknown_to_carried_change(cfg)}, or --smart-mode auto")
    num_classes = task.cfg.num_classes
    if cfg.regression_target:
        require(num_classes == 1, "--num-classes", num_classes, "1 with --regression-target")
        if _divergence_name(cfg) != "squared":
            raise UsageError(
                f"--smart-divergence is {_divergence_name(cfg)} with --regression-target, whose single output is no "
                "distribution; use squared or auto"
            )
        return
    if cfg.smart_weight or cfg.smart_bregman_weight:
        require(num_classes >= 2, "--num-classes", num_classes, "2 or more without --regression-target")
