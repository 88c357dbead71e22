"""A study's report from its lines: tables in Markdown and CSV, a picture, a table between two marks of a document."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

from ..commands.predict import replace_file
from ..data.lines import located
from ..data.metrics import METRICS
from ..errors import UsageError
from ..evaluation.report import pyplot, save
from .lines import Line
from .plan import Asked, Plan, arm_of
from .report import half_width
from .studying import lines_of

SECONDS = ("seconds_per_update", "cpu_seconds_per_update")
# beside the task's own, in the short table
SHORT = ("cross_entropy", "cross_entropy_scaled", "calibration_error")
LEFT_OUT_OF_PICTURES = ("temperature", "cross_entropy_half", "calibration_error_half")
HELP = """Mean ± standard deviation over the seeds; differences to {baseline} over the same seeds, with their
95 % t interval. Cross entropy in nats; `_half` and `_scaled`: on the half of the rows that the temperature was not
fitted on, before and after scaling. A term's share is its mean over the last tenth of the updates, unweighted, over the
task loss. Cost: processor time of an update over {baseline}'s."""


class Difference(NamedTuple):
    """Of two arms over the seeds that both have: the mean, half of its 95 % t interval (nan for one seed)."""

    mean: float
    half: float
    pairs: int


class Arm(NamedTuple):
    """A method with the grid's values on one task, the lines of its seeds, and the arm that it is compared with."""

    name: str
    lines: Mapping[int, Line]
    baseline: "Arm | None"

    def values(self, metric: str) -> dict[int, float]:
        """By seed: a metric, seconds, or a term's share of the task loss (``smart_loss/task_loss``)."""
        found = {seed: _value(line, metric) for seed, line in self.lines.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def numbers(self, metric: str) -> list[float]:
        """The `values`, without the seeds."""
        return list(self.values(metric).values())

    def difference(self, metric: str) -> Difference | None:
        """To the baseline; None without one, or without a seed that both have."""
        return None if self.baseline is None else difference(self.values(metric), self.baseline.values(metric))

    def cost(self) -> float:
        """Processor time of an update as a multiple of the baseline's, over the seeds that both have."""
        if self.baseline is None:
            return 1.0
        ours, theirs = self.values(SECONDS[1]), self.baseline.values(SECONDS[1])
        ratios = [ours[seed] / theirs[seed] for seed in ours if seed in theirs]
        return fmean(ratios) if ratios else math.nan


def _value(line: Line, name: str) -> float | None:
    if "/" in name:
        term, task = (line["terms"].get(part) for part in name.split("/"))
        return None if term is None or not task else float(term / task)
    value = line["metrics"].get(name, line.get(name))
    return None if value is None else float(value)


def difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Paired by seed; a pair with a number that is not finite is left out."""
    gains = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    gains = [gain for gain in gains if math.isfinite(gain)]
    return Difference(fmean(gains), half_width(gains), len(gains)) if gains else None


def arms_of(plan: Plan) -> dict[str, list[Arm]]:
    """Per task, the arms that have lines, in the plan's order.

    Each is compared with the plan's first method, with the same values of the grid where that has them too.
    """
    found: dict[tuple[str, str], tuple[Asked, dict[int, Line]]] = {}
    for asked in plan.runs():
        found.setdefault((asked.task.name, asked.arm), (asked, {}))
    for line in lines_of(plan):
        found[line["task"], arm_of(line["method"], line["variant"])][1][line["seed"]] = line
    first = next(iter(plan.methods))
    tasks: dict[str, list[Arm]] = {task.name: [] for task in plan.tasks}
    baselines: list[tuple[Asked, Arm]] = []
    for asked, lines in found.values():
        if not lines:
            continue
        arms, variant = tasks[asked.task.name], asked.variant.items()
        if asked.method == first:
            arms.append(Arm(asked.arm, lines, None))
            baselines.append((asked, arms[-1]))
        else:
            alike = (arm for of, arm in baselines if of.task is asked.task and of.variant.items() <= variant)
            arms.append(Arm(asked.arm, lines, next(alike, None)))
    return tasks


# Tables -------------------------------------------------------------------------------------------------------------


def _cells(arm: Arm, metric: str) -> tuple[str, str, str]:
    """The median, the mean with its deviation, the difference with its interval; percents with two digits."""
    percent = metric in METRICS or metric.startswith("calibration")
    values, found, digits = arm.numbers(metric), arm.difference(metric), 2 if percent else 4
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    gain = "" if found is None else f"{found.mean:+.{digits}f}"
    if found is not None and not math.isnan(found.half):
        low, high = found.mean - found.half, found.mean + found.half
        gain += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{median(values):.{digits}f}", f"{fmean(values):.{digits}f}{spread}", gain


def _markdown(table: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([lines[0], "| --- " * len(table[0]) + "|", *lines[1:]])


def _metrics(arms: Sequence[Arm]) -> list[str]:
    """All that the lines hold; the task's own come first, as they were written."""
    return list(dict.fromkeys(name for arm in arms for line in arm.lines.values() for name in line["metrics"]))


def _shares(arms: Sequence[Arm]) -> list[str]:
    terms = {name for arm in arms for line in arm.lines.values() for name in line["terms"]}
    return [f"{name}/task_loss" for name in sorted(terms) if name.endswith("_loss") and name != "task_loss"]


def short_table(arms: Sequence[Arm]) -> str:
    """A line for each arm, in Markdown: what matters most, and in brackets the difference to the baseline."""
    metrics = [name for name in _metrics(arms) if name in METRICS or name in SHORT]
    shares = _shares(arms)
    titles = [name.replace("_", " ") for name in metrics]
    table = [["method", "seeds", *titles, *(f"`{name}`" for name in shares), "cost"]]
    for arm in arms:
        cells = [arm.name, str(len(arm.lines))]
        for name in metrics:
            _, value, gain = _cells(arm, name)
            cells.append(f"{value.split(' ')[0]} ({gain})" if gain else value)
        for name in shares:
            values = arm.numbers(name)
            cells.append(f"{fmean(values):.2g}" if values else "")
        table.append([*cells, f"{arm.cost():.2f}"])
    return _markdown(table)


def long_table(arms: Sequence[Arm]) -> str:
    """Every metric of every arm, in Markdown."""
    table = [["metric", "method", "median", "mean ± deviation", "difference [95 %]"]]
    for name in (*_metrics(arms), *SECONDS):
        table += [[name, arm.name, *_cells(arm, name)] for arm in arms if arm.numbers(name)]
    return _markdown(table)


def as_csv(tasks: Mapping[str, Sequence[Arm]]) -> str:
    """The same numbers with all their digits."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    titles = ("seeds", "median", "mean", "deviation", "baseline", "pairs", "difference", "low", "high")
    table.writerow(["task", "method", "metric", *titles])
    for task, arms in tasks.items():
        for arm in arms:
            for name in (*_metrics(arms), *_shares(arms), *SECONDS):
                values = arm.numbers(name)
                if not values:
                    continue
                row = [task, arm.name, name, len(values), median(values), fmean(values)]
                row.append(stdev(values) if len(values) > 1 else "")
                found = arm.difference(name)
                if found is not None and arm.baseline is not None:
                    row += [arm.baseline.name, found.pairs, found.mean]
                    row += ["", ""] if math.isnan(found.half) else [found.mean - found.half, found.mean + found.half]
                table.writerow([*row, *[""] * (12 - len(row))])
    return text.getvalue()


def _made_with(lines: Sequence[Line]) -> str:
    """Rows, seeds, versions and commits in words."""

    def all_of(*names: str) -> str:
        return ", ".join(dict.fromkeys(" ".join(str(line[name]) for name in names) for line in lines))

    draw = lines[0]["draw"]
    flip = f", {draw['flip']:.0%} of their labels flipped" if draw["flip"] else ""
    train, valid = (", ".join(sorted({str(line["rows"][part]) for line in lines})) for part in ("train", "valid"))
    commits, torch = all_of("commit"), all_of("torch")
    updates = ", ".join(sorted({str(line["updates"]) for line in lines}))
    return (
        f"{train} training rows{flip}, {updates} updates, evaluated on {valid} rows; "
        f"commit {commits or 'unknown'}, torch {torch}, {max(line['date'] for line in lines)}."
    )


# Files --------------------------------------------------------------------------------------------------------------


def write_report(plan: Plan) -> list[Path]:
    """report.md, report.csv and a picture for each task in the plan's ``out``; their paths. Raises without lines."""
    tasks = {name: arms for name, arms in arms_of(plan).items() if arms}
    if not tasks:
        raise located(plan.out / "runs.jsonl", 0, "holds no run of this plan; run the study first")
    first = next(iter(plan.methods))
    wanted, there = len(plan.runs()), sum(len(arm.lines) for arms in tasks.values() for arm in arms)
    parts = [f"# {plan.path.stem}", f"{there} of {wanted} runs. {HELP.format(baseline=first)}"]
    written = [plan.out / "report.md", plan.out / "report.csv"]
    for name, arms in tasks.items():
        lines = [line for arm in arms for line in arm.lines.values()]
        parts += [f"## {name}", _made_with(lines), short_table(arms)]
        for picture, drawn, title in (
            (plan.out / f"{name}.svg", draw, f"Differences to {first}, with their 95 % intervals"),
            (plan.out / f"{name}-cost.svg", draw_against_cost, f"Differences to {first} against the cost of an update"),
        ):
            if drawn(arms, picture):
                parts.append(f"![{title}]({picture.name})")
                written.append(picture)
        parts += [f"### {name}: every metric", long_table(arms)]
    replace_file(written[0], "\n\n".join(parts) + "\n")
    replace_file(written[1], as_csv(tasks))
    return written


def put_into(plan: Plan, document: Path) -> list[str]:
    """Put each task's short table between its marks in a document; the tasks that have some. Raises `UsageError`.

    The marks are lines of their own, `<!-- study:TASK begin -->` and `<!-- study:TASK end -->`.
    """
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise located(document, 0, f"--into: cannot be read ({error.strerror})") from None
    done = []
    for name, arms in arms_of(plan).items():
        marks = [f"<!-- study:{name} {word} -->" for word in ("begin", "end")]
        counts = [text.count(mark) for mark in marks]
        if counts == [0, 0] or not arms:
            continue
        if counts != [1, 1] or text.index(marks[0]) > text.index(marks[1]):
            message = f"--into: the marks {' and '.join(marks)} must be there once each, in this order"
            raise located(document, 0, message)
        lines = [line for arm in arms for line in arm.lines.values()]
        before, after = text.split(marks[0])[0], text.split(marks[1])[1]
        text = before + "\n".join([marks[0], short_table(arms), "", _made_with(lines), marks[1]]) + after
        done.append(name)
    if not done:
        names = ", ".join(task.name for task in plan.tasks)
        raise located(document, 0, f"--into: has no marks <!-- study:TASK begin --> for a task with runs ({names})")
    replace_file(document, text)
    return done


def _plots() -> Any:
    """pyplot, or None with a word where matplotlib is not installed."""
    try:
        return pyplot()
    except UsageError:
        print("no picture: that needs matplotlib; install it with pip install matplotlib")
        return None


def _save(figure: Any, path: Path) -> bool:
    figure.tight_layout()
    # the same bytes for the same numbers
    with pyplot().rc_context({"svg.hashsalt": path.stem}):
        save(figure, path, metadata={"Date": None})
    return True


def draw(arms: Sequence[Arm], path: Path) -> bool:
    """Dots with intervals: each arm's difference to its baseline, a panel for each metric. False if there is none."""
    compared = [arm for arm in arms if arm.baseline is not None]
    metrics = [name for name in _metrics(arms) if name not in LEFT_OUT_OF_PICTURES]
    plots = _plots() if compared else None
    if plots is None:
        return False
    columns = min(3, len(metrics))
    height = 0.9 + 0.28 * len(compared)
    rows = -(-len(metrics) // columns)
    figure, axes = plots.subplots(rows, columns, figsize=(3.6 * columns, height * rows), sharey=True, squeeze=False)
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, metrics):
        axis.axvline(0, color="grey", linewidth=0.8)
        for place, arm in enumerate(compared):
            found = arm.difference(name)
            if found is not None:
                half = None if math.isnan(found.half) else found.half
                axis.errorbar(found.mean, place, xerr=half, fmt="o", color="C0", markersize=4, capsize=2)
        axis.set_title(name.replace("_", " "), fontsize="medium")
        axis.set_yticks(range(len(compared)), [arm.name for arm in compared], fontsize="small")
        axis.set_ylim(len(compared) - 0.5, -0.5)
        axis.tick_params(axis="x", labelsize="small")
        axis.locator_params(axis="x", nbins=4)
    return _save(figure, path)


def draw_against_cost(arms: Sequence[Arm], path: Path) -> bool:
    """Each arm's difference to its baseline over its cost, for the task's first metric and the scaled cross entropy."""
    compared = [arm for arm in arms if arm.baseline is not None]
    metrics = [name for i, name in enumerate(_metrics(arms)) if i == 0 or name == "cross_entropy_scaled"]
    plots = _plots() if compared else None
    if plots is None:
        return False
    figure, axes = plots.subplots(1, len(metrics), figsize=(4.2 * len(metrics), 3.4), squeeze=False)
    for axis, name in zip(axes.flat, metrics):
        axis.axhline(0, color="grey", linewidth=0.8)
        for arm in compared:
            found = arm.difference(name)
            if found is not None:
                axis.plot(arm.cost(), found.mean, "o", color="C0", markersize=4)
                offset = {"xytext": (4, 3), "textcoords": "offset points", "fontsize": "x-small"}
                axis.annotate(arm.name, (arm.cost(), found.mean), **offset)
        axis.set_title(name.replace("_", " "), fontsize="medium")
        axis.set_xlabel("processor time of an update, plain = 1", fontsize="small")
        axis.tick_params(labelsize="small")
        axis.margins(x=0.2, y=0.15)
    return _save(figure, path)
