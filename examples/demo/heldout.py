"""The demo's two models on rows that neither was trained on: a table with intervals, and a picture."""

import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from trainings import laid_out

from smart_fairseq.evaluation import report
from smart_fairseq.evaluation.full import evaluate_model
from smart_fairseq.study.runs import Result

ATTACKED_ROWS = 64
RADII = (0.01, 0.03, 0.1)
SHOWN = ("cross entropy", "calibration error")  # beside the task's own
SMOOTHED = 10  # updates

# what is held out by name -> method -> `evaluate_model`'s result
Found = dict[str, dict[str, Any]]


def one(checkpoint: Path, held_out: Mapping[str, tuple[Path, str]]) -> dict[str, Any]:
    """A model on everything; under attack on the first."""
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    found = {}
    for place, (name, (folder, split)) in enumerate(held_out.items()):
        attack: dict[str, Any] = {} if place else dict(attack=True, attack_rows=ATTACKED_ROWS, attack_radii=RADII)
        found[name] = evaluate_model(checkpoint, folder, split, **attack)
    return found


def evaluate(checkpoints: Mapping[str, Path], held_out: Mapping[str, tuple[Path, str]], jobs: int) -> Found:
    """Every model on everything, ``jobs`` models at a time."""
    print(f"evaluation: {', '.join(held_out)}; under attack {ATTACKED_ROWS} rows of the first", flush=True)
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        models = dict(zip(checkpoints, pool.map(one, checkpoints.values(), [held_out] * len(checkpoints))))
    return {name: {method: models[method][name] for method in checkpoints} for name in held_out}


def table(found: Found, methods: Mapping[str, str]) -> str:
    """Per domain and metric: both models, and the difference with its interval."""
    lines = [["held out", *methods.values(), "difference, 95 % interval"]]
    for name, results in found.items():
        first, other = results.values()
        differences = report.difference(first, other)
        names = list(first["metrics"])
        own = names[: names.index("cross entropy")] if "cross entropy" in names else names[:1]
        under_attack = [metric for metric in names if re.match(r"(accuracy|mean squared error), attack", metric)]
        for metric in dict.fromkeys([*own, *(metric for metric in SHOWN if metric in names), *under_attack]):
            entry = first["metrics"][metric]
            values = [report.number(result["metrics"][metric]["value"]) for result in results.values()]
            change = differences[metric]
            low, high = (f"{end:+.3g}" for end in change["interval"])
            unit = f" ({entry['unit']})" if entry["unit"] else ""
            lines.append([f"{name}, {metric}{unit}", *values, f"{change['value']:+.3g} [{low}, {high}]"])
    rows = ", ".join(f"{name} {next(iter(results.values()))['rows']}" for name, results in found.items())
    return f"{laid_out(lines)}\n\nRows: {rows}. Intervals are the rows' chance alone (bootstrap), not the seed's."


def draw(path: Path, results: Sequence[Result], found: Found, methods: Mapping[str, str]) -> Path:
    """The task's loss while training, and accuracy against the radius of the attack."""
    name, first = next(iter(found.items()))
    figure, (training, attack) = report.pyplot().subplots(1, 2, figsize=(10, 4))
    for method, title in methods.items():
        losses = next(result for result in results if result.run.method == method).logged("task_loss")
        window = min(SMOOTHED, len(losses))
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        training.plot(np.arange(len(smooth)) + window, smooth, label=title)
        values, bars = report.under_attack(first[method], "attack")
        radii = [0.0, *(100 * radius for radius in RADII)]
        attack.errorbar(radii, values, bars, marker="o", capsize=3, label=title)
    quality = report.quality_of(next(iter(first.values())), unit=True)
    training.set(xlabel="update", ylabel=f"task loss (nats, mean of {SMOOTHED} updates)", title="training")
    attack.set(xlabel="radius of the attack (% of the embeddings)", ylabel=quality, title=name)
    for panel in (training, attack):
        panel.legend()
    figure.tight_layout()
    report.save(figure, path)
    return path
