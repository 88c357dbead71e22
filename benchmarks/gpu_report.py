"""What a GPU makes of the plugin, as one Markdown file to send back: about ten minutes.

    python benchmarks/gpu_report.py --glue glue_data --checkpoint roberta.large/model.pt --out gpu-report.md

Hardware and versions; the tests that need a GPU; time, memory, waits and launches of an update; 60 updates of RTE by
SMART + MBPP. Each part is a process of its own, and the file is written after each: one that fails, hangs or kills the
device's context takes nothing else with it, and the report ends with what it said. Without --glue the training is left
out; without --checkpoint it begins at random weights, so that its times count and its losses do not.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["tests/test_precision.py", "tests/test_workers.py", "tests/test_faults.py"]
VARIANTS = [
    "plain",
    "MBPP alone",
    "SMART + MBPP, the default recipe",
    "SMART + MBPP, the default recipe, --mbpp-base adamw_fused",
    "SMART + MBPP, the release's recipe",
    "literal",
]
BEGINNING = {
    "machine": "## Machine",
    "tests": "## Tests\n\n`make test-gpu`\n",
    "update": "## An update\n\nMedian of the rounds, optimizer's step included; memory as torch counts it, all of it, "
    "and what is beyond weights, gradients, optimizer and teacher. `literal` is how public code does it.\n",
    "training": "## RTE",
}
COLUMNS = {
    "seconds": "seconds",
    "peak_gib": "GiB",
    "activations_gib": "GiB of activations",
    "synchronisations": "waits",
    "launches": "launches",
}
LAST_LINES = 30


class Part(NamedTuple):
    """A process, and what the report says of it.

    section: under which heading, from `BEGINNING`.
    read: what it printed -> Markdown; called where it ended well.
    needed: what follows in the section is left out where this part fails.
    partly: failing, it still has something to read.
    """

    name: str
    section: str
    command: list[str]
    read: Callable[[str], str]
    needed: bool = False
    partly: bool = False


class Ended(NamedTuple):
    """rc: exit status; None where the time limit ended the process."""

    rc: int | None
    output: str
    seconds: float


def run(command: Sequence[str], log: Path, limit: float, env: dict[str, str]) -> Ended:
    """A process in its own group; what it prints goes to a file, which is there whatever becomes of the process."""
    begun = time.monotonic()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=env,
            start_new_session=True,
        )
        try:
            rc: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            rc = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
    return Ended(rc, log.read_text(errors="replace"), time.monotonic() - begun)


class Report:
    """The Markdown file, written anew after each part.

    hidden: texts, such as folders of this machine, and what stands in their place.
    """

    def __init__(self, out: Path, hidden: dict[str, str]) -> None:
        self.out, self.hidden = out, hidden
        self.sections: dict[str, list[str]] = {}
        self.failed: list[str] = []

    def add(self, section: str, text: str) -> None:
        self.sections.setdefault(section, [BEGINNING[section]]).append(text)
        self.write()

    def fail(self, name: str, ended: Ended, limit: float) -> None:
        why = f"was ended after {limit:.0f} s" if ended.rc is None else f"ended with status {ended.rc}"
        lines = "\n".join(ended.output.rstrip().splitlines()[-LAST_LINES:])
        self.failed.append(f"### {name}\n\n{why} after {ended.seconds:.0f} s:\n\n```\n{lines}\n```")
        self.write()

    def write(self) -> None:
        parts = ["\n".join(self.sections[name]) for name in BEGINNING if name in self.sections]
        failed = "\n\n".join(self.failed) if self.failed else "Nothing."
        text = "\n\n".join(["# smart_fairseq on a GPU", *parts, f"## What failed\n\n{failed}"]) + "\n"
        for hidden, shown in self.hidden.items():
            text = text.replace(hidden, shown)
        self.out.write_text(text, encoding="utf-8")


def take(parts: Sequence[Part], report: Report, limit: float, env: dict[str, str]) -> None:
    """Run the parts one after the other."""
    left_out: set[str] = set()
    with tempfile.TemporaryDirectory() as name:
        for part in parts:
            if part.section in left_out:
                continue
            print(f"{part.name} ...", flush=True)
            ended = run(part.command, Path(name) / "log", limit, env)
            good = ended.rc == 0
            if good or part.partly:
                try:
                    report.add(part.section, part.read(ended.output))
                except Exception as error:  # of what a process printed that did not end as it should
                    good, ended = False, ended._replace(output=f"{ended.output}\n{error!r}")
            if not good:
                report.fail(part.name, ended, limit)
                if part.needed:
                    left_out.add(part.section)


# --- what the processes print, as Markdown -------------------------------------------------------------


def table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def read_machine(output: str) -> str:
    found = json.loads(output.splitlines()[-1])
    return table([["", ""], ["---", "---"], *([key, str(value)] for key, value in found.items())])


def read_tests(output: str) -> str:
    """A row of counts, and each test that failed; from its line, which a run that is cut off has too."""
    names: dict[str, set[str]] = {}
    for line in output.splitlines():
        # by itself the name comes first, side by side the process and the word
        found = re.match(r"(?:\[gw\d+\].*?(?P<word>[A-Z]+) )?(?P<name>tests/.+?::.+?)\s*(?P<last> [A-Z]{5,}|$)", line)
        if found and (found["word"] or found["last"].strip()):
            names.setdefault(found["word"] or found["last"].strip(), set()).add(found["name"])
    if not names:
        raise ValueError("no line on a test")
    bad = sorted(names.get("FAILED", set()) | names.get("ERROR", set()))
    seconds = re.search(r" in ([\d.]+)s", output.rstrip().splitlines()[-1])
    heading = ["passed", "failed", "skipped", "seconds"]
    row = [str(len(names.get("PASSED", ()))), str(len(bad)), str(len(names.get("SKIPPED", ())))]
    row.append(seconds[1] if seconds else "cut off")
    return "\n".join(
        [table([heading, ["---"] * len(row), row]), *(["", *(f"- {name}" for name in bad)] if bad else [])]
    )


class Updates:
    """The rows of the benchmark's table, whose heading comes with the first."""

    def __init__(self) -> None:
        self.plain: float | None = None
        self.columns: list[str] = []

    def read(self, output: str) -> str:
        (row,) = json.loads(output.splitlines()[-1])["rows"]
        heading = []
        if not self.columns:
            self.columns = [name for name in COLUMNS if name in row]
            names = ["", *(COLUMNS[name] for name in self.columns), "seconds, plain = 1"]
            heading = [names, ["---"] * len(names)]
        if row["variant"] == "plain":
            self.plain = row["seconds"]
        cells = [row["variant"]]
        for name in self.columns:
            value = row.get(name, "")
            cells.append(f"{value:.3g}" if isinstance(value, float) else str(value))
        cells.append(f"{row['seconds'] / self.plain:.2f}" if self.plain else "")
        return table([*heading, cells])


def read_training(output: str) -> str:
    """The first and the last of fairseq's lines on updates, and that on the valid split."""
    lines = {name: [json.loads(line) for line in re.findall(rf"\| {name} \| (\{{.*\}})$", output, re.MULTILINE)]
             for name in ("train_inner", "valid")}  # fmt: skip
    first, last = lines["train_inner"][0], lines["train_inner"][-1]
    keys = ["num_updates", "task_loss", "smart_loss", "smart_delta", "bregman_loss", "gnorm", "ups", "gb_free"]
    rows = [["", "first line", "last line"], ["---"] * 3]
    rows += [[f"`{key}`", str(first[key]), str(last[key])] for key in keys if key in first]
    rows += [[f"`valid_{key}`", "", str(lines["valid"][-1][f"valid_{key}"])] for key in ("loss", "accuracy")]
    return table(rows)


# --- the processes -----------------------------------------------------------------------------------


def machine(device: str) -> None:
    """Print hardware and versions as one line of JSON; a process of its own, because it wakes the device."""
    import torch
    from facts import facts

    found = {key: value for key, value in facts(__file__, device).items() if key != "command"}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "devices": torch.cuda.device_count(),
            "memory": f"{properties.total_memory / 2**30:.1f} GiB",
            "capability": f"{properties.major}.{properties.minor}",
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            "bfloat16": torch.cuda.is_bf16_supported(),
        }
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True)
        found["driver"] = driver.stdout.split("\n")[0] if driver.returncode == 0 else "not known"
    print(json.dumps(found))


def train(arguments: str, common: str) -> None:
    """fairseq-train; both as JSON."""
    from smart_fairseq.study.worker import train as fairseq_train

    fairseq_train(json.loads(arguments), json.loads(common))


def call(function: str, *arguments: str) -> list[str]:
    """The command that runs a function of this file."""
    code = f"import gpu_report, sys; gpu_report.{function}(*sys.argv[1:])"
    return [sys.executable, "-c", code, *arguments]


def training(args: argparse.Namespace, data: Path) -> tuple[list[str], dict[str, Any]]:
    """Arguments of fairseq-train, and settings that its command line does not have."""
    from update_cost import MODELS

    return [
        *(str(data), "--user-dir", str(ROOT / "smart_fairseq"), "--task", "sentence_prediction", "--num-classes", "2"),
        *("--init-token", "0", "--separator-token", "2", *MODELS[args.model][0], "--max-positions", "512"),
        *("--criterion", "smart_sentence_prediction", "--optimizer", "mbpp", "--mbpp-base", "adamw_fused"),
        *("--adam-betas", "(0.9, 0.98)", "--adam-eps", "1e-6", "--weight-decay", "0.1", "--clip-norm", "1"),
        *("--lr-scheduler", "polynomial_decay", "--lr", "2e-5", "--warmup-updates", str(args.updates // 10)),
        *("--max-update", str(args.updates), "--total-num-update", str(args.updates)),
        *("--batch-size", str(args.batch), "--required-batch-size-multiple", "1", "--seed", "1", "--num-workers", "0"),
        *("--log-format", "json", "--log-interval", str(max(1, args.updates // 6)), "--no-save"),
        *(("--finetune-from-model", str(args.checkpoint)) if args.checkpoint else ()),
        *(("--cpu",) if args.device == "cpu" else ()),
        *(("--fp16",) if args.dtype == "fp16" else ()),
    ], {"bf16": True} if args.dtype == "bf16" else {}


def parts(args: argparse.Namespace, folder: Path) -> list[Part]:
    """All that the report is made of; files go to ``folder``."""
    cost = [sys.executable, "benchmarks/update_cost.py", "--rounds", str(args.rounds), "--float32-copies", "--json"]
    cost += ["--model", args.model, "--batch", str(args.batch), "--length", str(args.length)]
    cost += ["--dtype", args.dtype, "--device", args.device, "--variants"]
    updates = Updates()
    many = args.device == "cuda" and importlib.util.find_spec("xdist")
    side_by_side = ["-n", str(min(8, os.cpu_count() or 1))] if many else []
    # a line on each test, without pyproject.toml's -q
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "-v",
        "--tb=short",
        *side_by_side,
    ]
    found = [
        Part("machine", "machine", call("machine", args.device), read_machine),
        Part("tests", "tests", [*pytest, *args.tests], read_tests, partly=True),
        *(Part(f"an update, {name}", "update", [*cost, name], updates.read) for name in args.variants),
    ]
    if args.glue is None:
        return found
    data = folder / "RTE-bin"
    prepare = [sys.executable, "examples/glue/preprocess.py", "--task", "RTE", "--data-dir", str(args.glue)]
    prepare += ["--out", str(data), "--bpe", "gpt2", "--bpe-dir", str(args.bpe_dir or args.glue / "gpt2_bpe")]
    arguments, common = training(args, data)
    beginning = "from the checkpoint" if args.checkpoint else "from random weights"
    said = f"\n{args.updates} updates of {args.batch} rows by SMART + MBPP, {args.dtype}, {beginning}.\n"
    return [
        *found,
        Part("RTE's data folder", "training", prepare, lambda output: said, needed=True),
        Part("training on RTE", "training", call("train", json.dumps(arguments), json.dumps(common)), read_training),
    ]


def main(given: Sequence[str] | None = None) -> int:
    import torch
    from update_cost import DTYPES, MODELS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-report.md"))
    parser.add_argument(
        "--glue", type=Path, help="folder of GLUE's files, with RTE and gpt2_bpe; otherwise no training"
    )
    parser.add_argument(
        "--bpe-dir", type=Path, help="where encoder.json, vocab.bpe and dict.txt are; default: in --glue"
    )
    parser.add_argument("--checkpoint", type=Path, help="of --model, to begin the training from")
    parser.add_argument("--model", choices=sorted(MODELS), default="roberta_large")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="cpu: to try the script")
    parser.add_argument("--updates", type=int, default=60, help="of RTE")
    parser.add_argument("--rounds", type=int, default=15, help="updates that are timed, of each variant")
    parser.add_argument("--tests", nargs="*", default=TESTS, metavar="FILE")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=VARIANTS, metavar="NAME")
    parser.add_argument("--limit", type=float, default=900, help="seconds that a part may take")
    args = parser.parse_args(given)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --device cpu --model tiny tries the script without one")
    for name in ("glue", "bpe_dir", "checkpoint"):  # the processes run in the project's folder
        setattr(args, name, getattr(args, name) and getattr(args, name).resolve())
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    env["SMART_TEST_DEVICE"] = args.device
    with tempfile.TemporaryDirectory() as name:
        hidden = {name: "TEMPORARY", **({str(args.glue): "GLUE"} if args.glue else {}), str(ROOT): "."}
        hidden |= {str(Path.home()): "~"} if len(Path.home().parts) > 1 else {}
        report = Report(args.out, hidden)
        if args.glue is None:
            report.add("training", "\nSkipped: no --glue.")
        take(parts(args, Path(name)), report, args.limit, env)
    print(f"{args.out}: {len(report.failed)} of the parts failed")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
