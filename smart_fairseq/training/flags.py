"""Flags that several criteria share, as mixins for their dataclasses.

fairseq reads these annotations at run time: no postponed annotations in this file, and ``typing.Optional``.
"""

from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.criterions.sentence_prediction import SentencePredictionConfig
from fairseq.dataclass import ChoiceEnum
from omegaconf import II

__all__ = ["AdversaryFlags", "RegularizedConfig"]


@dataclass
class AdversaryFlags:
    """The ball, the ascent, and how the term at its end is computed."""

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
            "help": "how the term is computed: finite, by two forwards; tangent, to first order; auto: finite, "
            "and tangent where the perturbation is below what the precision resolves"
        },
    )
    smart_linear_search: bool = field(
        default=False,
        metadata={
            "help": "approximation: every ascent step takes its gradient to first order from the clean pass, with no "
            "forward of its own"
        },
    )
    smart_recompute: bool = field(
        default=False,
        metadata={
            "help": "save memory: keep no activations of the clean pass while the perturbed pass's are held "
            "(one or two more forwards)"
        },
    )


@dataclass
class RegularizedConfig(SentencePredictionConfig):
    """The teacher, what `sentence_prediction` has, and what the checks before training need to see."""

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
    # bare interpolations, so that they do not become flags
    smart_optimizer: Any = II("optimizer")  # all of it: fairseq-validate has none, and so no name in it
    smart_restore_file: str = II("checkpoint.restore_file")
    smart_best_metric: str = II("checkpoint.best_checkpoint_metric")
    smart_train_subset: str = II("dataset.train_subset")
    smart_save_dir: str = II("checkpoint.save_dir")
    smart_amp: Any = II("common.amp")  # of the type bool, fairseq would take the interpolation itself for true
    smart_ddp_backend: str = II("distributed_training.ddp_backend")
