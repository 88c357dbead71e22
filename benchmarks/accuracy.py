"""Where do runs in half precision, or with an approximation, end? The demo's task and encoder, SMART + MBPP.

    make demo                              # once, for the encoder and the data
    python benchmarks/accuracy.py --variants float32 bfloat16 float16 --seeds 2 --out accuracy.json

On a CPU bfloat16 is as fast as the processor has instructions for it, and float16 several times slower than float32.
"""

import argparse
import json
import logging
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples" / "demo"), str(ROOT)]

import run as demo  # noqa: E402
import table  # noqa: E402
import trainings  # noqa: E402
from facts import facts  # noqa: E402
from fairseq import distributed_utils, options  # noqa: E402
from fairseq.dataclass.utils import convert_namespace_to_omegaconf  # noqa: E402
from fairseq_cli import train  # noqa: E402

# flags, and settings of fairseq's configuration, because on the command line it takes --bf16 for --tpu
VARIANTS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "float32": ([], {}),
    "bfloat16": ([], {"bf16": True}),
    "float16": ([], {"fp16": True, "fp16_no_flatten_grads": True}),
    "every-2": (["--smart-every", "2"], {}),
    "bregman-every-2": (["--smart-bregman-every", "2"], {}),
    "reuse": (["--smart-reuse"], {}),
    "search-layers-3": (["--smart-search-layers", "3"], {}),
    "search-layers-0": (["--smart-search-layers", "0"], {}),
}
TERMS = ("task_loss", "smart_loss", "bregman_loss")


def train_one(variant: str, arguments: list[str]) -> None:
    """fairseq-train in this process, with its format of log lines."""
    form = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
    logging.basicConfig(format=form, level=logging.INFO, stream=sys.stdout, force=True)
    parser = options.get_training_parser()
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, input_args=arguments))
    cfg.common.update(VARIANTS[variant][1])
    distributed_utils.call_main(cfg, train.main)


def planned(args: argparse.Namespace) -> list[trainings.Run]:
    """The runs of the chosen variants."""
    place = args.demo
    data, imported = place / "data" / "generated-bin", place / "encoder" / "fairseq"
    if not (data / "input0").is_dir() or not (imported / "model.pt").is_file():
        sys.exit(f"accuracy: error: --demo is {place}, which holds no encoder and no data; run `make demo` first")
    runs = []
    for variant in args.variants:
        for seed in range(1, args.seeds + 1):
            name = f"{variant}-seed{seed}"
            line = demo.training_command(demo.OWN_TASK, data, imported, place / "unused", "smart", seed, args.updates)
            command = [sys.executable, __file__, "--train", variant, *line[1:], "--no-save", *VARIANTS[variant][0]]
            log = place / "accuracy" / f"{name}.log"
            runs.append(trainings.Run(name, variant, seed, command, log, args.updates))
    return runs


def row(variant: str, runs: list[trainings.Run]) -> dict[str, Any]:
    """What the runs of one variant say."""
    terms = {name: [found for found in (table.term(run, name) for run in runs) if found] for name in TERMS}
    return {
        "variant": variant,
        "form": "first order" if "smoothness term to first order" in runs[0].log.read_text() else "two forwards",
        "accuracy": [run.valid[-1]["valid_accuracy"] for run in runs],
        "updates": [len(run.inner) for run in runs],
        **{name: statistics.mean(last for _, last in found) for name, found in terms.items()},
        "seconds_per_update": statistics.mean(run.seconds_per_update() or 0.0 for run in runs),
        "dropped": sum(
            line.get(f"{t}_dropped", 0.0) for run in runs for line in run.inner for t in ("smart", "bregman")
        ),
        "overflows": sum(run.log.read_text().count("gradient overflow detected") for run in runs),
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
    runs = planned(args)
    trainings.run_all(runs, args.jobs, 1)
    rows = [row(variant, [run for run in runs if run.method == variant]) for variant in args.variants]
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
        train_one(sys.argv[2], sys.argv[3:])
    else:
        main()
