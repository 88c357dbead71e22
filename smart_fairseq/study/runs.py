"""Runs of fairseq-train as subprocesses, side by side: their logs, and one progress bar over all."""

import contextlib
import json
import math
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

from ..errors import explain, one_line

LOG_LINE = re.compile(r"\| (train_inner|valid|scored) \| (\{.*\})\s*$")
FAIRSEQ_TRAIN = (str(Path(sys.executable).parent / "fairseq-train"),)
# of plain progress: at first, and after so many lines
SECONDS_BETWEEN_LINES, PATIENT_SECONDS, IMPATIENT_LINES = 10.0, 60.0, 30
LAST_LINES = 15

Numbers = dict[str, float]


class TrainingFailed(Exception):
    """A run ended with an error; the message is one line, ``tail`` the end of its log."""

    def __init__(self, message: str, tail: Sequence[str]) -> None:
        super().__init__(message)
        self.tail = list(tail)


@dataclass(frozen=True)
class Run:
    """One training that is asked for; ``method`` and ``seed`` are what a report sets side by side.

    flags: of fairseq-train, --log-format json --log-interval 1 among them and --save-dir not.
    folder: of all runs; a run's own log and checkpoints bear its name.
    cost: of an update, beside the others' methods; for the time that is left, until updates have been seen.
    program: what takes the flags.
    """

    name: str
    method: str
    seed: int
    flags: Sequence[str]
    folder: Path
    updates: int
    cost: float = 1.0
    program: Sequence[str] = FAIRSEQ_TRAIN

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"{self.name}.log"

    @property
    def save_dir(self) -> Path:
        return self.folder / "checkpoints" / self.name

    @property
    def arguments(self) -> list[str]:
        return [*self.flags, "--save-dir", os.path.relpath(self.save_dir)]


@dataclass
class Result:
    """What a run's log has said so far."""

    run: Run
    inner: list[Numbers] = field(default_factory=list)  # one per update
    valid: list[Numbers] = field(default_factory=list)  # one per epoch
    scored: Numbers = field(default_factory=dict)  # what a program that scores at its end says
    started: float = 0.0
    first_update: float = 0.0
    last_update: float = 0.0
    seconds: float = 0.0  # of the whole process, once it has ended

    @property
    def done(self) -> int:
        return len(self.inner)

    def seconds_per_update(self) -> float | None:
        return (self.last_update - self.first_update) / (self.done - 1) if self.done > 4 else None

    def logged(self, name: str) -> list[float]:
        """What the updates logged under a name, those that did."""
        return [value for value in (_term_of(line, name) for line in self.inner) if value is not None]

    def term(self, name: str) -> tuple[float, float] | None:
        """A term at the first update, and its mean over the last tenth of them; None if the run does not have it."""
        values = self.logged(name)
        return (values[0], mean(values[-max(1, len(values) // 10) :])) if values else None

    def note(self, line: str, now: float) -> bool:
        """Take in what a line says; True if it was an update."""
        kind, numbers = parse_line(line) or ("", {})
        if kind == "valid":
            self.valid.append(numbers)
        if kind == "scored":
            self.scored = numbers
        if kind != "train_inner":
            return False
        self.inner.append(numbers)
        self.first_update = self.first_update or now
        self.last_update = now
        return True


def _term_of(line: Numbers, name: str) -> float | None:
    if name == "task_loss" and name not in line and "loss" in line:
        # a criterion without terms: all of the loss is the task's; fairseq logs it in bits
        return line["loss"] * math.log(2)
    return line.get(name)


# a line of a run's output; or its exit status, with what went wrong with its log
_Events = queue.Queue[tuple[Result, str, int | None]]


def parse_line(line: str) -> tuple[str, Numbers] | None:
    """(train_inner, valid or scored; the numbers) of one of fairseq's JSON log lines, None for any other line."""
    found = LOG_LINE.search(line)
    if found is None:
        return None
    try:
        entries: dict[str, Any] = json.loads(found[2])
    except ValueError:
        return None
    numbers: Numbers = {}
    for key, value in entries.items():
        with contextlib.suppress(TypeError, ValueError):  # such as fairseq's empty lists of predictions
            numbers[key] = float(value)
    return found[1], numbers


def seconds_left(results: Sequence[Result], jobs: int) -> float | None:
    """From the updates so far; an update of a method that has not begun counts by its cost.

    To a run that has not ended belongs what those that have took beside their updates.
    """
    rates: dict[str, list[float]] = {}
    for result in results:
        rate = result.seconds_per_update()
        if rate is not None:
            rates.setdefault(result.run.method, []).append(rate / result.run.cost)
    if not rates:
        return None
    usual = mean(mean(found) for found in rates.values())
    rate_of = {run.method: run.cost * mean(rates.get(run.method, [usual])) for run in (r.run for r in results)}
    beside = [r.seconds - (r.last_update - r.first_update) for r in results if r.seconds]
    each = mean(beside) if beside else 0.0
    left = [0.0 if r.seconds else (r.run.updates - r.done) * rate_of[r.run.method] + each for r in results]
    return max(sum(left) / jobs, max(left))


def minutes(seconds: float) -> str:
    """65.2 as 1:05, 3665 as 1:01:05."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class _Progress:
    """One bar over the updates of all runs on a terminal, a plain line every few seconds otherwise."""

    def __init__(self, results: Sequence[Result], jobs: int) -> None:
        self.results, self.jobs = results, jobs
        self.total = sum(result.run.updates for result in results)
        self.shown_at = self.started = time.monotonic()
        self.lines = 0
        layout = "{desc} {percentage:3.0f}% |{bar}| {n}/{total} updates {elapsed}{postfix}"
        self.bar = tqdm(total=self.total, desc="training", bar_format=layout, dynamic_ncols=True, disable=None)

    def advance(self) -> None:
        self.bar.update(1)
        self.show()

    def show(self) -> None:
        """Refresh the bar; without a terminal print a line, if the last one was long enough ago."""
        left = seconds_left(self.results, self.jobs)
        text = "" if left is None else f"about {minutes(left)} left"
        self.bar.set_postfix_str(text)
        wait = SECONDS_BETWEEN_LINES if self.lines < IMPATIENT_LINES else PATIENT_SECONDS
        if self.bar.disable and time.monotonic() - self.shown_at >= wait:
            self.shown_at = time.monotonic()
            self.lines += 1
            done = sum(result.done for result in self.results)
            running = [(r.run.name, r.done, r.run.updates) for r in self.results if r.done and not r.seconds]
            parts = [f"{name} {n}/{updates}" if n < updates else f"{name} trained" for name, n, updates in running]
            spent = minutes(self.shown_at - self.started)
            notes = [f"{done}/{self.total} updates after {spent}", text, ", ".join(parts)]
            print("training: " + "; ".join(filter(None, notes)), flush=True)

    def say(self, text: str) -> None:
        self.bar.write(text)
        sys.stdout.flush()


def _follow(result: Result, process: subprocess.Popen[str], events: _Events) -> None:
    """Copy the output to the log file and hand its lines on, and the exit status whatever happens. Runs in a thread."""
    trouble = ""
    try:
        with process:  # which is waited for
            try:
                with result.run.log.open("w", encoding="utf-8") as log:
                    for line in process.stdout or ():
                        log.write(line)
                        log.flush()
                        events.put((result, line, None))
            except OSError as error:  # a full disk
                trouble = f"its log {os.path.relpath(result.run.log)} cannot be written ({error.strerror})"
                process.kill()  # it could go on for hours, and nobody reads what it says
    finally:
        events.put((result, trouble, process.wait()))


def _start(result: Result, threads: int, events: _Events) -> subprocess.Popen[str]:
    """Start the run with so many threads for arithmetic."""
    run = result.run
    run.log.parent.mkdir(parents=True, exist_ok=True)
    result.started = time.monotonic()
    process = subprocess.Popen(
        [*run.program, *run.arguments],
        stdin=subprocess.PIPE,  # by whose end a program can know that this process is gone
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
    )
    threading.Thread(target=_follow, args=(result, process, events), daemon=True).start()
    return process


def run_all(
    runs: Sequence[Run],
    jobs: int,
    threads: int,
    finished: Callable[[Result], str] | None = None,
    failed: Callable[[str], None] | None = None,
) -> list[Result]:
    """Train them all, ``jobs`` at a time; the results of those that ended well, in the order of ``runs``.

    Args:
        finished: told of each run that ended well; what it returns ends the line that is printed.
        failed: told the name of each that did not, or at which ``finished`` raised an error; the others go on.
    Raises:
        TrainingFailed: the first failure, without ``failed``; the others are stopped. So with an error of ``finished``.
    """
    events: _Events = queue.Queue()
    results = [Result(run) for run in runs]
    waiting = deque(results)
    processes: dict[str, subprocess.Popen[str]] = {}
    progress = _Progress(results, jobs)
    good = set()
    try:
        while waiting or processes:
            while waiting and len(processes) < jobs:
                result = waiting.popleft()
                processes[result.run.name] = _start(result, threads, events)
            try:
                result, line, status = events.get(timeout=SECONDS_BETWEEN_LINES)
            except queue.Empty:  # all that run are past their updates
                progress.show()
                continue
            if status is None:
                if result.note(line, time.monotonic()):
                    progress.advance()
                continue
            del processes[result.run.name]
            result.seconds = time.monotonic() - result.started
            try:
                _check(result, status, line)
                note = finished(result) if finished else f"log {os.path.relpath(result.run.log)}"
            except Exception as error:  # of this run, or of what ``finished`` reads and writes
                if failed is None:
                    raise
                progress.say(_reason(result.run, error))
                failed(result.run.name)
                continue
            good.add(result.run.name)
            progress.say(f"{result.run.name}: {result.done} updates, {result.seconds:.0f} s in all, {note}")
    finally:
        progress.bar.close()
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.wait()
    return [result for result in results if result.run.name in good]


def _reason(run: Run, error: Exception) -> str:
    """One line on why the run failed."""
    if isinstance(error, TrainingFailed):
        return "; ".join([str(error), *error.tail[-1:]])
    return f"{run.name}: {explain(error) or one_line(f'{type(error).__name__}: {error}')}"


def _check(result: Result, status: int, trouble: str) -> None:
    run = result.run
    if trouble:
        raise TrainingFailed(f"{run.name}: {trouble}", [])
    if status or not result.inner:
        tail = run.log.read_text(encoding="utf-8").splitlines()[-LAST_LINES:]
        what = f"fairseq-train ended with status {status}" if status else "no update in its log"
        raise TrainingFailed(f"{run.name}: {what}; the whole log is {os.path.relpath(run.log)}", tail)
