"""Whether the terms act: said once, after the warm-up of the learning rate."""

import logging
from collections.abc import Mapping

from torch import Tensor

logger = logging.getLogger(__name__)

# updates after the warm-up over which the terms are averaged, if they come at each
WINDOW = 20
# a term smaller than this share of the task loss is said not to act
LEAST_SHARE = 1e-3
# by term: what to turn where it does not act
_ADVICE = {"smart": "raise --smart-epsilon or --smart-weight", "bregman": "raise --mbpp-momentum"}


class Acting:
    """Sums of the task loss and of the weighted terms, on their device, until they are said.

    after: number of updates of the warm-up.
    every: a term may come at every so-manieth update alone, so many times as heavy.
    """

    def __init__(self, after: int, every: int = 1) -> None:
        self.after, self.window = after, WINDOW * every
        self.sums: dict[str, Tensor] = {}
        self.first = -1
        self.said = False

    def note(self, update: int, task_loss: Tensor, terms: Mapping[str, Tensor]) -> None:
        """Take in a batch: the number of updates before it, scalars without gradients."""
        if self.said or update < self.after:
            return
        if self.first < 0:
            self.first = update
        if update >= self.first + self.window:
            self.said = True
            self._say()
            return
        for name, value in {"task": task_loss, **terms}.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _say(self) -> None:
        task = float(self.sums.pop("task"))
        shares = {name: float(value) / task if task else 0.0 for name, value in self.sums.items()}
        words = ", ".join(f"{name} {share:.2g}" for name, share in shares.items())
        logger.info(f"updates {self.first} to {self.first + self.window}, as shares of the task loss: {words}")
        for name, share in shares.items():
            if share < LEAST_SHARE:
                logger.warning(
                    f"the {name} term is {share:.1e} of the task loss, below {LEAST_SHARE:g}: it is not acting; "
                    + _ADVICE.get(name, "raise its weight")
                    + ". Where the task loss has not fallen yet, look again later"
                )
