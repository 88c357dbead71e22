"""A small plan of a study, on tiny models or without any."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import toolkit
from toolkit import TINY_MODEL

from smart_fairseq.study import studying
from smart_fairseq.study.__main__ import main
from smart_fairseq.study.plan import read_plan
from smart_fairseq.study.studying import Study

PLAN = """
out: {folder}/out
work: {folder}/work
encoder:
  flags: {{{model}}}
train: {{batch-size: 4, lr: 1e-3, epochs: 2}}
tasks:
  letters: {{data: {data}, rows: 12}}
methods:
  plain: {{criterion: sentence_prediction, optimizer: adam}}
  smart: {{criterion: smart_sentence_prediction, optimizer: adam, smart-weight: 0}}
seeds: [1, 2]
"""
MODEL = ", ".join(f"{name.removeprefix('--')}: {value}" for name, value in zip(TINY_MODEL[::2], TINY_MODEL[1::2]))


def write_data(folder: Path, **more: Any) -> Path:
    """A data folder of `toolkit.write_data`, with what preprocess says about it."""
    toolkit.write_data(folder, **more)
    regression = more.get("kind") == "regression"
    about = {"task": "letters", "bpe": "gpt2", "labels": [] if regression else ["1", "0"], "divisor": 1, "rows": {}}
    (folder / "preprocess.json").write_text(json.dumps(about))
    return folder


def without_plain(text: str) -> str:
    """A plan of the other method alone."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("  plain:"))


def write_plan(folder: Path, data: Path, text: str = PLAN) -> Path:
    """plan.yaml in ``folder``, for the data folder ``data``."""
    path = folder / "plan.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text.format(folder=folder, data=data, model=MODEL))
    return path


# a worker that trains nothing: 3 updates, then logits by seed and method; under attack every answer is class 0
FAKE = """
import json, sys, time
import numpy as np
out, asked, flags = sys.argv[1], json.loads(sys.argv[2])["attack"], sys.argv[3:]
seed = int(flags[flags.index("--seed") + 1])
for update in range(3):
    print("x | INFO | train_inner | " + json.dumps({"loss": "1", "num_updates": str(update)}), flush=True)
    time.sleep(SLEEP)
draw = np.random.default_rng([seed, "smart_sentence_prediction" in flags])
stored = {"logits": draw.normal(size=(22, 2)), "labels": np.arange(22) % 2}
if asked:
    rows = np.arange(asked["rows"])
    always = np.zeros((len(asked["radii"]), len(rows), 2)) + [1, 0]
    stored |= {"attack_rows": rows, "attack_radii": asked["radii"], "attack_loss": always, "attack_random": always}
np.savez(out, **stored)
print('x | INFO | scored | {"rows": 22, "cpu_seconds": 1, "cpu_seconds_per_update": 0.1}')
"""


def write_fake(folder: Path, sleep: float = 0) -> Path:
    """That worker's program, which sleeps so many seconds after each update."""
    (folder / "fake.py").write_text(FAKE.replace("SLEEP", str(sleep)))
    return folder / "fake.py"


def study_of(plan: Path, worker: Path) -> None:
    """The command, quietly; a process that was started in the background ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    studying.WORKER = (sys.executable, str(worker))
    sys.exit(main([str(plan), "--jobs", "1"]))


def keys(plan: Path) -> dict[str, str]:
    """By its name each run's key."""
    study = Study(read_plan(plan))
    return {asked.name: study.key(asked) for asked in study.plan.runs()}
