"""A study from its plan to the lines in runs.jsonl: what is left to run, its data, its trainings, its scores."""

import contextlib
import hashlib
import io
import json
import logging
import sys
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .. import register
from ..data.lines import located
from ..errors import explain
from ..files import check_file, sha256
from .attacked import scores_under_attack
from .lines import Line, alone, facts, lines_to_change, read_lines
from .plan import Asked, Plan, Task
from .rows import cut_out, take_all
from .runs import Result, Run, run_all
from .scores import all_scores, scores_elsewhere

THREADS = 1
WORKER = (sys.executable, "-m", "smart_fairseq.study.worker")
# of a line, what `Asked.beside` names
BESIDE = ("attack", "transfer")
# how the names end of what a criterion logs of its terms
TERMS = ("_loss", "_delta", "_rise", "_dropped")


def check_flags(plan: Plan) -> None:
    """Let fairseq parse every method's flags and build its criterion. Raises `UsageError` with what it says."""
    from fairseq import options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    register()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        for arm, asked in {f"{asked.task.name}, {asked.arm}": asked for asked in plan.runs()}.items():
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said):
                    line = plan.command(asked, asked.task.source.folder)
                    parsed = options.parse_args_and_arch(options.get_training_parser(), input_args=line)
                    cfg = convert_namespace_to_omegaconf(parsed)
                    tasks.setup_task(cfg.task).build_criterion(cfg.criterion)
            except SystemExit:
                reason = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
                raise located(plan.path, f"{arm}: fairseq-train says: {reason}") from None
            except SyntaxError as error:  # fairseq evaluates the values of some flags
                raise located(plan.path, f"{arm}: {error.text} is not a value that fairseq-train reads") from None
            except Exception as error:  # whatever a flag's value leads fairseq to
                reason = explain(error) or (str(error).strip() or type(error).__name__).splitlines()[0]
                raise located(plan.path, f"{arm}: {reason}") from None
    finally:
        logging.disable(level)


class Study:
    """A plan with the digests of its files, by which a run's key and its places in the work folder are known."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.data = {task.name: task.source.digest() for task in plan.tasks}
        self.transfer = {t.name: {name: source.digest() for name, source in t.transfer.items()} for t in plan.tasks}
        starts = {asked.start for asked in plan.runs()}
        self.encoders = {start: [sha256(start) if start else "", *plan.encoder_flags] for start in starts}
        self.jsonl = plan.out / "runs.jsonl"

    def key(self, asked: Asked) -> str:
        """By all that determines the result, but for the code: a run whose key has a line is not run again."""
        more = (asked.attack and asdict(asked.attack), self.transfer[asked.task.name])
        encoder = self.encoders[asked.start]
        return _short([asked.settings(), self.data[asked.task.name], encoder, *filter(None, more)])

    def folder(self, asked: Asked) -> Path:
        """The data folder of a run: the same for all methods."""
        task = asked.task
        return self.plan.work / "rows" / f"{task.name}-{_short([self.data[task.name], asdict(task.draw), asked.seed])}"

    def logits(self, key: str) -> Path:
        return self.plan.work / "logits" / f"{key}.npz"

    def run(self, asked: Asked) -> Run:
        """The process of a run; its data are cut out if they are not there."""
        folder, source = self.folder(asked), asked.task.source
        if not folder.is_dir():
            cut_out(source, folder, asked.task.draw, asked.seed)
        logits = self.logits(self.key(asked))
        logits.parent.mkdir(parents=True, exist_ok=True)
        attack, transfer = asked.attack and asdict(asked.attack), self.elsewhere(asked.task)
        beside = {"keep": self.plan.keep, "seed": asked.seed, "attack": attack, "transfer": transfer}
        return Run(
            name=asked.name,
            method=f"{asked.task.name} {asked.arm}",
            seed=asked.seed,
            flags=self.plan.command(asked, folder),
            folder=self.plan.work,
            updates=asked.updates,
            cost=1.0 if asked.flags["criterion"] == "sentence_prediction" else 2.5,
            program=[*WORKER, str(logits), json.dumps(beside)],
        )

    def elsewhere(self, task: Task) -> dict[str, str]:
        """The folders that a task's models are scored on beside their own, by name; written if they are not there."""
        folders = {}
        for name, source in task.transfer.items():
            folder = self.plan.work / "rows" / f"{name}-{_short(self.transfer[task.name][name])}"
            if not folder.is_dir():
                take_all(source, folder)
            folders[name] = str(folder)
        return folders

    def metrics(self, asked: Asked, key: str) -> dict[str, float]:
        """From the stored logits. Raises `UsageError` where they are not there."""
        path, task = self.logits(key), asked.task
        try:
            with np.load(path) as file:
                stored = dict(file)
            logits, labels = stored["logits"], stored["labels"]
            more = scores_under_attack(stored) if asked.attack else {}
            for name in task.transfer:
                more |= scores_elsewhere(name, stored, task.metrics, task.source.classes, asked.seed)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            what = f"the logits of {asked.name} cannot be read; remove its line and run again"
            raise located(path, what) from None
        return {**all_scores(logits, labels, task.metrics, task.source.classes, asked.seed), **more}

    def line(self, asked: Asked, result: Result, about: dict[str, str]) -> Line:
        key = self.key(asked)
        terms = {name for update in result.inner for name in update if name.endswith(TERMS) and name != "nll_loss"}
        found = {name: result.term(name) for name in sorted(terms | {"task_loss"})}
        elsewhere = {f"on_{name}": int(result.scored[f"rows_on_{name}"]) for name in asked.task.transfer}
        return {
            "key": key,
            **asked.settings(),
            **asked.beside(),
            "metrics": self.metrics(asked, key),
            "terms": {name: values[1] for name, values in found.items() if values is not None},
            "updates": result.done,
            "rows": {"train": asked.task.train_rows, "valid": int(result.scored["rows"]), **elsewhere},
            "seconds": round(result.seconds, 1),
            "seconds_per_update": result.seconds_per_update(),
            # of the one process: less than other work on the machine changes
            "cpu_seconds": result.scored["cpu_seconds"],
            "cpu_seconds_per_update": result.scored["cpu_seconds_per_update"],
            **about,
        }

    def left(self) -> list[Asked]:
        """What the plan asks for and runs.jsonl lacks, in the plan's order."""
        done = {line["key"] for line in read_lines(self.jsonl)}
        return [asked for asked in self.plan.runs() if self.key(asked) not in done]

    def go(self, jobs: int) -> list[str]:
        """Run what is left; the names of those that failed. A line is written as each ends."""
        check_file(self.jsonl)  # before trainings whose lines could not be written
        with alone(self.plan.work / "lock"):
            left = {asked.name: asked for asked in self.left()}
            total = len(self.plan.runs())
            print(f"study: {total} runs, {total - len(left)} done before, {jobs} at a time", flush=True)
            runs, about = [self.run(asked) for asked in left.values()], facts()
            failed: list[str] = []

            def finished(result: Result) -> str:
                asked = left[result.run.name]
                line = self.line(asked, result, about)
                with lines_to_change(self.jsonl) as lines:
                    # another study has perhaps done the same run meanwhile
                    lines[:] = [*(other for other in lines if other["key"] != line["key"]), line]
                first = asked.task.metrics[0]
                return f"{first} {line['metrics'][first]:.1f}"

            run_all(runs, jobs, THREADS, finished, failed.append)
        return failed

    def rescore(self) -> int:
        """Compute the metrics of all lines of the plan anew; how many there were."""
        with alone(self.plan.work / "lock"):
            asked_for = {self.key(asked): asked for asked in self.plan.runs()}
            keys = [line["key"] for line in read_lines(self.jsonl) if line["key"] in asked_for]
            found = {key: self.metrics(asked_for[key], key) for key in keys}
            with lines_to_change(self.jsonl) as lines:
                for line in lines:
                    line["metrics"] = found.get(line["key"], line["metrics"])
        return len(found)


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def lines_of(plan: Plan) -> list[Line]:
    """The newest line of each run that the plan asks for, in its order; neither data nor encoder are looked at.

    One that was attacked and scored elsewhere as the plan asks is taken before one that was not.
    """
    lines: dict[str, list[Line]] = {}
    for line in read_lines(plan.out / "runs.jsonl"):
        lines.setdefault(_short(_settings(line)), []).append(line)
    found = []
    for asked in plan.runs():
        beside = asked.beside()
        alike = lines.get(_short(asked.settings()), [])
        found += sorted(alike, key=lambda line: sum(line.get(name) == beside.get(name) for name in BESIDE))[-1:]
    return found


def _settings(line: Line) -> Line:
    return {name: line.get(name) for name in ("task", "method", "variant", "seed", "draw", "flags", "epochs", "warmup")}
