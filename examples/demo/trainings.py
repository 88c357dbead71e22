"""Tables of what the runs' logs say, averaged over the seeds, and one line on what they show."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from smart_fairseq.evaluation.report import aligned
from smart_fairseq.study.arms import half_width
from smart_fairseq.study.runs import Numbers, Result

TERMS = ("task_loss", "smart_loss", "smart_delta", "bregman_loss")


class Scores(NamedTuple):
    """The validation metrics of one run."""

    best: Numbers  # at the epoch that the first metric selects
    last: Numbers


def scores(result: Result, metrics: Sequence[str]) -> Scores:
    """Metrics by name, from the run's validation lines; ties go to the later epoch, as fairseq's best checkpoint."""
    epochs = [{name: line.get(f"valid_{name}", math.nan) for name in metrics} for line in result.valid]
    values = [-math.inf if math.isnan(epoch[metrics[0]]) else epoch[metrics[0]] for epoch in epochs]
    best = max(range(len(epochs)), key=lambda number: (values[number], number))
    return Scores(epochs[best], epochs[-1])


def with_spread(values: Sequence[float]) -> str:
    """Mean and standard deviation; of one value, the value."""
    if len(values) == 1:
        return f"{values[0]:g}"
    digits = 1 if max(values) > 1 else 3
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def _terms(results: Sequence[Result], name: str) -> str:
    found = [pair for pair in (result.term(name) for result in results) if pair is not None]
    return " -> ".join(f"{mean(values):.2g}" for values in zip(*found)) or "-"


def rows(results: Sequence[Result], metrics: Sequence[str], methods: Mapping[str, str]) -> list[list[str]]:
    """The table's cells, header first, and a column for each of the ``methods``, under its title."""
    columns = [[result for result in results if result.run.method == method] for method in methods]
    scored = [[scores(result, metrics) for result in column] for column in columns]
    table = [["", *methods.values()]]
    for name in metrics:
        table.append([f"{name}, best epoch", *(with_spread([s.best[name] for s in column]) for column in scored)])
    first = metrics[0]
    table.append([f"{first}, last epoch", *(with_spread([s.last[first] for s in column]) for column in scored)])
    seeds = [str(result.run.seed) for result in columns[0]]
    if len(seeds) > 1:
        title = f"  last epoch, seeds {', '.join(seeds)}"
        table.append([title, *("  ".join(f"{s.last[first]:g}" for s in column) for column in scored)])
    speeds = [mean(result.seconds_per_update() or 0 for result in column) for column in columns]
    table.append(["seconds per update", *(f"{speed:.2f}" for speed in speeds)])
    table.append(["seconds per run, all in all", *(f"{mean(r.seconds for r in column):.0f}" for column in columns)])
    return table + [[name, *(_terms(column, name) for column in columns)] for name in TERMS]


def laid_out(table: Sequence[Sequence[str]]) -> str:
    """The cells in columns, a line under the header."""
    header, *lines = aligned(table).splitlines()
    return "\n".join([header, "-" * len(header), *lines])


def in_words(results: Sequence[Result], metric: str, methods: Mapping[str, str]) -> str:
    """One line on what the second of two methods changes, and no more than the seeds show (a paired t-test)."""
    last: dict[str, dict[int, float]] = {method: {} for method in methods}
    for result in results:
        last[result.run.method][result.run.seed] = scores(result, [metric]).last[metric]
    (before, after), title = last.values(), list(methods.values())[1]
    gains = [after[seed] - before[seed] for seed in before]
    if not all(map(math.isfinite, gains)):
        return f"{metric} is undefined for a run (all predictions equal?), so the two cannot be compared."
    digits = 1 if max(before.values()) > 1 else 3
    start = f"{title} changes the last epoch's {metric} by {mean(gains):+.{digits}f}"
    if len(gains) == 1:
        return f"{start}; one seed does not show which of the two is better."
    if abs(mean(gains)) > half_width(gains):
        return f"{start} on average over {len(gains)} seeds, more than seeds differ by chance (paired t-test, 5 %)."
    return (
        f"{start} on average, by {min(gains):+.{digits}f} to {max(gains):+.{digits}f} seed by seed: "
        f"{len(gains)} seeds do not show which of the two is better."
    )
