"""`mbpp`: a base optimizer together with the teacher of Bregman proximal point optimization.

Paper: Jiang et al. (2020), section 3.2 and Algorithm 1, lines 10 to 12. The optimizer owns the teacher
and nothing else of the method: the Bregman term itself is part of the criterion's loss, which reads the
teacher through `smart_fairseq.training.link`.
"""

import argparse
import logging
import math
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

import torch
from fairseq.dataclass import ChoiceEnum
from fairseq.optim import OPTIMIZER_REGISTRY, FairseqOptimizer, register_optimizer
from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig
from omegaconf import II
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..config.flags import flag
from ..config.recipes import LEAST_MEMORY, MEMORY, MOMENTUM
from ..errors import UsageError, require
from ..method.teacher import average_, momentum_at, momentum_for

logger = logging.getLogger(__name__)


WARMUP_RATIO = 0.1  # Jiang et al. (2020), section 4.1
_NO_LENGTH = "but their number is not known: give --max-update (or --total-num-update), or "


# fairseq reads these annotations at run time: no `from __future__ import annotations` in this file
@dataclass
class MBPPConfig(FairseqAdamConfig):
    mbpp_base: str = flag(
        "adam",
        "wrapped optimizer: adam, adamw_fused (the same in one kernel), radam, or any registered one that "
        "needs no flags of its own",
    )
    mbpp_recipe: ChoiceEnum(list(MOMENTUM)) = flag(  # type: ignore[valid-type]
        "smart",
        "momentum where it is not given: smart, of a teacher that remembers a share of the run; paper, "
        "0.99 and then 0.999",
    )
    mbpp_momentum: Optional[float] = flag(
        None, "weight of the old teacher in its moving average; 0 with --mbpp-inner-steps above 1 is VBPP"
    )
    mbpp_warmup_momentum: Optional[float] = flag(
        None, "weight of the old teacher during the first part of training, see --mbpp-warmup-ratio"
    )
    mbpp_warmup_ratio: float = flag(
        WARMUP_RATIO, "that first part, as a fraction of --max-update (or else of --total-num-update)"
    )
    mbpp_inner_steps: int = flag(1, "updates between two averages of the teacher")
    # for the length of training; bare interpolations, so that they do not become flags
    mbpp_max_update: int = II("optimization.max_update")
    mbpp_lr_scheduler: Any = II("lr_scheduler")
    mbpp_zero_sharding: str = II("distributed_training.zero_sharding")
    mbpp_use_bmuf: Any = II("optimization.use_bmuf")  # of the type bool, the interpolation would be taken for true


class _RAdam(FairseqAdam):
    """torch's RAdam with the flags of fairseq's adam, weight decay decoupled as there."""

    supports_flat_params = True  # it works entry by entry

    def __init__(self, cfg: MBPPConfig, params: Any) -> None:
        super().__init__(cfg, params)
        self._optimizer = torch.optim.RAdam(params, **self.optimizer_config, decoupled_weight_decay=True)


class _FusedAdamW(FairseqAdam):
    """fairseq's adam by torch's fused kernel: a few launches for all tensors instead of nine for each.

    Attributes:
        updates: taken so far; it is not saved with the state, `MBPP` sets it.
    """

    updates = 0
    supports_flat_params = True  # it works entry by entry

    def __init__(self, cfg: MBPPConfig, params: Any) -> None:
        super().__init__(cfg, params)
        self._optimizer = torch.optim.AdamW(params, **self.optimizer_config, fused=True)

    def step(self, closure: Any = None, scale: float = 1.0, groups: Any = None) -> None:
        # fairseq adds epsilon before the second moment's bias is corrected, torch after it; a weight without a gradient
        # at some updates, whose moments are younger, gets the others' epsilon
        given = [group["eps"] for group in self.param_groups]
        for group in self.param_groups:
            group["eps"] /= math.sqrt(1 - group["betas"][1] ** (self.updates + 1))
        try:
            super().step(closure, scale, groups)
        finally:
            for group, eps in zip(self.param_groups, given):
                group["eps"] = eps


_OWN: Dict[str, Any] = {"adamw_fused": _FusedAdamW, "radam": _RAdam}


def _build_base(cfg: MBPPConfig, params: Any) -> FairseqOptimizer:
    """The wrapped optimizer: its own flags at their defaults, those that it shares with adam from ``cfg``."""
    name = cfg.mbpp_base
    if name in _OWN:
        return _OWN[name](cfg, params)
    # wrappers of other optimizers, and one that moves the state off the device
    known = sorted({*OPTIMIZER_REGISTRY, *_OWN} - {"mbpp", "composite", "cpu_adam"})
    require(name in known, "--mbpp-base", name, f"one of {', '.join(known)}")
    optimizer_class = OPTIMIZER_REGISTRY[name]
    if name == "adam":
        return optimizer_class(cfg, params)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    optimizer_class.add_args(parser)
    try:
        base_cfg = parser.parse_args([])
    except SystemExit as error:
        raise UsageError(f"--mbpp-base {name}: it needs flags of its own; use an optimizer without") from error
    for key in ("lr", "weight_decay"):
        setattr(base_cfg, key, getattr(cfg, key))
    return optimizer_class(base_cfg, params)


@register_optimizer("mbpp", dataclass=MBPPConfig)
class MBPP(FairseqOptimizer):
    """A base optimizer that also keeps the teacher.

    The teacher is a list of float32 tensors, one for each tensor that the base optimizer updates (one
    flat tensor with fairseq's flattened --fp16). It exists from the first update on; before that it is
    the weights. It moves when `step` runs and at no other time, so an update that fairseq skips
    (overflow) leaves it alone, and it is saved under the key "mbpp" of the optimizer's state.

    Attributes:
        teacher: list of float32 tensors, or None before the first update.
        teacher_version: changes whenever the teacher does.
        updates: number of updates taken.
    """

    def __init__(self, cfg: MBPPConfig, params: Any) -> None:
        super().__init__(cfg)
        for name in ("momentum", "warmup-momentum", "warmup-ratio"):
            value = getattr(cfg, f"mbpp_{name.replace('-', '_')}")
            require(value is None or 0 <= value <= 1, f"--mbpp-{name}", value, "a number from 0 to 1")
        require(cfg.mbpp_inner_steps >= 1, "--mbpp-inner-steps", cfg.mbpp_inner_steps, "a whole number from 1")
        needed = "none with --optimizer mbpp, whose teacher needs all weights on each worker"
        require(cfg.mbpp_zero_sharding == "none", "--zero-sharding", cfg.mbpp_zero_sharding, needed)
        require(not cfg.mbpp_use_bmuf, "--use-bmuf", "set", "left out with --optimizer mbpp, which it would hide")
        # the length of training that the momentum refers to; 0 if it is not known
        self.total_updates = int(cfg.mbpp_max_update or getattr(cfg.mbpp_lr_scheduler, "total_num_update", 0) or 0)
        self.warmup_momentum, self.momentum = _momentum(cfg, self.total_updates)
        first = ""
        if self.warmup_momentum != self.momentum and cfg.mbpp_warmup_ratio > 0:
            if not self.total_updates:
                raise UsageError(
                    f"--mbpp-warmup-ratio is {cfg.mbpp_warmup_ratio}, a fraction of the updates, "
                    f"{_NO_LENGTH}--mbpp-warmup-ratio 0"
                )
            first = f"{self.warmup_momentum:.6g} for the first {cfg.mbpp_warmup_ratio:g} of training, then "
        elif cfg.mbpp_warmup_ratio not in (0, WARMUP_RATIO):
            logger.warning(
                f"--mbpp-warmup-ratio {cfg.mbpp_warmup_ratio:g} changes nothing: the teacher's momentum is the same "
                "throughout; give --mbpp-warmup-momentum, or leave it out"
            )
        memory = f", a memory of {cfg.mbpp_inner_steps / (1 - self.momentum):.4g} updates" if self.momentum < 1 else ""
        logger.info(f"--optimizer mbpp: the teacher's momentum is {first}{self.momentum:.6g}{memory}")
        if self.momentum == 0 and cfg.mbpp_inner_steps == 1:
            logger.warning(
                "--mbpp-momentum 0 with --mbpp-inner-steps 1: the teacher equals the weights at each update, "
                "so the Bregman term only sees dropout; VBPP needs --mbpp-inner-steps above 1"
            )
        if 0 < self.total_updates <= cfg.mbpp_inner_steps:
            logger.warning(
                f"--mbpp-inner-steps {cfg.mbpp_inner_steps} is no shorter than the run, {self.total_updates} updates: "
                "the teacher does not move in it"
            )
        self.base = _build_base(cfg, params)
        self._optimizer = self.base.optimizer
        self.teacher: Optional[List[Tensor]] = None
        self.teacher_version = 0
        self.teacher_is_read = False
        self.updates = 0

    @property
    def optimizer_config(self) -> Dict[str, Any]:
        return self.base.optimizer_config  # type: ignore[no-any-return]

    @property
    def supports_flat_params(self) -> bool:
        return self.base.supports_flat_params  # type: ignore[no-any-return]

    def average_params(self) -> None:
        self.base.average_params()

    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Any = None) -> Tensor:
        """As fairseq's, where all gradients are float32 with a few launches instead of two for each tensor."""
        gradients = [parameter.grad for parameter in self.params if parameter.grad is not None]
        if len(gradients) < 2 or any(gradient.dtype != torch.float32 for gradient in gradients):
            return super().clip_grad_norm(max_norm, aggregate_norm_fn)  # type: ignore[no-any-return]
        total = get_total_norm(gradients, foreach=True)
        total = total if aggregate_norm_fn is None else aggregate_norm_fn(total)
        if max_norm > 0:
            clip_grads_with_norm_(list(self.params), max_norm, total, foreach=True)
        return total

    @torch.no_grad()
    def step(self, closure: Any = None, scale: float = 1.0, groups: Any = None) -> None:
        """One update of the base optimizer, then of the teacher (every ``--mbpp-inner-steps`` updates)."""
        weights = list(self.params)
        if self.teacher is None:
            self.teacher = [weight.detach().to(torch.float32, copy=True) for weight in weights]
            if not self.teacher_is_read:
                logger.warning(
                    "no criterion has read the teacher of --optimizer mbpp; "
                    "it acts on training only through --criterion smart_sentence_prediction"
                )
        if isinstance(self.base, _FusedAdamW):
            self.base.updates = self.updates
        self.base.step(closure, scale, groups)
        self.updates += 1
        if self.updates % self.cfg.mbpp_inner_steps == 0:
            momentum = momentum_at(
                self.updates,
                total_updates=self.total_updates,
                momentum=self.momentum,
                warmup_momentum=self.warmup_momentum,
                warmup_ratio=self.cfg.mbpp_warmup_ratio,
            )
            average_(self.teacher, weights, momentum)
            self.teacher_version += 1  # between two averages the half-precision copy stays good

    def state_dict(self) -> Dict[str, Any]:
        return {**self.base.state_dict(), "mbpp": {"updates": self.updates, "teacher": self.teacher}}

    def load_state_dict(self, state_dict: Dict[str, Any], optimizer_overrides: Optional[Dict[str, Any]] = None) -> None:
        if "mbpp" not in state_dict:
            raise UsageError("--optimizer mbpp: the checkpoint holds no teacher; start anew with --reset-optimizer")
        own = state_dict["mbpp"]
        shapes = [tuple(tensor.shape) for tensor in own["teacher"] or ()]
        expected = [tuple(weight.shape) for weight in self.params]
        if shapes and len(shapes) == len(expected) and shapes != expected:
            there, here = next((list(old), list(new)) for old, new in zip(shapes, expected) if old != new)
            raise UsageError(
                f"--optimizer mbpp: the checkpoint's teacher has other shapes than this run ({there}, here {here}), as "
                "with another number of classes; give another --save-dir, and to start from those weights "
                "--finetune-from-model"
            )
        if shapes and shapes != expected:
            raise UsageError(
                f"--optimizer mbpp: the checkpoint's teacher has {len(shapes)} tensors that do not fit the "
                f"{len(expected)} of this run, as with other tasks, heads or another precision; resume with the same, "
                "or give another --save-dir, and to start from those weights --finetune-from-model"
            )
        self.base.load_state_dict({k: v for k, v in state_dict.items() if k != "mbpp"}, optimizer_overrides)
        self.updates = own["updates"]
        self.teacher = own["teacher"] and [
            tensor.to(weight.device, torch.float32, copy=True) for tensor, weight in zip(own["teacher"], self.params)
        ]
        self.teacher_version += 1
        logger.info(f"--optimizer mbpp: went on with the checkpoint's teacher, after {self.updates} updates")
        if 0 < self.cfg.mbpp_max_update <= self.updates:
            logger.warning(
                f"--save-dir holds a run that has had its --max-update {self.cfg.mbpp_max_update}: fairseq adds one "
                "update to it, and no more; to train anew give another --save-dir"
            )


def _momentum(cfg: MBPPConfig, total_updates: int) -> Tuple[float, float]:
    """The momentum of the first part of training and of the rest: as given, or else the recipe's."""
    first, rest = cfg.mbpp_warmup_momentum, cfg.mbpp_momentum
    if rest in (0, 1):  # modes rather than averages: they hold from the start
        if first not in (None, rest):
            logger.warning(
                f"--mbpp-warmup-momentum {first:g} changes nothing with --mbpp-momentum {rest:g}, which holds from the "
                "start; leave one out"
            )
        return rest, rest
    recipe = MOMENTUM[str(cfg.mbpp_recipe)]
    if recipe is None:  # one average throughout
        if rest is None and not total_updates:
            raise UsageError(
                f"--mbpp-recipe is {cfg.mbpp_recipe}, whose teacher remembers a share of all updates, "
                f"{_NO_LENGTH}--mbpp-momentum"
            )
        memory = max(LEAST_MEMORY, MEMORY * total_updates) / cfg.mbpp_inner_steps  # in averages
        recipe = (momentum_for(memory), momentum_for(memory)) if rest is None else (rest, rest)
    return recipe[0] if first is None else first, recipe[1] if rest is None else rest
