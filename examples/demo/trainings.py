"""Runs of fairseq-train as subprocesses: their logs, one progress bar over all, and what their JSON lines say."""

import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

LOG_LINE = re.compile(r"\| (train_inner|train|valid) \| (\{.*\})\s*$")
SMART_COST = 3.0  # of an update with SMART in updates without, until both have been measured
SECONDS_BETWEEN_LINES = 10.0
LAST_LINES = 15

Numbers = dict[str, float]


class TrainingFailed(Exception):
    """A run ended with an error; the message is one line, ``tail`` the end of its log."""

    def __init__(self, message: str, tail: Sequence[str]) -> None:
        super().__init__(message)
        self.tail = list(tail)


@dataclass
class Run:
    """One training and what its log has said so far."""

    name: str
    method: str
    seed: int
    command: list[str]
    log: Path
    updates: int
    inner: list[Numbers] = field(default_factory=list)  # one per update
    valid: list[Numbers] = field(default_factory=list)  # one per epoch
    epochs: list[Numbers] = field(default_factory=list)
    started: float = 0.0
    first_update: float = 0.0
    last_update: float = 0.0
    seconds: float = 0.0  # of the whole process

    @property
    def done(self) -> int:
        return len(self.inner)

    def seconds_per_update(self) -> float | None:
        return (self.last_update - self.first_update) / (self.done - 1) if self.done > 4 else None


class Event(NamedTuple):
    """A line of a run's output, or its exit status."""

    run: Run
    line: str
    status: int | None = None


def parse_line(line: str) -> tuple[str, Numbers] | None:
    """(train_inner, train or valid; the numbers) of one of fairseq's JSON log lines, None for any other line."""
    found = LOG_LINE.search(line)
    if found is None:
        return None
    try:
        entries: dict[str, Any] = json.loads(found[2])
    except ValueError:
        return None
    numbers: Numbers = {}
    for key, value in entries.items():
        try:
            numbers[key] = float(value)
        except (TypeError, ValueError):
            continue  # such as fairseq's empty lists of predictions
    return found[1], numbers


def note(run: Run, line: str, now: float) -> bool:
    """Take what a line says into ``run``; True if it was an update."""
    parsed = parse_line(line)
    if parsed is None:
        return False
    kind, numbers = parsed
    {"train_inner": run.inner, "valid": run.valid, "train": run.epochs}[kind].append(numbers)
    if kind != "train_inner":
        return False
    run.first_update = run.first_update or now
    run.last_update = now
    return True


def seconds_left(runs: Sequence[Run], jobs: int) -> float | None:
    """From the updates so far, counting an update of a method that has not begun by its usual ratio."""
    rates: dict[bool, list[float]] = {False: [], True: []}
    for run in runs:
        rate = run.seconds_per_update()
        if rate is not None:
            rates[run.method == "smart"].append(rate)
    known = {smart: sum(found) / len(found) for smart, found in rates.items() if found}
    if not known:
        return None
    plain = known.get(False, known.get(True, 0.0) / SMART_COST)
    smart = known.get(True, plain * SMART_COST)
    left = [(run.updates - run.done) * (smart if run.method == "smart" else plain) for run in runs]
    return max(sum(left) / jobs, max(left))


def minutes(seconds: float) -> str:
    """65.2 as 1:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    """One bar over the updates of all runs on a terminal, a plain line every few seconds otherwise."""

    def __init__(self, runs: Sequence[Run], jobs: int) -> None:
        self.runs, self.jobs = runs, jobs
        self.total = sum(run.updates for run in runs)
        self.shown_at = self.started = time.monotonic()
        self.bar: Any = None
        if sys.stderr.isatty():
            layout = "{desc} {percentage:3.0f}% |{bar}| {n}/{total} updates {elapsed}{postfix}"
            self.bar = tqdm(total=self.total, desc="training", bar_format=layout, dynamic_ncols=True)

    def advance(self) -> None:
        left = seconds_left(self.runs, self.jobs)
        text = "" if left is None else f"about {minutes(left)} left"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(1)
        elif time.monotonic() - self.shown_at >= SECONDS_BETWEEN_LINES:
            self.shown_at = time.monotonic()
            done = sum(run.done for run in self.runs)
            parts = [f"{run.name} {run.done}/{run.updates}" for run in self.runs if 0 < run.done < run.updates]
            spent = minutes(self.shown_at - self.started)
            notes = [f"{done}/{self.total} updates after {spent}", text, ", ".join(parts)]
            print("training: " + "; ".join(filter(None, notes)), flush=True)

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _follow(run: Run, process: "subprocess.Popen[str]", events: "queue.Queue[Event]") -> None:
    """Copy the output to the log file and hand its lines on. Runs in a thread."""
    with run.log.open("w", encoding="utf-8") as log:
        for line in process.stdout or ():
            log.write(line)
            log.flush()
            events.put(Event(run, line))
    events.put(Event(run, "", process.wait()))


def start(run: Run, threads: int, events: "queue.Queue[Event]") -> "subprocess.Popen[str]":
    """Start the run with so many threads for arithmetic."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    run.started = time.monotonic()
    process = subprocess.Popen(
        run.command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
    )
    threading.Thread(target=_follow, args=(run, process, events), daemon=True).start()
    return process


def run_all(runs: Sequence[Run], jobs: int, threads: int) -> None:
    """Train them all, ``jobs`` at a time. Raises `TrainingFailed` at the first that fails and stops the others."""
    events: queue.Queue[Event] = queue.Queue()
    waiting = deque(runs)
    processes: dict[str, subprocess.Popen[str]] = {}
    progress = Progress(runs, jobs)
    try:
        while waiting or processes:
            while waiting and len(processes) < jobs:
                run = waiting.popleft()
                processes[run.name] = start(run, threads, events)
            event = events.get()
            if event.status is None:
                if note(event.run, event.line, time.monotonic()):
                    progress.advance()
                continue
            del processes[event.run.name]
            _finish(event.run, event.status, progress)
    finally:
        progress.close()
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.wait()


def _finish(run: Run, status: int, progress: Progress) -> None:
    run.seconds = time.monotonic() - run.started
    log = os.path.relpath(run.log)
    if status or not (run.inner and run.valid):
        tail = run.log.read_text(encoding="utf-8").splitlines()[-LAST_LINES:]
        what = f"fairseq-train ended with status {status}" if status else "no update or no validation in its log"
        raise TrainingFailed(f"{run.name}: {what}; the whole log is {log}", tail)
    progress.say(f"{run.name}: {run.done} updates, {run.seconds:.0f} s in all, log {log}")
