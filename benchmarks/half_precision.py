"""Does a run in half precision end where float32 ends? The demo's task and encoder, SMART + MBPP, 200 updates.

    make demo                              # once, for the encoder and the data
    python benchmarks/half_precision.py --seeds 2 --out half_precision.json

On a CPU bfloat16 is as fast as the processor has instructions for it, and float16 several times slower than float32.
"""

import argparse
import json
import logging
import statistics
import sys
from pathlib import Path
from typing import Any, Dict, List

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples" / "demo"), str(ROOT)]

import run as demo  # noqa: E402
import trainings  # noqa: E402
from facts import facts  # noqa: E402
from fairseq import distributed_utils, options  # noqa: E402
from fairseq.dataclass.utils import convert_namespace_to_omegaconf  # noqa: E402
from fairseq_cli import train  # noqa: E402

# settings of fairseq's configuration: on the command line it takes --bf16 for --tpu
PRECISIONS: Dict[str, Dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"bf16": True},
    "float16": {"fp16": True, "fp16_no_flatten_grads": True},
}
TERMS = ("task_loss", "smart_loss", "bregman_loss")


def train_one(precision: str, arguments: List[str]) -> None:
    """fairseq-train in this process, with its format of log lines."""
    form = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
    logging.basicConfig(format=form, level=logging.INFO, stream=sys.stdout, force=True)
    parser = options.get_training_parser()
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, input_args=arguments))
    cfg.common.update(PRECISIONS[precision])
    distributed_utils.call_main(cfg, train.main)


def planned(args: argparse.Namespace) -> List[trainings.Run]:
    """The runs; float16 first, since it takes longest."""
    place = args.demo
    data, imported = place / "data" / "generated-bin", place / "encoder" / "fairseq"
    if not (data / "input0").is_dir() or not (imported / "model.pt").is_file():
        sys.exit(f"half_precision: error: --demo is {place}, which holds no encoder and no data; run `make demo` first")
    runs = []
    for precision in reversed(args.precisions):
        for seed in range(1, args.seeds + 1):
            name = f"{precision}-seed{seed}"
            line = demo.training_command(demo.OWN_TASK, data, imported, place / "unused", "smart", seed, args.updates)
            command = [sys.executable, __file__, "--train", precision, *line[1:], "--no-save"]
            log = place / "half_precision" / f"{name}.log"
            runs.append(trainings.Run(name, precision, seed, command, log, args.updates))
    return runs


def row(precision: str, runs: List[trainings.Run]) -> Dict[str, Any]:
    """What the runs of one precision say."""
    accuracies = [run.valid[-1]["valid_accuracy"] for run in runs]
    last = [line for run in runs for line in run.inner[-max(1, run.updates // 10) :]]
    return {
        "precision": precision,
        "form": "first order" if "smoothness term to first order" in runs[0].log.read_text() else "two forwards",
        "accuracy": accuracies,
        "updates": [len(run.inner) for run in runs],
        **{term: statistics.mean(line[term] for line in last) for term in TERMS},
        "dropped": sum(
            line.get(f"{t}_dropped", 0.0) for run in runs for line in run.inner for t in ("smart", "bregman")
        ),
        "overflows": sum(run.log.read_text().count("gradient overflow detected") for run in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, with one thread each")
    parser.add_argument("--demo", type=Path, default=ROOT / ".demo", help="where `make demo` put encoder and data")
    parser.add_argument("--out", type=Path, help="also write the table as JSON")
    args = parser.parse_args()
    runs = planned(args)
    trainings.run_all(runs, args.jobs, 1)
    rows = [row(precision, [run for run in runs if run.method == precision]) for precision in args.precisions]
    about = facts(__file__)
    print(", ".join(f"{key}: {value}" for key, value in about.items()))
    print("| precision | form | accuracy per seed | task_loss | smart_loss | bregman_loss | dropped | overflows |")
    print("|" + " --- |" * 8)
    for found in rows:
        shown = [" ".join(f"{value:.1f}" for value in found["accuracy"]), *(f"{found[term]:.3g}" for term in TERMS)]
        print(f"| {found['precision']} | {found['form']} | {' | '.join(shown)} | "
              f"{found['dropped']:g} | {found['overflows']} |")  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps({**about, "updates": args.updates, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train_one(sys.argv[2], sys.argv[3:])
    else:
        main()
