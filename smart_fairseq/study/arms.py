"""A study's lines by task and method, and the differences between methods over the same seeds."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.special import stdtrit

from ..data.lines import shown
from ..errors import require
from .lines import Line
from .plan import Asked, Plan, arm_of
from .studying import lines_of

SECONDS = ("seconds_per_update", "cpu_seconds_per_update")


class Difference(NamedTuple):
    """Of two arms over the seeds that both have: the mean, half of its 95 % t interval (None below three seeds)."""

    mean: float
    half: float | None
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

    @property
    def method(self) -> str:
        return self.name.split(" ")[0]

    def cost(self) -> float:
        """Processor time of an update as a multiple of the baseline's, over the seeds that both have on one machine.

        nan where there is none.
        """
        if self.baseline is None:
            return 1.0
        pairs = [(line, self.baseline.lines[seed]) for seed, line in self.lines.items() if seed in self.baseline.lines]
        alike = [pair for pair in pairs if _on_one_machine(*pair)]
        times = [(_value(ours, SECONDS[1]), _value(theirs, SECONDS[1])) for ours, theirs in alike]
        ratios = [ours / theirs for ours, theirs in times if ours and theirs]
        return fmean(ratios) if ratios else math.nan


def _on_one_machine(one: Line, other: Line) -> bool:
    """As far as both lines say: the older ones have the machine's kind alone."""
    hosts = {line["host"] for line in (one, other) if "host" in line}
    return len(hosts) < 2 and one.get("machine") == other.get("machine")


def _value(line: Line, name: str) -> float | None:
    if "/" in name:
        term, task = (line["terms"].get(part) for part in name.split("/"))
        return None if term is None or not task else float(term / task)
    value = line["metrics"].get(name, line.get(name))
    return None if value is None else float(value)


def half_width(values: Sequence[float]) -> float:
    """Of a mean's 95 % interval, by Student's t: 0.975 quantile with n - 1 degrees * deviation / sqrt(n); n > 1."""
    return float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / math.sqrt(len(values))


def difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Paired by seed; a pair with a number that is not finite is left out."""
    gains = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    gains = [gain for gain in gains if math.isfinite(gain)]
    half = half_width(gains) if len(gains) > 2 else None  # of two, 13 times their standard error
    return Difference(fmean(gains), half, len(gains)) if gains else None


def arms_of(plan: Plan, against: str | None = None) -> dict[str, list[Arm]]:
    """Per task, the arms that have lines, in the plan's order.

    Each is compared with the method ``against`` (None: the plan's first), with the same values of the grid where that
    has them too; where that has more values, with its only arm that has these. Raises `UsageError` for a method that
    the plan does not have.
    """
    if against is not None:
        allowed = f"a method of {plan.path}: {', '.join(plan.methods)}"
        require(against in plan.methods, "--against", shown(against), allowed)
    first = against or next(iter(plan.methods))
    found: dict[tuple[str, str], tuple[Asked, dict[int, Line]]] = {}
    for asked in plan.runs():
        found.setdefault((asked.task.name, asked.arm), (asked, {}))
    for line in lines_of(plan):
        found[line["task"], arm_of(line["method"], line["variant"])][1][line["seed"]] = line
    there = [(asked, lines) for asked, lines in found.values() if lines]
    baselines = [(asked, Arm(asked.arm, lines, None)) for asked, lines in there if asked.method == first]
    tasks: dict[str, list[Arm]] = {task.name: [] for task in plan.tasks}
    for asked, lines in there:
        baseline = None
        if asked.method != first:
            ours, same_task = asked.variant.items(), [pair for pair in baselines if pair[0].task is asked.task]
            alike = [arm for of, arm in same_task if of.variant.items() <= ours]
            wider = [arm for of, arm in same_task if of.variant.items() > ours]
            baseline = alike[0] if alike else wider[0] if len(wider) == 1 else None
        tasks[asked.task.name].append(Arm(asked.arm, lines, baseline))
    return tasks
