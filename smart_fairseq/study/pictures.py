"""A study's pictures: differences with their intervals, and against what they cost."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.report import pyplot, save
from .arms import Arm
from .tables import metrics_of

# of the first picture
LEFT_OUT = re.compile(r"^temperature$|^(cross_entropy|calibration_error)_half$|_random_|_attack_0%$")


def _save(figure: Any, path: Path) -> None:
    # the same bytes for the same numbers
    with pyplot().rc_context({"svg.hashsalt": path.stem}):
        save(figure, path, metadata={"Date": None})


def draw(arms: Sequence[Arm], path: Path) -> bool:
    """Dots with intervals: each arm's difference to its baseline, a panel for each metric. False if there is none."""
    compared = [arm for arm in arms if arm.baseline is not None]
    metrics = [name for name in metrics_of(arms) if not LEFT_OUT.search(name)]
    if not compared or not metrics:
        return False
    columns = min(3, len(metrics))
    height = 0.9 + 0.28 * len(compared)
    rows = -(-len(metrics) // columns)
    figure, axes = pyplot().subplots(rows, columns, figsize=(3.6 * columns, height * rows), sharey=True, squeeze=False)
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, metrics):
        axis.axvline(0, color="grey", linewidth=0.8)
        for place, arm in enumerate(compared):
            found = arm.difference(name)
            if found is not None:
                axis.errorbar(found.mean, place, xerr=found.half, fmt="o", color="C0", markersize=4, capsize=2)
        axis.set_title(name.replace("_", " "), fontsize="medium")
        axis.set_yticks(range(len(compared)), [arm.name for arm in compared], fontsize="small")
        axis.set_ylim(len(compared) - 0.5, -0.5)
        axis.tick_params(axis="x", labelsize="small")
        axis.locator_params(axis="x", nbins=4)
    _save(figure, path)
    return True


def draw_against_cost(arms: Sequence[Arm], path: Path) -> bool:
    """Each arm's difference to its baseline, with its interval, over its cost.

    For the task's first metric and the scaled cross entropy.
    """
    compared = [arm for arm in arms if arm.baseline is not None and not math.isnan(arm.cost())]
    metrics = [name for i, name in enumerate(metrics_of(arms)) if i == 0 or name == "cross_entropy_scaled"]
    if not compared or not metrics:
        return False
    (against,) = {arm.baseline.method for arm in compared if arm.baseline is not None}
    figure, axes = pyplot().subplots(1, len(metrics), figsize=(4.2 * len(metrics), 3.4), squeeze=False)
    for axis, name in zip(axes.flat, metrics):
        axis.axhline(0, color="grey", linewidth=0.8)
        found = [(arm.name, arm.cost(), gain) for arm in compared if (gain := arm.difference(name)) is not None]
        for label, cost, gain in found:
            axis.errorbar(cost, gain.mean, gain.half, fmt="o", color="C0", ecolor="C7", elinewidth=0.6, markersize=4)
            # a label stands on the side where the next dot is farther
            nearest = min((there - cost for other, there, _ in found if other != label), key=abs, default=0.0)
            side = {"ha": "right", "xytext": (-4, 3)} if nearest > 0 else {"xytext": (4, 3)}
            axis.annotate(label, (cost, gain.mean), textcoords="offset points", fontsize="x-small", **side)
        axis.set_title(name.replace("_", " "), fontsize="medium")
        axis.set_xlabel(f"processor time of an update, {against} = 1", fontsize="small")
        axis.tick_params(labelsize="small")
        axis.margins(x=0.2, y=0.15)
    _save(figure, path)
    return True
