"""A study: python -m smart_fairseq.study PLAN.yaml (docs/study.md)."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..commands.options import whole_number
from ..commands.run import run
from .plan import read_plan
from .studying import Study, check_flags


def _main(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m smart_fairseq.study",
        description="Trainings of tasks x methods x seeds x grid, and their report.",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN.yaml")
    parser.add_argument("--jobs", default=str(min(2, os.cpu_count() or 1)), help="runs side by side (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="check the plan, list its runs, and end")
    parser.add_argument("--rescore", action="store_true", help="compute the metrics anew from the stored logits")
    options = parser.parse_args(argv)
    jobs = whole_number("--jobs", options.jobs, 1)
    plan = read_plan(options.plan)
    study = Study(plan)
    if options.rescore:
        print(f"study: {study.rescore()} runs scored anew")
        return
    check_flags(plan)
    if options.dry_run:
        left = {asked.name for asked in study.left()}
        for asked in plan.runs():
            print(f"{asked.name}: {asked.updates} updates{'' if asked.name in left else ', done'}")
        return
    failed = study.go(jobs)
    if failed:
        print(f"study: {len(failed)} runs failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    return run("study", _main, argv)


if __name__ == "__main__":
    sys.exit(main())
