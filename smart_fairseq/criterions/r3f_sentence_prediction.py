"""`r3f_sentence_prediction`: noise on the embeddings must not change the output. R4F is the same with

--spectral-norm-classification-head, which holds the head's largest singular value at 1.

Paper: Aghajanyan et al. (2020), equation 4: L + lambda * KL_S(f(x) || f(x + z)), z normal or uniform, KL_S the sum of
both KL, each pass with dropout masks of its own as in the authors' code (fairseq, examples/rxf), whose noise does not
reach a RoBERTa. For a regression, which that code leaves out, the squared difference.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Optional

from fairseq.criterions import register_criterion
from fairseq.dataclass import ChoiceEnum
from torch import Tensor

from ..config.flags import ByRecipe, RegularizedConfig, flag, recipe_choices, with_recipe
from ..encoder import Encoder, Forward
from ..errors import require
from ..method.adversary import Adversary, norm
from ..method.dropout import RandomState
from ..method.noise import example_noise, uniform_noise
from ..terms import TermValue
from ..terms.start import drawn
from ..training.checks import check_weight
from ..training.criterion import RegularizedCriterion

NOISE = {"normal": example_noise, "uniform": uniform_noise}


# fairseq reads these annotations at run time: no `from __future__ import annotations` in this file
@dataclass
class R3FConfig(RegularizedConfig):
    r3f_recipe: recipe_choices("r3f") = flag(  # type: ignore[valid-type]
        "paper", "values of the flags that are not given: paper (the default), rte (the authors' command)"
    )
    r3f_weight: ByRecipe = flag(None, "the paper's lambda; 0 switches the term off")
    r3f_epsilon: ByRecipe = flag(None, "standard deviation of normal noise, largest entry of uniform noise")
    r3f_epsilon_unit: Optional[ChoiceEnum(["absolute", "relative"])] = flag(  # type: ignore[valid-type]
        None, "unit of the noise: relative, the root mean square of an example's embeddings"
    )
    r3f_noise: Optional[ChoiceEnum(list(NOISE))] = flag(  # type: ignore[valid-type]
        None, "distribution of the noise"
    )
    r3f_dropout: Optional[ChoiceEnum(["independent", "shared"])] = flag(  # type: ignore[valid-type]
        None, "dropout masks of the noisy pass: fresh ones, or the clean pass's"
    )


@register_criterion("r3f_sentence_prediction", dataclass=R3FConfig)
class R3FSentencePrediction(RegularizedCriterion):
    """The criterion; its flags are `R3FConfig`."""

    def __init__(self, cfg: R3FConfig, task: Any) -> None:
        cfg = with_recipe(cfg, "r3f")
        super().__init__(cfg, task, weights={"r3f": check_weight("--r3f-weight", cfg.r3f_weight)})
        require(cfg.r3f_epsilon > 0, "--r3f-epsilon", cfg.r3f_epsilon, "above 0 (--r3f-weight 0 switches the term off)")

    def prepare(self, encoder: Encoder) -> str:
        return f"R3F: {self.cfg.r3f_noise} noise of {self.cfg.r3f_epsilon:g} {self.cfg.r3f_epsilon_unit}, "

    @contextmanager
    def term(self, name: str, forward: Forward, sample: dict[str, Any]) -> Iterator[Callable[[Tensor], TermValue]]:
        masks, largest = RandomState(sample["net_input"]["src_tokens"].device), Adversary(norm="inf")
        relative = self.cfg.r3f_epsilon_unit == "relative"
        noise, unit, mask = drawn(forward, sample, NOISE[str(self.cfg.r3f_noise)], largest, relative)
        noise = self.cfg.r3f_epsilon * mask * noise
        perturbation = noise * unit

        def value(clean: Tensor) -> TermValue:
            with masks.replayed() if self.cfg.r3f_dropout == "shared" else nullcontext():
                noisy = forward(perturbation=perturbation, lookup=looked_up[0])  # the clean pass's embeddings
            return TermValue(self.divergence(noisy, clean).sum(), norm(noise, largest).sum(), perturbation)

        with forward.encoder.captured("token") as looked_up:
            yield value
