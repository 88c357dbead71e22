"""A base for adversarial training: the task loss at a perturbed point of the embeddings, in the place of the clean one.

| source | criterion | what it does with the ball |
| --- | --- | --- |
| Madry et al. (2018), equation 2.1 | pgd | K ascent steps before the update |
| Shafahi et al. (2019), algorithm 1 | freeat | an ascent step by each of m updates on a batch |
| Zhu et al. (2020), algorithm 1 | freelb | K passes, an ascent step between two, the mean of their gradients |

Common to them is a `Ball` around the embedding lookup, with a random start, and one step: along the gradient over its
l2 norm, or with the norm inf along its sign, then back onto the ball. Padding is never perturbed; dropout masks are
the same in all passes of an update over a batch, so that they climb one function (FreeAT's are updates of their own).
"""

import logging
from dataclasses import make_dataclass
from typing import Any, NamedTuple, Optional

from fairseq.dataclass import ChoiceEnum
from torch import Tensor

from ..config.flags import RegularizedConfig, flag, recipe_choices, with_recipe
from ..encoder import Encoder, Forward
from ..errors import require
from ..method.adversary import Adversary, norm
from ..method.noise import uniform_noise
from ..method.relative import noise_in_units
from ..terms.start import Drawn, drawn
from .criterion import RegularizedCriterion

logger = logging.getLogger(__name__)


class Ball(NamedTuple):
    """The values of a criterion's flags, by their names without its prefix."""

    epsilon: float
    epsilon_unit: str
    step_size: float
    steps: int
    start: float
    norm: str


_HELP = {
    "epsilon": "radius of the ball around the embeddings; 0: the task loss at the embeddings themselves",
    "epsilon_unit": "what radius, step and start are measured in: relative, in the length of the example's embeddings "
    "(norm inf: their root mean square); absolute, in their own units",
    "step_size": "length of an ascent step",
    "start": "size of the random start (uniform; norm l2: over the root of the number of entries); 0: the embeddings",
    "norm": "norm of the ball; l2 steps along the gradient, inf along its sign",
}
_RECIPE = "values of the flags that are not given: relative (the default), or the authors' for a task of GLUE, absolute"


def ball_config(name: str, prefix: str, module: str, steps: str) -> Any:
    """The dataclass of a criterion whose flags begin with ``prefix``.

    Args:
        module: where it is kept under its ``name``.
        steps: what the flag of that name counts.
    """
    types: dict[str, Any] = dict.fromkeys(Ball._fields, float)
    types |= {"epsilon_unit": ChoiceEnum(["relative", "absolute"]), "norm": ChoiceEnum(["l2", "inf"]), "steps": int}
    recipe = flag("relative", _RECIPE)
    fields: list[Any] = [(f"{prefix}_recipe", recipe_choices(prefix), recipe)]
    for key in Ball._fields:
        not_set = flag(None, {**_HELP, "steps": steps}[key])
        fields.append((f"{prefix}_{key}", Optional[types[key]], not_set))  # noqa: UP045  (fairseq knows no other)
    config = make_dataclass(name, fields, bases=(RegularizedConfig,))
    config.__module__ = module  # so that it can be pickled
    return config


class AdversarialCriterion(RegularizedCriterion):
    """What the adversarial criteria share; a subclass has `perturbation`, which sets ``delta`` and ``before``.

    Attributes:
        name: of the method, with which its flags and its entries in the log begin. Errors in them are `UsageError`s.
        passes_before_ascent: of the ``steps``, those that only find the gradient for the first ascent step.
        ball: the flags' values.
        delta: size of the batch's perturbations, a sum of norms in the unit of the radius.
        before: task loss of the batch where the ascent began, a sum; None where that is not known.
    """

    name: str
    passes_before_ascent = 0
    delta: Tensor

    def __init__(self, cfg: RegularizedConfig, task: Any) -> None:
        name = self.name
        cfg = with_recipe(cfg, name)
        ball = Ball(**{key: getattr(cfg, f"{name}_{key}") for key in Ball._fields})
        super().__init__(cfg, task, weights={}, adversarial=ball.epsilon > 0)
        self.ball = ball
        self.before: Tensor | None = None
        for key in ("epsilon", "start"):
            require(getattr(ball, key) >= 0, f"--{name}-{key}", getattr(ball, key), "0 or above")
        if ball.epsilon_unit == "relative":
            allowed = f"at most 1, the size of the embeddings themselves; or with --{name}-epsilon-unit absolute"
            require(ball.epsilon <= 1, f"--{name}-epsilon", ball.epsilon, allowed)
            allowed = f"at most --{name}-epsilon, {ball.epsilon:g}, so that the ascent begins within its ball"
            require(ball.start <= ball.epsilon or not self.adversarial, f"--{name}-start", ball.start, allowed)
        require(
            ball.step_size > 0, f"--{name}-step-size", ball.step_size, f"above 0 (--{name}-epsilon 0: no adversary)"
        )
        require(ball.steps >= 1, f"--{name}-steps", ball.steps, "1 or more")
        self.adversary = Adversary(ball.epsilon, ball.step_size, int(ball.steps), norm=str(ball.norm), signed=True)

    def prepare(self, encoder: Encoder) -> str:
        if self.adversarial and self.ball.steps <= self.passes_before_ascent:
            logger.warning(
                f"--{self.name}-steps {self.ball.steps} leaves no step of ascent: the task loss is taken at the random "
                f"start, and with --{self.name}-start 0 training is plain; 2 or more make an adversary"
            )
        where = "a perturbed point" if self.adversarial else "the embeddings"
        return f"{self.name}: the task loss is taken at {where}, "

    def start(self, forward: Forward, sample: dict[str, Any]) -> Drawn:
        """The noise where the ascent begins: a random point of the ball in its unit, 0 at padding."""
        relative = self.ball.epsilon_unit == "relative"
        noise, unit, mask = drawn(forward, sample, uniform_noise, self.adversary, relative)
        # Zhu et al. (2020), algorithm 1, line 4: over the root of the number of entries in the norm l2
        return Drawn(self.ball.start * noise_in_units(noise, mask, self.adversary) * mask, unit, mask)

    def norms(self, point: Tensor) -> Tensor:
        """The sum over a batch, in the unit of the radius as ``point`` is."""
        return norm(point.detach(), self.adversary).sum()

    def log_adversary(self, log: dict[str, Any]) -> dict[str, Tensor]:
        log[f"{self.name}_delta"] = self.delta * self.examples_of_a_row
        if self.before is None:
            return {}
        rise = log[f"{self.name}_rise"] = log["task_loss"].detach() - self.before
        return {self.name: rise}
