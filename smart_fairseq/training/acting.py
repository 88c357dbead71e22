"""Whether the terms act: said after the warm-up of the learning rate, then when the updates since it have doubled."""

import logging
from collections.abc import Mapping

from torch import Tensor

logger = logging.getLogger(__name__)

# updates after the warm-up until it is first said, if the terms come at each
WINDOW = 20
# a term smaller than this share of the task loss is said not to act
LEAST_SHARE = 1e-3
# by term: what to turn where it does not act
_ADVICE = {
    "smart": "raise --smart-epsilon or --smart-weight",
    "bregman": "raise --mbpp-momentum",
    "pgd": "raise --pgd-epsilon",
    "freelb": "raise --freelb-epsilon",
}


class Acting:
    """Sums of the task loss and of the weighted terms, on their device, until they are said.

    after: number of updates of the warm-up.
    every: a term may come at every so-manieth update alone, so many times as heavy.
    """

    def __init__(self, after: int, every: int = 1) -> None:
        self.after, self.window = after, WINDOW * every
        self.sums: dict[str, Tensor] = {}
        self.start = self.first = -1  # of all updates that count, and of those in the sums

    def note(self, update: int, task_loss: Tensor, terms: Mapping[str, Tensor]) -> None:
        """Take in a batch: the number of updates before it, scalars without gradients."""
        if update < self.after:
            return
        if self.start < 0:
            self.start = self.first = update
        if update >= self.start + self.window:
            self._say()
            self.first, self.window = self.start + self.window, 2 * self.window
        for name, value in {"task": task_loss, **terms}.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _say(self) -> None:
        task = float(self.sums.pop("task"))
        shares = {name: float(value) / task if task else 0.0 for name, value in self.sums.items()}
        self.sums = {}
        if not shares:  # FreeAT's perturbation has no point to be compared with
            return
        words = ", ".join(f"{name} {share:.2g}" for name, share in shares.items())
        logger.info(f"updates {self.first} to {self.start + self.window}, as shares of the task loss: {words}")
        # at first nothing may have been learned, and all outputs be alike
        when = " yet: look at the next such line, and if it says so too," if self.first == self.start else ";"
        for name, share in shares.items():
            if share < LEAST_SHARE:
                logger.warning(
                    f"the {name} term is {share:.1e} of the task loss, below {LEAST_SHARE:g}: it is not acting{when} "
                    f"{_ADVICE.get(name, 'raise its weight')}"
                )
