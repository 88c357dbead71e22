"""Flags that several criteria share, as mixins for their dataclasses.

fairseq reads these annotations at run time: no postponed annotations in this file, and ``typing.Optional``.
"""

import copy
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional, TypeVar

from fairseq.criterions.sentence_prediction import SentencePredictionConfig
from fairseq.dataclass import ChoiceEnum
from omegaconf import II

from .recipes import RECIPES, RECIPES_OF

logger = logging.getLogger(__name__)

# None until `with_recipe` has filled it in, before anything reads it
if TYPE_CHECKING:
    ByRecipe = Any
else:
    ByRecipe = Optional[float]


def flag(default: Any, help: str) -> Any:
    """A field of a configuration that fairseq makes a flag."""
    return field(default=default, metadata={"help": help})


@dataclass
class AdversaryFlags:
    """The ball, the ascent, and how the term at its end is computed."""

    smart_recipe: ChoiceEnum(list(RECIPES)) = flag(  # type: ignore[valid-type]
        "smart",
        "values of the flags that are not given: smart (acts; the default), paper (as printed), release "
        "(the authors' code), sift (DeBERTa's)",
    )
    smart_epsilon_unit: Optional[ChoiceEnum(["relative", "absolute"])] = flag(  # type: ignore[valid-type]
        None,
        "what radius, noise and step are measured in: relative, in the root mean square of the example's "
        "embeddings where they are perturbed; absolute, in their own units",
    )
    smart_epsilon: ByRecipe = flag(None, "radius of the ball around the embeddings (with --smart-projection ball)")
    smart_noise_std: ByRecipe = flag(None, "standard deviation of the noise that the perturbation starts from")
    smart_step_size: ByRecipe = flag(None, "length of an ascent step along the normalised gradient")
    smart_steps: int = flag(1, "number of ascent steps")
    smart_norm: ChoiceEnum(["inf", "l2"]) = flag(  # type: ignore[valid-type]
        "inf", "norm of the ball and of the gradient's normalisation"
    )
    smart_norm_scope: Optional[ChoiceEnum(["example", "token"])] = flag(  # type: ignore[valid-type]
        None, "what a norm is taken over: the tokens of an example together, or each token"
    )
    smart_projection: Optional[ChoiceEnum(["ball", "normalize"])] = flag(  # type: ignore[valid-type]
        None, "after a step: project onto the ball (the paper), or divide by the norm (the authors' release)"
    )
    smart_embedding: Optional[ChoiceEnum(["token", "normalized", "input"])] = flag(  # type: ignore[valid-type]
        None,
        "what is perturbed: the embedding lookup; what enters the embeddings' LayerNorm, normalised (SiFT);"
        " or what enters the first layer",
    )
    smart_dropout: Optional[ChoiceEnum(["shared", "independent", "off"])] = flag(  # type: ignore[valid-type]
        None,
        "dropout masks of the perturbed pass: the clean pass's, fresh ones, or none in either pass "
        "of the smoothness term (one more forward)",
    )
    smart_divergence: ChoiceEnum(["auto", "sym_kl", "kl", "js", "squared"]) = flag(  # type: ignore[valid-type]
        "auto", "divergence between outputs; auto: sym_kl for classes, squared for --regression-target"
    )
    smart_mode: ChoiceEnum(["auto", "finite", "tangent"]) = flag(  # type: ignore[valid-type]
        "auto",
        "how the term is computed: finite, by two forwards; tangent, to first order; auto: finite, "
        "and tangent where the perturbation is below what the precision resolves",
    )
    smart_linear_search: bool = flag(
        False,
        "approximation: every ascent step takes its gradient to first order from the clean pass, with no "
        "forward of its own",
    )
    smart_recompute: bool = flag(
        False,
        "save memory: keep no activations of the clean pass while the perturbed pass's are held "
        "(one or two more forwards)",
    )


Flags = TypeVar("Flags", "AdversaryFlags", "RegularizedConfig")


def recipe_choices(prefix: str) -> Any:
    """The type of ``--PREFIX-recipe``."""
    return ChoiceEnum(list(RECIPES_OF[prefix]))


def with_recipe(flags: Flags, prefix: str) -> Flags:
    """A copy in which every flag of the recipe has a value: what was given, or else the recipe's.

    Sizes of a recipe are in its unit: where another one is given for some of them, a warning names them.
    """
    filled, name = copy.copy(flags), str(getattr(flags, f"{prefix}_recipe"))
    recipe, unit = RECIPES_OF[prefix][name], f"{prefix}_epsilon_unit"
    taken: dict[str, Any] = {key: value for key, value in recipe.items() if getattr(flags, key) is None}
    for key, value in taken.items():
        setattr(filled, key, value)
    measured_in_it = [f"{prefix}_{size}" for size in ("epsilon", "noise_std", "step_size", "start")]
    sizes = [f"--{key.replace('_', '-')} {taken[key]:g}" for key in measured_in_it if key in taken]
    given = str(getattr(filled, unit, None))
    if sizes and recipe.get(unit, given) != given:
        logger.warning(
            f"--{prefix}-epsilon-unit is {given}, but {', '.join(sizes)} of --{prefix}-recipe {name} are "
            f"{recipe[unit]} sizes; give these as well"
        )
    return filled


@dataclass
class RegularizedConfig(SentencePredictionConfig):
    """The teacher, what `sentence_prediction` has, and what the checks before training need to see."""

    smart_bregman_weight: Optional[float] = flag(
        None, "weight of the Bregman term; not set: 1 with --optimizer mbpp, otherwise 0"
    )
    smart_validate_with: ChoiceEnum(["student", "teacher"]) = flag(  # type: ignore[valid-type]
        "student",
        "whose weights validation runs under: the model's, or the teacher's of --optimizer mbpp "
        "(fairseq-validate: always the model's)",
    )
    smart_report_calibration: bool = flag(
        False, "valid lines carry calibration_error, in percent, over 15 bins of equal width (classes)"
    )
    # bare interpolations, so that they do not become flags
    smart_optimizer: Any = II("optimizer")  # all of it: fairseq-validate has none, and so no name in it
    smart_lr_scheduler: Any = II("lr_scheduler")
    smart_restore_file: str = II("checkpoint.restore_file")
    smart_finetune_from: Any = II("checkpoint.finetune_from_model")
    smart_reset_optimizer: Any = II("checkpoint.reset_optimizer")  # Any: see smart_amp
    smart_best_metric: str = II("checkpoint.best_checkpoint_metric")
    smart_maximize_best: Any = II("checkpoint.maximize_best_checkpoint_metric")  # Any: see smart_amp
    smart_disable_validation: Any = II("dataset.disable_validation")
    smart_train_subset: str = II("dataset.train_subset")
    smart_max_update: Any = II("optimization.max_update")
    smart_update_freq: Any = II("optimization.update_freq")
    smart_save_dir: str = II("checkpoint.save_dir")
    smart_amp: Any = II("common.amp")  # of the type bool, fairseq would take the interpolation itself for true
    smart_ddp_backend: str = II("distributed_training.ddp_backend")
    smart_find_unused_parameters: Any = II("distributed_training.find_unused_parameters")
