"""Launches, waits and memory of updates on a GPU, counted without one.

    python benchmarks/count_updates.py --model roberta_large --batch 16 --lengths 128 512 --dtype bf16 --out counts.json

An update as fairseq's trainer takes it, with torch's fake tensors on a CUDA device that is not there
(`pretended_cuda.py`): nothing is computed. Launches: kernels by forward + backward + optimizer's step. Waits: reads and
copies for which the host waits. Memory: the largest sum of all tensors at once, that is weights, gradients, what the
optimizer keeps, teacher and activations. What a kernel takes for itself while it runs and what torch's allocator keeps
is not in it; nor is the time of anything. It needs g++.
"""

# ruff: noqa: I001  before torch
import pretended_cuda

import argparse
import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from facts import facts
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from peak_memory import PeakMemory
from update_cost import MODELS, ROOT, batches, write_dictionaries

ADAM = ["--optimizer", "adam"]
MBPP = ["--optimizer", "mbpp"]
SMART = ["--criterion", "smart_sentence_prediction"]
FORMS = {
    "plain": ["--criterion", "sentence_prediction", *ADAM],
    "MBPP alone": [*SMART, "--smart-weight", "0", *MBPP],
    "SMART alone": [*SMART, *ADAM],
    "SMART + MBPP, two forwards": [*SMART, *MBPP],
    "SMART + MBPP, two forwards, `--mbpp-base adamw_fused`": [*SMART, *MBPP, "--mbpp-base", "adamw_fused"],
    "SMART + MBPP, two forwards, `--mbpp-base radam`": [*SMART, *MBPP, "--mbpp-base", "radam"],
    "SMART + MBPP, `--smart-recompute`": [*SMART, "--smart-recompute", *MBPP],
    "SMART + MBPP, tangent": [*SMART, "--smart-mode", "tangent", *MBPP],
}
PRECISIONS = ["fp32", "bf16", "fp16", "fp16 flat", "amp"]
GIB = 2**30


def configuration(model: str, flags: list[str], folder: Path) -> Any:
    """fairseq's, for a run of 100 updates."""
    arguments = [
        *(str(folder), "--task", "sentence_prediction", "--num-classes", "2", *MODELS[model][0]),
        *("--user-dir", str(ROOT / "smart_fairseq"), "--max-positions", "512", "--clip-norm", "1"),
        *("--lr", "1e-5", "--max-update", "100", *flags),
    ]
    return convert_namespace_to_omegaconf(
        options.parse_args_and_arch(options.get_training_parser(), input_args=arguments)
    )


def count(args: argparse.Namespace, flags: list[str], folder: Path, samples: dict[int, Any]) -> dict[str, Any]:
    """A form's update at each length; the first update, which makes the optimizer's state, is not counted."""
    with PeakMemory() as memory:
        update = pretended_cuda.Update(configuration(args.model, flags, folder), args.dtype)
        update.take(samples[min(samples)], 0)
        row: dict[str, Any] = {}
        for number, (length, sample) in enumerate(samples.items(), start=1):
            memory.peak = memory.held
            device = update.take(sample, number)
            row[f"GiB at {args.batch} x {length}"] = memory.peak / GIB
            if number == 1:
                row["launches"] = [device.launches[phase] for phase in ("forward", "backward", "step")]
                waits = {where: n for where, n in device.waits.items() if not where.startswith("step, copy")}
                row["waits"] = sum(waits.values())
                row["of ours"] = sum(n for where, n in waits.items() if "smart_fairseq/" in where)
    return {**row, "form": update.form}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="roberta_large")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512], help="launches are those of the first")
    parser.add_argument("--dtype", choices=PRECISIONS, default="bf16")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="also write the table as JSON")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # of hydra and fairseq about each other
    rows = {}
    with tempfile.TemporaryDirectory() as name, pretended_cuda.pretended() as to_device:
        folder = Path(name)
        write_dictionaries(folder, MODELS[args.model][1])
        samples = {}
        for length in args.lengths:
            one = argparse.Namespace(model=args.model, batch=args.batch, length=length, device="cpu", rounds=0)
            samples[length] = to_device(batches(one)[0])
        for label in args.forms:
            print(f"{label} ...", file=sys.stderr, flush=True)
            rows[label] = count(args, FORMS[label], folder, samples)
    chosen = {name: getattr(args, name) for name in ("model", "batch", "dtype")}
    about = {**facts(__file__, "cpu"), **chosen}
    print("counted, nothing was run; " + ", ".join(f"{key}: {value}" for key, value in about.items()))
    memory = [f"GiB at {args.batch} x {length}" for length in args.lengths]
    columns = ["launches: forward + backward + step", "waits", "of ours", *memory]
    print("| " + " | ".join(["form", *columns]) + " |")
    print("|" + " --- |" * (1 + len(columns)))
    for label, row in rows.items():
        launches = " + ".join(f"{number:,}" for number in row["launches"])
        cells = [launches, str(row["waits"]), str(row["of ours"]), *(f"{row[key]:.1f}" for key in memory)]
        print("| " + " | ".join([label, *cells]) + " |")
    if args.out:
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
