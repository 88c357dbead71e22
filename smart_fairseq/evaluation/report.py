"""What `full.evaluate_model` found, for people and programs: a table, numbers for JSON, arrays, pictures."""

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from ..files import whole_file
from .calibration import BINS
from .intervals import interval

Result = dict[str, Any]
ARRAYS = ("resampled", "arrays")  # what is not for JSON


def number(value: float) -> str:
    """Four significant digits.

    >>> number(66.425993), number(1.3e-6), number(409.0), number(float("nan"))
    ('66.43', '1.3e-06', '409', '-')
    """
    return "-" if math.isnan(value) else f"{value:.4g}"


def aligned(cells: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of cells in columns, so many of the first ones flush left and the others right."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    places = [f"{{:{'<' if place < left else '>'}{width}}}" for place, width in enumerate(widths)]
    return "\n".join("  ".join(places).format(*row).rstrip() for row in cells)


def _with_interval(entry: Mapping[str, Any]) -> tuple[str, str]:
    return number(entry["value"]), "[{}, {}]".format(*map(number, entry["interval"]))


def difference(first: Result, other: Result) -> dict[str, dict[str, Any]]:
    """Metric to value and paired interval of ``other`` less ``first``; both of the same rows and samples."""
    shared = {name: other["resampled"][name] - values for name, values in first["resampled"].items()}
    return {name: {"value": float(values[0]), "interval": interval(values)} for name, values in shared.items()}


def comparison(results: Sequence[Result]) -> str:
    """Aligned columns: metric, then value and interval of each model, and of its difference to the first."""
    names = [chr(ord("A") + place) for place in range(len(results))]
    columns: list[tuple[str, Mapping[str, Any]]] = []
    for name, result in zip(names, results):
        columns.append((name if len(results) > 1 else "value", result["metrics"]))
        if result is not results[0]:
            columns.append((f"{name} - A", difference(results[0], result)))
    cells = [["metric", *(text for name, _ in columns for text in (name, "95 % interval"))]]
    for name, entry in results[0]["metrics"].items():
        unit = f" ({entry['unit']})" if entry["unit"] else ""
        cells.append([name + unit, *(text for _, found in columns for text in _with_interval(found[name]))])
    return aligned(cells, left=len(cells[0]))


def notes(result: Result) -> list[str]:
    """What a reader of the table must know beside it."""
    found = []
    if "temperature" in result:
        found.append(f"temperature {number(result['temperature'])}, fitted on one half of the rows")
    if "line" in result:
        slope, offset = number(result["line"]["slope"]), number(result["line"]["offset"])
        found.append(f"straight line {slope} x output + {offset}, fitted on one half of the rows")
    if "attack" in result:
        found.append(f"attack: {result['attack']['steps']} steps, {result['attack']['rows']} rows")
    if "typos" in result:
        typos = result["typos"]
        lost = typos["rows"] - typos["exact"]
        found.append(f"typing errors: in {typos['changed']} of {typos['rows']} rows")
        if lost:
            found.append(f"{lost} rows are not what they were once decoded and encoded, errors or not")
    return found


def short(names: Sequence[str]) -> list[str]:
    """Paths without the folders and file names that they share; a single one by its last two.

    >>> short(["runs/plain-1/best.pt", "runs/smart-1/best.pt"]), short(["runs/plain-1/best.pt"])
    (['plain-1', 'smart-1'], ['plain-1/best.pt'])
    >>> short(["runs/runs/best.pt", "runs/best.pt"])
    ['runs/runs/best.pt', 'runs/best.pt']
    """
    parts = [Path(name).parts for name in names]
    if len(parts) == 1:
        return ["/".join(parts[0][-2:])]

    def shared(lists: Sequence[Sequence[str]]) -> int:
        return len(list(takewhile(lambda column: len(set(column)) == 1, zip(*lists))))

    start, end = shared(parts), shared([part[::-1] for part in parts])
    found = ["/".join(part[start : len(part) - end]) or part[-1] for part in parts]
    return found if len(set(found)) == len(set(names)) else list(names)


def for_json(results: Mapping[str, Result]) -> dict[str, Any]:
    """Checkpoint to all numbers, with the difference to the first; nan as null."""
    first = next(iter(results.values()))
    found: dict[str, Any] = {}
    for name, result in results.items():
        found[name] = {key: value for key, value in result.items() if key not in ARRAYS}
        if result is not first:
            found[name]["difference to the first"] = difference(first, result)
    return found


def write_arrays(path: Path, results: Mapping[str, Mapping[str, Result]], ids: Mapping[str, Sequence[str]]) -> None:
    """All arrays in one .npz: SPLIT.ids, and SPLIT.NUMBER.NAME with the checkpoint's number from 0."""
    arrays = {f"{split}.ids": np.array(values) for split, values in ids.items()}
    for split, models in results.items():
        for place, result in enumerate(models.values()):
            arrays |= {f"{split}.{place}.{name}": values for name, values in result["arrays"].items()}
    with whole_file(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


# Pictures ---------------------------------------------------------------------------------------------------------


def pyplot() -> Any:
    """matplotlib without a window. Raises `UsageError` where it is not installed."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    try:
        import matplotlib
    except ImportError:
        raise UsageError("--picture needs matplotlib; install it with pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path, **more: Any) -> None:
    """The whole picture or none, in the format of the name, else PNG; the figure is closed."""
    kind, kinds = path.suffix[1:].lower() or "png", figure.canvas.get_supported_filetypes()
    if kind not in kinds:
        raise UsageError(f"{path}: no picture ends in .{kind}; allowed: {', '.join(sorted(kinds))}")
    figure.tight_layout()
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=150, format=kind, **more)
    pyplot().close(figure)


def draw(results: Mapping[str, Result], prefix: Path) -> list[Path]:
    """PREFIX-reliability.png, of a regression PREFIX-outputs.png; PREFIX-attack.png where there was one; the paths."""
    results, first = dict(zip(short(list(results)), results.values())), next(iter(results.values()))
    figures = {"reliability": _reliability(results)} if "reliability" in first else {"outputs": _outputs(results)}
    if "attack" in first:
        figures["attack"] = _radii(results)
    drawn = {prefix.with_name(f"{prefix.name}-{name}.png"): figure for name, figure in figures.items()}
    for path, figure in drawn.items():
        save(figure, path)
    return list(drawn)


def _reliability(results: Mapping[str, Result]) -> Any:
    figure, (above, below) = pyplot().subplots(2, 1, figsize=(5, 6), sharex=True, height_ratios=(3, 1))
    above.plot((0, 1), (0, 1), color="grey", linestyle=":", linewidth=1)
    for place, (name, result) in enumerate(results.items()):
        bins = result["reliability"]
        points = [(c, a) for c, a in zip(bins["confidence"], bins["accuracy"]) if c is not None]
        error = number(result["metrics"]["calibration error"]["value"])
        above.plot(*zip(*points), marker="o", label=f"{name}, error {error} %")
        shares = np.array(bins["rows"]) / sum(bins["rows"])
        width = 1 / BINS / len(results)
        below.bar((np.arange(BINS) / BINS) + (place + 0.5) * width, shares, width)
    above.set_ylabel("accuracy")
    above.legend(fontsize="small")
    below.set_ylabel("share of rows")
    below.set_xlabel("confidence")
    return figure


def _outputs(results: Mapping[str, Result]) -> Any:
    """A regression's outputs against the labels, in the labels' unit."""
    figure, axes = pyplot().subplots(
        1, len(results), figsize=(4 * len(results), 4), sharex=True, sharey=True, squeeze=False
    )
    for place, (axis, (name, result)) in enumerate(zip(axes[0], results.items())):
        labels, outputs = (result["arrays"][kind].ravel() * result["divisor"] for kind in ("gold", "logits"))
        axis.axline((0, 0), slope=1, color="grey", linestyle=":", linewidth=1)
        axis.scatter(labels, outputs, s=6, alpha=0.4, linewidths=0, color=f"C{place}")
        error = number(result["metrics"]["mean error"]["value"])
        axis.set_title(f"{name}, mean error {error}", fontsize="small")
        axis.set_xlabel("label")
    axes[0, 0].set_ylabel("output")
    return figure


def quality_of(result: Result, unit: bool = False) -> str:
    """The metric that is followed from radius to radius."""
    return f"accuracy{' (%)' if unit else ''}" if result["classes"] else "mean squared error"


def under_attack(result: Result, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The quality before and at each radius, [1 + R], and the bars down and up to its intervals' ends, [2, 1 + R].

    ``kind``: attack or random signs. A bar is 0 where a value lies beyond that end.
    """
    quality, radii = quality_of(result), result["attack"]["radii"]
    names = ["attacked rows before", *(f"{kind} at {100 * radius:g} %" for radius in radii)]
    entries = [result["metrics"][f"{quality}, {name}"] for name in names]
    values = np.array([entry["value"] for entry in entries])
    low, high = np.array([entry["interval"] for entry in entries]).T
    return values, np.maximum(0, [values - low, high - values])


def _radii(results: Mapping[str, Result]) -> Any:
    figure, axis = pyplot().subplots(figsize=(5, 4))
    first = next(iter(results.values()))
    ticks = ["0", *(f"{100 * radius:g} %" for radius in first["attack"]["radii"])]
    for place, (name, result) in enumerate(results.items()):
        for kind, style in (("attack", "-"), ("random signs", ":")):
            values, bars = under_attack(result, kind)
            axis.errorbar(range(len(values)), values, bars, label=f"{name}, {kind}", linestyle=style, color=f"C{place}")
    axis.set_xticks(range(len(ticks)), ticks)
    axis.set_xlabel("radius (share of the embeddings' rms)")
    axis.set_ylabel(quality_of(first, unit=True))
    axis.legend(fontsize="small")
    return figure
