"""The demo's closing table: what the runs' logs say, averaged over the seeds."""

import math
from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from trainings import Numbers, Run

METHODS = {"plain": "without SMART", "smart": "SMART + MBPP"}
TERMS = ("task_loss", "smart_loss", "smart_delta", "bregman_loss")
NOT_THERE = "-"
# Student's t, two-sided 5 %, by the number of seeds; beyond these 2.3 is close enough
CRITICAL_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}


class Result(NamedTuple):
    """The validation metrics of one run."""

    best: Numbers  # at the epoch that the first metric selects
    last: Numbers


def result(run: Run, metrics: Sequence[str]) -> Result:
    """Metrics by name, from the run's validation lines; ties go to the later epoch, as fairseq's best checkpoint."""
    epochs = [{name: line.get(f"valid_{name}", math.nan) for name in metrics} for line in run.valid]

    def rank(epoch: int) -> tuple[float, int]:
        value = epochs[epoch][metrics[0]]
        return (-math.inf if math.isnan(value) else value), epoch

    return Result(epochs[max(range(len(epochs)), key=rank)], epochs[-1])


def term(run: Run, name: str) -> tuple[float, float] | None:
    """A term at the first update, and its mean over the last tenth of them; None if the run does not have it."""
    values = [_term_of(line, name, run.method) for line in run.inner]
    known = [value for value in values if value is not None]
    if not known:
        return None
    return known[0], mean(known[-max(1, len(known) // 10) :])


def _term_of(line: Numbers, name: str, method: str) -> float | None:
    if name == "task_loss" and method == "plain":
        # all of the loss is the task's there; fairseq logs it in bits
        return line["loss"] * math.log(2)
    return line.get(name)


def with_spread(values: Sequence[float]) -> str:
    """Mean and standard deviation; of one value, the value."""
    if len(values) == 1:
        return f"{values[0]:g}"
    digits = 1 if max(values) > 1 else 3
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def _terms(runs: Sequence[Run], name: str) -> str:
    found = [pair for pair in (term(run, name) for run in runs) if pair is not None]
    if not found:
        return NOT_THERE
    return " -> ".join(f"{mean(values):.2g}" for values in zip(*found))


def rows(runs: Sequence[Run], metrics: Sequence[str]) -> list[list[str]]:
    """The table's cells, header first."""
    by_method = {method: [run for run in runs if run.method == method] for method in METHODS}
    results = {method: [result(run, metrics) for run in found] for method, found in by_method.items()}

    def row(title: str, cell: Callable[[str], str]) -> list[str]:
        return [title, *(cell(method) for method in METHODS)]

    table = [["", *METHODS.values()]]
    for name in metrics:
        table.append(row(f"{name}, best epoch", lambda m, n=name: with_spread([r.best[n] for r in results[m]])))
    first = metrics[0]
    table.append(row(f"{first}, last epoch", lambda m: with_spread([r.last[first] for r in results[m]])))
    seeds = [str(run.seed) for run in by_method["plain"]]
    if len(seeds) > 1:
        title = f"  last epoch, seeds {', '.join(seeds)}"
        table.append(row(title, lambda m: "  ".join(f"{r.last[first]:g}" for r in results[m])))
    table.append(row("seconds per update", lambda m: f"{mean(r.seconds_per_update() or 0 for r in by_method[m]):.2f}"))
    table.append(row("seconds per run, all in all", lambda m: f"{mean(run.seconds for run in by_method[m]):.0f}"))
    for name in TERMS:
        table.append(row(name, lambda m, n=name: _terms(by_method[m], n)))
    return table


def laid_out(table: Sequence[Sequence[str]]) -> str:
    """The cells in columns, a line under the header."""
    widths = [max(len(row[place]) for row in table) for place in range(len(table[0]))]
    lines = []
    for title, *cells in table:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        lines.append("  ".join([title.ljust(widths[0]), *padded]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def in_words(runs: Sequence[Run], metrics: Sequence[str]) -> str:
    """One line on what the table shows, and no more than the seeds show (a paired t-test)."""
    name = metrics[0]
    last: dict[str, dict[int, float]] = {method: {} for method in METHODS}
    for run in runs:
        last[run.method][run.seed] = result(run, metrics).last[name]
    gains = [last["smart"][seed] - last["plain"][seed] for seed in last["plain"]]
    if not all(map(math.isfinite, gains)):
        return f"{name} is undefined for a run (all predictions equal?), so the two cannot be compared."
    digits = 1 if max(last["plain"].values()) > 1 else 3
    start = f"SMART + MBPP changes the last epoch's {name} by {mean(gains):+.{digits}f}"
    if len(gains) == 1:
        return f"{start}; one seed does not show which of the two is better."
    if abs(mean(gains)) > CRITICAL_T.get(len(gains), 2.3) * stdev(gains) / math.sqrt(len(gains)):
        return f"{start} on average over {len(gains)} seeds, more than seeds differ by chance (paired t-test, 5 %)."
    return (
        f"{start} on average, by {min(gains):+.{digits}f} to {max(gains):+.{digits}f} seed by seed: "
        f"{len(gains)} seeds do not show which of the two is better."
    )
