"""A study: python -m smart_fairseq.study PLAN.yaml (docs/study.md)."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..commands.options import whole_number
from ..commands.run import run
from ..errors import UsageError
from .document import put_into, write_report
from .plan import Plan, read_plan
from .runs import TrainingFailed
from .studying import Study, check_flags, lines_of


def _main(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m smart_fairseq.study",
        description="Trainings of tasks x methods x seeds x grid, and their report.",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN.yaml")
    parser.add_argument("--jobs", default=str(min(2, os.cpu_count() or 1)), help="runs side by side (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="check the plan, list its runs, and end")
    parser.add_argument("--rescore", action="store_true", help="compute the metrics anew from the stored logits")
    parser.add_argument("--report", action="store_true", help="write the report of the runs so far, and end")
    parser.add_argument(
        "--into", type=Path, metavar="FILE.md", help="put the tables between this file's marks, and end"
    )
    words = "with --report or --into: the method that the others are compared with (the plan's first)"
    parser.add_argument("--against", metavar="METHOD", help=words)
    options = parser.parse_args(argv)
    jobs = whole_number("--jobs", options.jobs, 1)
    looking = options.report or options.into
    if options.against and not looking:
        raise UsageError(f"--against is {options.against} without --report or --into, which it is for; add one of them")
    if looking and (options.rescore or options.dry_run):
        other = "--rescore" if options.rescore else "--dry-run"
        raise UsageError(
            f"{other} beside --report or --into: give one of them at a time (--rescore writes the report too)"
        )
    plan = read_plan(options.plan, files=not looking)
    if looking:
        _report(plan, options.against)
        if options.into:
            print(f"{options.into}: {', '.join(put_into(plan, options.into, options.against))}")
        return
    study = Study(plan)
    if options.rescore:
        print(f"study: {study.rescore()} runs scored anew")
        _report(plan)
        return
    check_flags(plan)
    if options.dry_run:
        left = {asked.name for asked in study.left()}
        for asked in plan.runs():
            print(f"{asked.name}: {asked.updates} updates{'' if asked.name in left else ', done'}")
        return
    failed = study.go(jobs)
    if lines_of(plan):
        _report(plan)
    if failed:
        raise TrainingFailed(f"{len(failed)} of the runs failed: {', '.join(failed)}", [])


def _report(plan: Plan, against: str | None = None) -> None:
    print("report: " + " ".join(map(str, write_report(plan, against))))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    try:
        return run("study", _main, argv)
    except TrainingFailed as error:
        print(f"study: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
