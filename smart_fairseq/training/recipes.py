"""Recipes: the values of flags that are not given. A flag that is given wins over its recipe."""

from typing import Any

__all__ = ["LEAST_MEMORY", "MEMORY", "MOMENTUM", "RECIPES"]

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
# of --mbpp-recipe: the momentum in the first part of training and in the rest; None: that of MEMORY
MOMENTUM: dict[str, tuple[float, float] | None] = {"smart": None, "paper": (0.99, 0.999)}
# share of the run that the teacher remembers; the paper's 0.999, 1000 updates, is longer than RTE's whole run
MEMORY = 0.1
LEAST_MEMORY = 10  # updates
