"""All that is measured of one model on one split, with intervals."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import log_softmax

from ..data.binarize import read_manifest
from ..data.bpe import BpeFiles, shared_vocabulary
from ..data.lines import located
from ..data.tasks import Task
from ..inference import Model
from . import intervals
from .calibration import (
    brier,
    calibration_error,
    cross_entropy,
    divergence_from,
    fit_line,
    fit_temperature,
    reliability,
)
from .draws import rows_to_attack, split_in_halves
from .intervals import Statistic, mean_of
from .labels import annotator_shares, gold_labels
from .metrics import METRICS
from .texts import write_with_typos

RADII = (0.01, 0.03, 0.1, 0.3)  # of the attack


class Metric(NamedTuple):
    """What the table shows as ``name (unit)``."""

    unit: str
    statistic: Statistic


Metrics = dict[str, Metric]


def evaluate_model(
    checkpoint: Path | Model,
    folder: Path,
    split: str = "valid",
    *,
    attack: bool = False,
    attack_rows: int | None = None,
    attack_radii: Sequence[float] = RADII,
    typos: BpeFiles | None = None,
    max_tokens: int = 8192,
    resamples: int = intervals.RESAMPLES,
    seed: int = 1,
    threads: int | None = 1,
) -> dict[str, Any]:
    """What a model does on a labelled split, beyond its accuracy; a path is loaded on the CPU.

    Args:
        folder: a data folder with labels; annotators/SPLIT.tsv in it is read, see `labels.annotator_shares`.
        attack: in embedding space, which takes some 170 passes over each row.
        attack_rows: how many rows, drawn by ``seed``; None: all.
        attack_radii: rising, as shares of the embeddings' root mean square; the sensitivity is at the first.
        typos: the encoder's files that the folder was made with, for typing errors.
        seed: of the samples of rows, the half that fits the temperature, the attack's start and the typing errors.
        threads: torch's, while this runs; None leaves them.
    Returns:
        Numbers for JSON (``metrics``: name -> value, interval, unit; ``temperature``, ``reliability``, ...), and two
        that are arrays: ``resampled``, name -> the value and those of the samples [1 + R], from which paired
        differences between models follow, and ``arrays``: gold, logits and probabilities [N, K], outputs under
        attack [radii, N, K], with typing errors [N, K].
    Raises:
        UsageError: the checkpoint, the folder or the encoder do not belong together, or a file is not in order.
    """
    with _threads(threads):
        model = checkpoint if isinstance(checkpoint, Model) else Model(checkpoint, folder, cpu=True)
        model = model.on(folder)
        if model.task.ranking or model.task.candidates:
            raise located(folder, f"--full knows classes and regressions, and {model.task.name} ranks: leave it out")
        task, labels = model.task, gold_labels(folder, split, model.task)
        if len(labels) < 2:
            raise located(folder, f"{split} has {len(labels)} rows, and 2 are needed")
        shares = None if task.regression else annotator_shares(folder, split, model.classes)
        if typos is not None:
            shared_vocabulary(folder, typos)  # before the work
        found = model.predict(split, max_tokens)
        if task.regression:
            gold = np.array(labels, dtype=float) / task.divisor
        else:
            gold = np.array([model.classes.index(label) for label in labels])
        arrays = {"gold": gold, "logits": found.logits, "probabilities": found.scores}
        numbers, temperature = np.arange(len(gold)), 1.0
        half = np.isin(numbers, split_in_halves(len(gold), seed)[0])
        metrics = _official(task, model.classes, found.logits, gold, read_manifest(folder).get("parts", {}).get(split))
        result: dict[str, Any] = {"task": task.name, "split": split, "rows": len(gold), "classes": list(model.classes)}
        if not task.regression:
            temperature = fit_temperature(found.logits[half], gold[half])
            metrics |= _of_classes(found.logits, gold, ~half, temperature)
            if shares is not None:
                apart = divergence_from(shares, log_softmax(found.logits, axis=1))
                metrics["divergence from annotators"] = Metric("nats", mean_of(apart, shares.sum(1) > 0))
            result |= {"temperature": temperature, "reliability": reliability(found.logits, gold)}
        else:
            line = fit_line(found.logits[half, 0], gold[half])
            metrics |= _of_regression(found.logits[:, 0], gold, ~half, line, task.divisor)
            result |= {"line": dict(zip(("slope", "offset"), line)), "divisor": task.divisor}
        if typos is not None:
            with tempfile.TemporaryDirectory() as scratch:
                written = write_with_typos(folder, split, typos, Path(scratch), model.max_positions, seed)
                arrays["typos"] = model.on(Path(scratch)).predict(split, max_tokens).logits
            metrics |= _quality(task, arrays["typos"], gold, "typing errors")
            if not task.regression:
                lost = cross_entropy(arrays["typos"], gold)
                metrics["cross entropy, typing errors"] = Metric("nats", mean_of(lost))
            result["typos"] = written
        if attack:
            from .attack import STEPS, attacked_outputs

            chosen = np.isin(numbers, rows_to_attack(len(gold), attack_rows or len(gold), seed))
            # a gradient keeps activations, which a prediction does not
            outputs = attacked_outputs(model, split, gold, chosen, temperature, max_tokens // 4, seed, attack_radii)
            metrics |= _under_attack(task, found.logits, gold, outputs, temperature, chosen, attack_radii)
            result["attack"] = {"radii": attack_radii, "steps": STEPS, "rows": int(chosen.sum())}
            arrays |= {f"attack_{name}": values for name, values in outputs.items()}
        resampled = intervals.resampled({n: m.statistic for n, m in metrics.items()}, len(gold), resamples, seed)
        result["metrics"] = {
            name: {"value": float(values[0]), "interval": intervals.interval(values), "unit": metrics[name].unit}
            for name, values in resampled.items()
        }
        return result | {"resamples": resamples, "seed": seed, "resampled": resampled, "arrays": arrays}


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _official(
    task: Task, classes: Sequence[str], logits: np.ndarray, gold: np.ndarray, parts: Sequence[Any] | None
) -> Metrics:
    """The task's own metrics, and a regression's squared error; as `metrics` has them."""
    if task.regression:
        predicted, true = logits[:, 0] * task.divisor, gold * task.divisor
        squared = Metric("", mean_of((predicted - true) ** 2))
        return {name: Metric("%", METRICS[name](predicted, true)) for name in task.metrics} | {
            "mean squared error": squared
        }
    found: Metrics = {}
    predicted, true = np.array(classes)[logits.argmax(1)], np.array(classes)[gold]
    start = 0
    for name, rows in parts if parts and len(parts) > 1 else []:
        place = np.arange(len(gold))
        within = (place >= start) & (place < start + rows)
        found[f"accuracy {name}"] = Metric("%", mean_of(100.0 * (predicted == true), within))
        start += rows
    names = dict.fromkeys([*task.metrics, "accuracy"])
    return found | {name: Metric("%", METRICS[name](predicted, true)) for name in names}


def _of_classes(logits: np.ndarray, gold: np.ndarray, rest: np.ndarray, temperature: float) -> Metrics:
    """How good the probabilities are; with the temperature on the ``rest`` of the rows, which did not fit it."""
    raw, scaled = cross_entropy(logits, gold), cross_entropy(logits / temperature, gold)
    return {
        "cross entropy": Metric("nats", mean_of(raw)),
        "cross entropy, fairseq's unit": Metric("bits", mean_of(raw / np.log(2))),
        "calibration error": Metric("%", calibration_error(logits, gold)),
        "Brier score": Metric("", mean_of(brier(logits, gold))),
        "cross entropy, other half": Metric("nats", mean_of(raw, rest)),
        "cross entropy, other half, calibrated": Metric("nats", mean_of(scaled, rest)),
        "calibration error, other half": Metric("%", calibration_error(logits, gold, rest)),
        "calibration error, other half, calibrated": Metric("%", calibration_error(logits / temperature, gold, rest)),
    }


def _of_regression(
    predicted: np.ndarray, gold: np.ndarray, rest: np.ndarray, line: tuple[float, float], divisor: float
) -> Metrics:
    """How far the outputs are off on the whole; with the straight line on the ``rest`` of the rows, as with classes."""
    slope, offset = line
    raw, scaled = ((found - gold) * divisor for found in (predicted, slope * predicted + offset))
    return {
        "mean error": Metric("", mean_of(raw)),
        "mean squared error, other half": Metric("", mean_of(raw**2, rest)),
        "mean squared error, other half, calibrated": Metric("", mean_of(scaled**2, rest)),
    }


def _quality(task: Task, outputs: np.ndarray, gold: np.ndarray, name: str, among: np.ndarray | None = None) -> Metrics:
    """Accuracy, or squared error, of outputs in some trouble."""
    if task.regression:
        errors = ((outputs[:, 0] - gold) * task.divisor) ** 2
        return {f"mean squared error, {name}": Metric("", mean_of(errors, among))}
    return {f"accuracy, {name}": Metric("%", mean_of(100.0 * (outputs.argmax(1) == gold), among))}


def divergence(outputs: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Symmetric KL in nats, [N]; squared error of a single output."""
    import torch

    from ..method.divergence import squared_error, symmetric_kl

    apart = squared_error if outputs.shape[1] == 1 else symmetric_kl
    return np.asarray(apart(torch.from_numpy(outputs), torch.from_numpy(clean)))


def _under_attack(
    task: Task,
    clean: np.ndarray,
    gold: np.ndarray,
    outputs: Mapping[str, np.ndarray],
    temperature: float,
    chosen: np.ndarray,
    radii: Sequence[float],
) -> Metrics:
    """Metrics by radius, from the clean outputs and those that `attack.attacked_outputs` found."""
    found = _quality(task, clean, gold, "attacked rows before", chosen)
    unit = "" if task.regression else "nats"
    for place, radius in enumerate(radii):
        at = f"{100 * radius:g} %"
        loss, apart, random = (outputs[name][place] for name in ("loss", "divergence", "random"))
        for name, values in (("attack", loss), ("random signs", random)):
            found |= _quality(task, values, gold, f"{name} at {at}", chosen)
        # either way can be the worse one
        worst = np.fmax(divergence(loss, clean), divergence(apart, clean))
        found[f"divergence, attack at {at}"] = Metric(unit, mean_of(worst, chosen))
        found[f"divergence, random signs at {at}"] = Metric(unit, mean_of(divergence(random, clean), chosen))
        if not place:
            soft = np.fmax(*(divergence(o / temperature, clean / temperature) for o in (loss, apart)))
            found["sensitivity"] = Metric("", mean_of(worst / radius**2, chosen))
            found["sensitivity, random signs"] = Metric("", mean_of(divergence(random, clean) / radius**2, chosen))
            if not task.regression:
                found["sensitivity, calibrated"] = Metric("", mean_of(soft / radius**2, chosen))
    return found
