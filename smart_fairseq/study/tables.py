"""A study's numbers as tables: in Markdown, short and long, and as CSV."""

import csv
import io
import math
from collections.abc import Mapping, Sequence

from ..evaluation.metrics import METRICS, over_seeds
from .arms import SECONDS, Arm

# beside the task's own and those under attack, in the short table
SHORT = ("cross_entropy", "cross_entropy_scaled", "calibration_error")


def _cells(arm: Arm, metric: str) -> tuple[str, str, str]:
    """The median, the mean with its deviation, the difference with its interval; percents with two digits.

    "-" where a seed has no finite number.
    """
    percent = metric.partition("_on_")[0] in METRICS or metric.startswith(("calibration", "accuracy_"))
    values, found, digits = arm.numbers(metric), arm.difference(metric), 2 if percent else 4
    mean, middle, deviation = over_seeds(values)
    spread = "" if math.isnan(deviation) else f" ± {deviation:.{digits}f}"
    gain = "" if found is None else f"{found.mean:+.{digits}f}"
    if found is not None and found.half is not None:
        low, high = found.mean - found.half, found.mean + found.half
        gain += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return _number(middle, f".{digits}f"), f"{_number(mean, f'.{digits}f')}{spread}", gain


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"


def _markdown(table: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([lines[0], "| --- " * len(table[0]) + "|", *lines[1:]])


def metrics_of(arms: Sequence[Arm]) -> list[str]:
    """All that the lines hold; the task's own come first, as they were written."""
    return list(dict.fromkeys(name for arm in arms for line in arm.lines.values() for name in line["metrics"]))


def shares_of(arms: Sequence[Arm], ending: str = "_loss") -> list[str]:
    terms = {name for arm in arms for line in arm.lines.values() for name in line["terms"]}
    return [f"{name}/task_loss" for name in sorted(terms) if name.endswith(ending) and name != "task_loss"]


def columns_of(arms: Sequence[Arm]) -> list[str]:
    """What a table can show: "seeds", metrics, shares of the task loss of terms and of rises, seconds, "cost"."""
    return ["seeds", *metrics_of(arms), *shares_of(arms), *shares_of(arms, "_rise"), *SECONDS, "cost"]


def _is_short(column: str) -> bool:
    """Whether the short table has it where no columns are named."""
    attacked = "_attack_" in column and not column.endswith("_attack_0%")
    term = column.endswith("_loss/task_loss")
    return column in ("seeds", "cost", *SHORT) or column.partition("_on_")[0] in METRICS or term or attacked


def short_table(arms: Sequence[Arm], columns: Sequence[str] | None = None) -> str:
    """A line for each arm, in Markdown: what matters most, and in brackets the difference to the baseline.

    columns: of `columns_of`, instead of what matters most.
    """
    known = columns_of(arms)
    chosen = [name for name in known if _is_short(name)] if columns is None else columns
    titles = [f"`{name}`" if "/" in name else name.replace("_", " ") for name in chosen]
    return _markdown([["method", *titles], *([arm.name, *(_short_cell(arm, name) for name in chosen)] for arm in arms)])


def _short_cell(arm: Arm, column: str) -> str:
    if column == "seeds":
        return str(len(arm.lines))
    if column == "cost":
        cost = arm.cost()
        return "" if math.isnan(cost) else f"{cost:.2f}"
    values = arm.numbers(column)
    if not values:
        return ""
    if "/" in column:
        return _number(over_seeds(values)[0], ".2g")
    _, value, gain = _cells(arm, column)
    return f"{value.split(' ')[0]} ({gain})" if gain else value


def long_table(arms: Sequence[Arm]) -> str:
    """Every metric of every arm, in Markdown."""
    table = [["metric", "method", "median", "mean ± deviation", "difference [95 %]"]]
    for name in (*metrics_of(arms), *SECONDS):
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
            for name in (*metrics_of(arms), *shares_of(arms), *SECONDS):
                values = arm.numbers(name)
                if not values:
                    continue
                mean, middle, deviation = over_seeds(values)
                row = [task, arm.name, name, len(values), middle, mean, deviation if len(values) > 1 else ""]
                found = arm.difference(name)
                if found is not None and arm.baseline is not None:
                    row += [arm.baseline.name, found.pairs, found.mean]
                    row += ["", ""] if found.half is None else [found.mean - found.half, found.mean + found.half]
                table.writerow([*row, *[""] * (12 - len(row))])
    return text.getvalue()
