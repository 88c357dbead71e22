"""The command agreement: accuracy and cross entropy by the annotators' agreement.

Paper: Jiang et al. (2020), section 5.2 and figure 2: rows of MNLI's development parts, which five people labelled, are
grouped by how their votes fall, and a model is compared with the annotators' distribution. The paper's figure calls its
second number KL; a divergence is the cross entropy less the annotators' own entropy, so both are given here.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.lines import Row, as_number, located, read_lines, shown
from ..data.readers import find_sources, read_source
from ..data.tasks import TASKS, Task
from ..errors import UsageError, require
from ..evaluation.calibration import divergence_from
from ..evaluation.intervals import interval, mean_of, resampled
from ..evaluation.labels import vote_shares
from ..evaluation.report import pyplot, save
from ..files import check_file, write_json
from .evaluate import in_order
from .options import existing
from .run import run

GROUPS = ("5/0/0", "4/1/0", "3/2/0", "3/1/1")
ALL = "all"

# by metric: what it is, and how a value is written
METRICS = {
    "accuracy": ("accuracy (%)", "%.1f"),
    "cross_entropy": ("cross entropy (nats)", "%.2f"),
    "divergence": ("divergence from the annotators (nats)", "%.2f"),
}
PRINTED = ("accuracy", "divergence")  # of these in the paper

Points = dict[str, tuple[float, float]]  # group to accuracy and divergence


def _figure(accuracies: Sequence[float], divergences: Sequence[float]) -> Points:
    return dict(zip((ALL, *GROUPS), zip(accuracies, divergences)))


PAPER: dict[str, dict[str, Points]] = {  # figure 2, read off
    "valid": {
        "paper: RoBERTa": _figure((90.6, 97.2, 89.5, 68.0, 69.7), (0.36, 0.08, 0.61, 0.97, 1.12)),
        "paper: SMART": _figure((91.1, 97.7, 90.7, 67.4, 70.7), (0.26, 0.08, 0.41, 0.66, 0.76)),
    },
    "valid1": {
        "paper: RoBERTa": _figure((90.1, 97.4, 87.1, 63.4, 72.1), (0.35, 0.08, 0.62, 0.94, 1.15)),
        "paper: SMART": _figure((91.3, 97.9, 89.2, 65.4, 76.1), (0.25, 0.08, 0.43, 0.64, 0.77)),
    },
}


@dataclass(frozen=True)
class Group:
    """What a model does on the rows whose votes fall alike; cross entropy and divergence in nats."""

    rows: int
    accuracy: float  # percent, against the gold label
    cross_entropy: float
    divergence: float  # KL(annotators, model)
    intervals: dict[str, tuple[float, float]]  # of each of the three: 95 %, from samples of the rows


def group_of(votes: Sequence[str]) -> str:
    """How five votes fall, as in ``4/1/0``; other numbers of votes give names that are in no group."""
    counts = sorted(Counter(votes).values(), reverse=True)
    return "/".join(map(str, [*counts, 0, 0][: max(3, len(counts))]))


def compare(labels: Sequence[str], rows: Sequence[Row], probabilities: np.ndarray) -> dict[str, Group]:
    """All rows that someone labelled, then the groups in the figure's order, empty ones left out.

    ``probabilities``: B x K for ``labels``. Annotators' labels that are not among these are an error.
    """
    annotators = vote_shares(rows, labels)
    log_probabilities = np.log(np.maximum(probabilities, 1e-12))
    cross = -(annotators * log_probabilities).sum(1)
    right = np.array([labels[best] == row.label for best, row in zip(probabilities.argmax(1), rows)], dtype=bool)
    of_rows = dict(zip(METRICS, (100.0 * right, cross, divergence_from(annotators, log_probabilities))))
    names = np.array([group_of(row.votes) for row in rows])
    voted = np.array([bool(row.votes) for row in rows])
    groups = {ALL: voted, **{name: np.asarray(names == name) for name in GROUPS}}
    among = {name: chosen for name, chosen in groups.items() if chosen.any()}
    statistics = {f"{name} {m}": mean_of(of_rows[m], chosen) for name, chosen in among.items() for m in METRICS}
    values = resampled(statistics, len(rows))
    found = {}
    for name, chosen in among.items():
        drawn = {m: values[f"{name} {m}"] for m in METRICS}
        intervals = {m: interval(drawn[m]) for m in METRICS}
        found[name] = Group(int(chosen.sum()), **{m: float(drawn[m][0]) for m in METRICS}, intervals=intervals)
    return found


def read_probabilities(path: Path) -> tuple[dict[str, list[float]], tuple[str, ...]]:
    """Id to probabilities, and their labels, from a file that ``predict --probabilities`` wrote."""
    mark = "probability of "
    lines = read_lines(path)
    names = next(lines)[1].split("\t")
    places = [place for place, name in enumerate(names) if name.startswith(mark)]
    if not places or names[0] != "index":
        raise located(path, "holds no probabilities; write it with predict.py --split ... --probabilities", 1)
    found: dict[str, list[float]] = {}
    for number, line in lines:
        cells = line.split("\t")
        try:
            values = [as_number(cells[place]) for place in places]
        except IndexError:
            values = []
        if not values or not min(values) >= 0 or not abs(sum(values) - 1) < 1e-3:
            raise located(path, f"{len(places)} probabilities with the sum 1 are needed", number)
        if cells[0] in found:
            raise located(path, f"id {shown(cells[0])} was there already", number)
        found[cells[0]] = values
    return found, tuple(names[place].removeprefix(mark) for place in places)


def annotated_rows(task: Task, data_dir: Path, split: str) -> list[Row]:
    """The official rows of a split with the annotators' labels."""
    existing(data_dir)
    found = find_sources(task, data_dir)
    if split not in found:
        raise located(data_dir, f"--data-dir holds no {split} of {task.name}")
    source, folder = found[split]
    rows, _ = read_source(task, source, folder)
    if not any(row.votes for row in rows):
        raise located(Path(rows[0].file), "holds no annotators' labels; another form of the data set has them")
    return rows


def analyse(task: Task, rows: Sequence[Row], path: Path) -> dict[str, Group]:
    """One file of probabilities against the annotators."""
    probabilities, labels = read_probabilities(path)
    if sorted(labels) != sorted(task.labels):
        raise located(path, f"has the classes {', '.join(labels)}, and {task.name} has {', '.join(task.labels)}", 1)
    found = in_order(path, probabilities, [row.id for row in rows], "rows, and the official file {}")
    return compare(labels, rows, np.array(found))


def table(models: dict[str, dict[str, Group]], paper: dict[str, Points]) -> str:
    """A line for each model and group, then the paper's."""
    lines = [f"{'':24} {'votes':>6} {'rows':>6} {'accuracy':>9} {'cross entropy':>14} {'divergence':>11}"]
    lines[0] += "  accuracy, 95 % interval"
    for name, groups in models.items():
        for group, found in groups.items():
            low, high = found.intervals["accuracy"]
            numbers = f"{found.rows:6d} {found.accuracy:9.2f} {found.cross_entropy:14.4f} {found.divergence:11.4f}"
            numbers += f"  [{low:.2f}, {high:.2f}]"
            lines.append(f"{name:24} {group:>6} {numbers}")
    for name, points in paper.items():
        for group, (accuracy, divergence) in points.items():
            lines.append(f"{name:24} {group:>6} {'':6} {accuracy:9.1f} {'':14} {divergence:11.2f}")
    return "\n".join(lines)


def draw(title: str, models: dict[str, dict[str, Group]], paper: dict[str, Points], path: Path) -> None:
    """The figure: each metric by group, a bar for each model with its interval and for the paper's."""
    names = tuple(next(iter(models.values())))
    figure, axes = pyplot().subplots(1, len(METRICS), figsize=(18, 4.5))
    style: dict[str, Any] = {"fontsize": "x-small", "rotation": 90, "padding": 3}
    for axis, (metric, (label, form)) in zip(axes, METRICS.items()):
        width = 0.8 / (len(models) + len(paper) * (metric in PRINTED))
        for number, (name, groups) in enumerate(models.items()):
            values = np.array([getattr(groups[group], metric) for group in names])
            low, high = np.array([groups[group].intervals[metric] for group in names]).T
            bars = np.maximum(0, [values - low, high - values])
            places = np.arange(len(names)) + (number + 0.5) * width - 0.4
            axis.bar_label(axis.bar(places, values, width, yerr=bars, capsize=2, label=name), fmt=form, **style)
        for number, (name, points) in enumerate(paper.items(), start=len(models)):
            if metric in PRINTED:
                values = np.array([points[group][PRINTED.index(metric)] for group in names])
                places = np.arange(len(names)) + (number + 0.5) * width - 0.4
                axis.bar_label(axis.bar(places, values, width, label=name, hatch="//", alpha=0.6), fmt=form, **style)
        axis.set_xticks(range(len(names)), [f"{n}\n{next(iter(models.values()))[n].rows} rows" for n in names])
        axis.set_xlabel("annotators' votes")
        axis.set_title(label)
        axis.margins(y=0.15)
    axes[0].set_ylim(0, 118)
    axes[0].set_yticks(range(0, 101, 20))
    axes[-1].legend(fontsize="small", loc="upper left")
    figure.suptitle(title)
    save(figure, path)


def _named(texts: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or Path(text).is_file():  # a file's own name may have the sign
            name, path = Path(text).stem, text
        if name in found:
            raise UsageError(f"--predictions names {shown(name)} twice; write NAME=FILE with different names")
        found[name] = Path(path)
    return found


def _main(argv: Sequence[str] | None, prog: str) -> None:
    about = "Accuracy and cross entropy of predictions by the annotators' agreement."
    parser = argparse.ArgumentParser(prog=prog, description=about)
    add = parser.add_argument
    add("--data-dir", required=True, help="the folder of the official files, for the annotators' labels")
    add("--predictions", required=True, nargs="+", metavar="[NAME=]FILE", help="of predict --probabilities")
    add("--task", default="MNLI", choices=["MNLI", "SNLI"], help="(%(default)s)")
    add("--split", default="valid", help="valid, valid1 (MNLI mismatched), test (SNLI); (%(default)s)")
    add("--json", help="write the numbers there")
    add("--picture", help="draw them there (PNG), beside the paper's for MNLI; needs matplotlib")
    options = parser.parse_args(argv)
    task = TASKS[options.task]
    for place in (options.json, options.picture):
        check_file(place)
    require(options.split in task.splits, "--split", shown(options.split), f"one of {', '.join(task.splits)}")
    rows = annotated_rows(task, Path(options.data_dir), options.split)
    models = {name: analyse(task, rows, path) for name, path in _named(options.predictions).items()}
    paper = PAPER.get(options.split, {}) if options.task == "MNLI" else {}
    others = Counter(group for row in rows if row.votes and (group := group_of(row.votes)) not in GROUPS)
    voted = sum(bool(row.votes) for row in rows)
    title = f"{options.task} {options.split}, {voted} rows"
    print(title + (f"; {len(rows) - voted} that nobody labelled are left out" if voted < len(rows) else ""))
    print(table(models, paper))
    if others:
        listed = ", ".join(f"{number} rows with votes {name}" for name, number in sorted(others.items()))
        print(f"in {ALL}, and in no group: {listed}")
    if options.json:
        numbers = {name: {group: vars(found) for group, found in groups.items()} for name, groups in models.items()}
        write_json(Path(options.json), numbers)
    if options.picture:
        draw(f"{title}; bars: 95 % intervals over rows", models, paper, Path(options.picture))
        print(f"drew {options.picture}")


def main(argv: Sequence[str] | None = None, prog: str = "agreement.py") -> int:
    """The command; its exit status."""
    return run("agreement", _main, argv, prog)
