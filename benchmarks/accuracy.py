"""Where do runs in half precision, or with an approximation, end? The demo's task and encoder, SMART + MBPP.

    make demo                              # once, for the encoder and the data
    python benchmarks/accuracy.py --variants float32 bfloat16 float16 --seeds 2 --out accuracy.json

On a CPU bfloat16 is as fast as the processor has instructions for it, and float16 several times slower than float32.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from facts import ROOT, facts

from smart_fairseq.data.tasks import TASKS
from smart_fairseq.study import recipe, worker
from smart_fairseq.study.runs import Result, Run, run_all

# flags, and settings of fairseq's configuration
VARIANTS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "float32": ([], {}),
    "bfloat16": ([], {"bf16": True}),
    "float16": ([], {"fp16": True, "fp16_no_flatten_grads": True}),
    "every-2": (["--smart-every", "2"], {}),
    "linear-search": (["--smart-linear-search"], {}),
}
TERMS = ("task_loss", "smart_loss", "bregman_loss")


def planned(args: argparse.Namespace) -> list[Run]:
    """The runs of the chosen variants."""
    data, imported = args.demo / "data" / "movie-bin", args.demo / "encoder" / "fairseq"
    if not (data / "input0").is_dir() or not (imported / "model.pt").is_file():
        sys.exit(f"accuracy: error: --demo is {args.demo}, which holds no encoder and no data; run `make demo` first")
    runs = []
    for variant in args.variants:
        program = (sys.executable, __file__, "--train", variant)
        for seed in range(1, args.seeds + 1):
            line = recipe.flags(TASKS["movie"], data, imported, "smart", seed, args.updates)
            line += ["--no-save", *VARIANTS[variant][0]]
            place = args.demo / "accuracy"
            runs.append(Run(f"{variant}-seed{seed}", variant, seed, line, place, args.updates, program=program))
    return runs


def row(variant: str, results: list[Result]) -> dict[str, Any]:
    """What the runs of one variant say."""
    terms = {name: [found for found in (result.term(name) for result in results) if found] for name in TERMS}
    logs = [result.run.log.read_text() for result in results]
    return {
        "variant": variant,
        "form": "first order" if "first_order" in logs[0] else "two forwards",
        "accuracy": [result.valid[-1]["valid_accuracy"] for result in results],
        "updates": [result.done for result in results],
        **{name: statistics.mean(last for _, last in found) for name, found in terms.items()},
        "seconds_per_update": statistics.mean(result.seconds_per_update() or 0.0 for result in results),
        "dropped": sum(
            line.get(f"{t}_dropped", 0.0) for result in results for line in result.inner for t in ("smart", "bregman")
        ),
        "overflows": sum(log.count("gradient overflow detected") for log in logs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, with one thread each")
    parser.add_argument("--demo", type=Path, default=ROOT / ".demo", help="where `make demo` put encoder and data")
    parser.add_argument("--out", type=Path, help="also write the table as JSON")
    args = parser.parse_args()
    results = run_all(planned(args), args.jobs, 1)
    rows = [row(variant, [r for r in results if r.run.method == variant]) for variant in args.variants]
    about = facts(__file__)
    print(", ".join(f"{key}: {value}" for key, value in about.items()))
    titles = ["variant", "form", "accuracy per seed", *TERMS, "s per update", "dropped", "overflows"]
    print("| " + " | ".join(titles) + " |")
    print("|" + " --- |" * len(titles))
    for found in rows:
        shown = [
            " ".join(f"{value:.1f}" for value in found["accuracy"]),
            *(f"{found[key]:.3g}" for key in (*TERMS, "seconds_per_update")),
        ]
        print(f"| {found['variant']} | {found['form']} | {' | '.join(shown)} | "
              f"{found['dropped']:g} | {found['overflows']} |")  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps({**about, "updates": args.updates, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        worker.train(sys.argv[3:], VARIANTS[sys.argv[2]][1])
    else:
        main()
