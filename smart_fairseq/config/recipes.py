"""Recipes: the values of flags that are not given. A flag that is given wins over its recipe."""

from typing import Any

_PAPER = {
    "smart_weight": 1.0,
    "smart_epsilon_unit": "absolute",
    "smart_epsilon": 1e-5,
    "smart_noise_std": 1e-5,
    "smart_step_size": 1e-3,
    "smart_norm_scope": "example",
    "smart_projection": "ball",
    "smart_embedding": "token",
    "smart_dropout": "shared",
}
# of --smart-recipe
RECIPES: dict[str, dict[str, Any]] = {
    # sizes as shares of an example's embeddings; docs/study.md: 0.05 held short runs back, 0.01 gained less
    "smart": {
        **_PAPER,
        "smart_epsilon_unit": "relative",
        "smart_epsilon": 0.03,
        "smart_noise_std": 1e-3,
        "smart_step_size": 3.0,
    },
    # Jiang et al. (2020), section 4.1, as printed
    "paper": _PAPER,
    # the authors' code, namisan/mt-dnn: no ball, a perturbation of norm 1 for each token
    "release": {
        **_PAPER,
        "smart_norm_scope": "token",
        "smart_projection": "normalize",
        "smart_embedding": "input",
        "smart_dropout": "independent",
    },
    # microsoft/DeBERTa, DeBERTa/sift/sift.py and experiments/glue/mnli.sh: noise of 1e-2 cut at twice that, and a step
    # that adds next to nothing to it, on embeddings of unit variance
    "sift": {
        **_PAPER,
        "smart_weight": 5.0,
        "smart_epsilon": 2e-2,
        "smart_noise_std": 1e-2,
        "smart_step_size": 1e-4,
        "smart_norm_scope": "token",
        "smart_embedding": "normalized",
        "smart_dropout": "independent",
    },
}


def _balls(method: str, steps: int, passes: int, **authors: tuple[float, int, float, float]) -> dict[str, Any]:
    """The recipes of an adversarial method: the default, and its authors' for tasks of GLUE.

    Args:
        steps: of the default.
        passes: what --METHOD-steps counts more than --adv-steps.
        authors: --adv-lr, --adv-steps, --rand-init-mag, --max-norm by task; l2 norms in the embeddings' own units.
    """
    found = {"relative": ("relative", 0.01, 0.006, steps, 0.004)}
    for task, (step_size, adv_steps, start, radius) in authors.items():
        found[task] = ("absolute", radius, step_size, adv_steps + passes, start)
    keys = ("epsilon_unit", "epsilon", "step_size", "steps", "start")
    return {
        name: {f"{method}_{key}": value for key, value in zip(keys, values)} | {f"{method}_norm": "l2"}
        for name, values in found.items()
    }


# fairseq at 3d262bb, examples/rxf: the defaults of its criterion; its README's command for RTE has another weight
_R3F = {"r3f_epsilon": 1e-5, "r3f_epsilon_unit": "absolute", "r3f_noise": "uniform", "r3f_dropout": "independent"}
# zhuchen03/FreeLB at d8c1695, fairseq-RoBERTa/launch/VanillaPGD/*.sh and launch/FreeAT/*.sh, which differ for MNLI
# alone; FreeAT's --adv-steps m takes m updates on a batch. RTE has no lines; all of PGD's for QNLI are commented out
_PGD_AND_FREEAT = {
    "qnli": (1e-1, 2, 1.5e-1, 1.5e-1),
    "qqp": (1.5e-1, 2, 3.2e-1, 6.2e-1),
    "sst_2": (1e-1, 2, 1.0, 6e-1),
    "cola": (5e-2, 3, 4e-1, 2e-1),
    "mrpc": (4e-2, 3, 6.4e-1, 4e-1),
    "sts_b": (1e-1, 3, 1.6e-1, 2.8e-1),
}
# by the prefix of a criterion's flags, of --PREFIX-recipe; the first is its default
RECIPES_OF: dict[str, dict[str, dict[str, Any]]] = {
    "smart": RECIPES,
    "pgd": _balls("pgd", steps=2, passes=0, mnli=(1e-1, 2, 2e-1, 2e-1), **_PGD_AND_FREEAT),
    # launch/FreeLB/*.sh, where --adv-steps K takes K + 1 passes; RTE's lines are commented out
    "freelb": _balls(
        "freelb",
        steps=3,
        passes=1,
        mnli=(1e-1, 2, 1e-1, 3e-1),
        qnli=(1e-1, 2, 2e-1, 2e-1),
        qqp=(2e-1, 2, 3.2e-1, 7e-1),
        sst_2=(1e-1, 2, 1.0, 6e-1),
        cola=(2.5e-2, 3, 4e-1, 3e-1),
        mrpc=(4e-2, 3, 6.4e-1, 4e-1),
        sts_b=(1e-1, 3, 1.6e-1, 2.8e-1),
        rte=(6e-2, 3, 1.6e-1, 1.4e-1),
    ),
    "freeat": _balls("freeat", steps=3, passes=0, mnli=(1e-1, 2, 1e-2, 2e-1), **_PGD_AND_FREEAT),
    "r3f": {"paper": {"r3f_weight": 1.0, **_R3F}, "rte": {"r3f_weight": 0.7, **_R3F}},
    # dropreg/R-Drop at 7ab94f4, huggingface_transformer_src: modeling_bert.py adds to both task losses, means over a
    # batch, half the mean of both KL as a sum over it: an alpha of half the batch, whose size README.md (at 37263d2)
    # has for each task; for a regression 1
    "rdrop": {
        "paper": {"rdrop_weight": 1.0},
        **{task: {"rdrop_weight": 32 / 2} for task in ("mnli", "qnli", "qqp", "sst_2")},
        **{task: {"rdrop_weight": size / 2} for task, size in (("cola", 16), ("mrpc", 16), ("rte", 8))},
        "sts_b": {"rdrop_weight": 1.0},
    },
}
# of --mbpp-recipe: the momentum in the first part of training and in the rest; None: that of MEMORY
MOMENTUM: dict[str, tuple[float, float] | None] = {"smart": None, "paper": (0.99, 0.999)}
# share of the run that the teacher remembers; the paper's 0.999, 1000 updates, is longer than RTE's whole run
MEMORY = 0.1
LEAST_MEMORY = 10  # updates
