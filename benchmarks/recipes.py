"""Does every recipe of examples/ act? Each is started on the demo's encoder; its terms beside its task loss.

    make demo                                                # once, for the encoder and the sentences
    python benchmarks/recipes.py --out benchmarks/results/recipes.json

What is measured is the size of the terms, so the data are the demo's movie sentences, in pairs where the task has two
texts, with labels drawn at random. All settings are the recipe's but data, model, the batch of 4, and the end
after 60 updates, of which 6 warm up.
"""

import argparse
import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from facts import ROOT, facts
from omegaconf import OmegaConf

from smart_fairseq.commands import preprocess
from smart_fairseq.commands.options import imported_flags
from smart_fairseq.data.readers import Row, read_task
from smart_fairseq.data.tasks import TASKS, Task
from smart_fairseq.study.recipe import prepare

UPDATES, WARMUP, BATCH = 60, 6, 4
LEAST = 1e-3  # of the task loss


def write_data(like: Task, sentences: list[Row], imported: Path, target: Path) -> None:
    """A data folder of the task's form: training rows for all updates, four for validation."""
    draw = random.Random(1)
    rows = []
    for number in range(UPDATES * BATCH + 4):
        texts = tuple(sentences[2 * number + place].texts[0] for place in range(like.texts))
        label = str(draw.uniform(0, like.divisor)) if like.regression else draw.choice(like.labels)
        rows.append(sentences[number]._replace(texts=texts, label=label, votes=()))
    data = preprocess.Data(dataclasses.replace(like, rows={}), {"train": rows[:-4], "valid": rows[-4:]})
    prepare(data, target, imported, max_tokens=128)


def task_of(recipe: Any) -> Task:
    """A task of the recipe's form."""
    criterion = recipe.criterion
    pair = recipe.task.separator_token is not None
    if criterion.regression_target:
        return TASKS["STS-B"]
    return TASKS[{(2, False): "CoLA", (2, True): "RTE", (3, True): "MNLI"}[recipe.task.num_classes, pair]]


def run(path: Path, data: Path, imported: Path, scratch: Path) -> dict[str, Any]:
    """Start one recipe; means of its log's entries over the last 20 updates."""
    flags = imported_flags(imported)
    model = {name[2:].replace("-", "_"): value for name, value in zip(flags[::2], flags[1::2])}
    arch = model.pop("arch")
    command = [
        *(sys.executable, "-c", "from fairseq_cli.hydra_train import cli_main; cli_main()"),
        *("--config-dir", str(path.parent), "--config-name", path.stem),
        *(f"task.data={data}", f"checkpoint.restore_file={imported / 'model.pt'}"),
        *(f"common.user_dir={ROOT / 'smart_fairseq'}", "common.cpu=true", "common.log_interval=1"),
        *(f"model._name={arch}", *(f"+model.{name}={value}" for name, value in model.items())),
        *(f"dataset.batch_size={BATCH}", "dataset.num_workers=0", "dataset.disable_validation=true"),
        *(f"optimization.max_update={UPDATES}", f"lr_scheduler.warmup_updates={WARMUP}", "dataset.valid_subset=valid"),
        *("checkpoint.no_save=true", "task.separator_token=null", f"hydra.run.dir={scratch / path.stem}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = done.stdout + done.stderr + "".join(p.read_text() for p in (scratch / path.stem).rglob("*.log"))
    lines = [json.loads(text) for text in dict.fromkeys(re.findall(r'\{"epoch".*?"task_loss".*?\}', log))]
    if done.returncode or len(lines) < UPDATES:
        sys.exit(f"recipes: error: {path}: ended with status {done.returncode}\n{log[-2000:]}")
    last = lines[UPDATES - 20 : UPDATES]
    found = {n: sum(float(line[n]) for line in last) / 20 for n in ("task_loss", "smart_loss", "bregman_loss")}
    return {"recipe": str(path.relative_to(ROOT)), **found, "share": found["smart_loss"] / found["task_loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / ".demo", help="where `make demo` put encoder and sentences")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    imported = (args.demo / "encoder" / "fairseq").resolve()
    sentences = read_task(TASKS["movie"], args.demo / "tasks")[0]["train"]
    rows = []
    print(
        "| recipe | task_loss | smart_loss | bregman_loss | smart_loss / task_loss |\n| --- | --- | --- | --- | --- |"
    )
    with tempfile.TemporaryDirectory() as name:
        for path in sorted((ROOT / "examples").glob("*/config/*.yaml")):
            data = Path(name) / path.stem
            write_data(task_of(OmegaConf.load(path)), sentences, imported, data)
            found = run(path, data, imported, Path(name) / "runs")
            rows.append(found)
            cells = [f"{found[n]:.3g}" for n in ("task_loss", "smart_loss", "bregman_loss", "share")]
            print(f"| {found['recipe']} | {' | '.join(cells)} |", flush=True)
    if args.out:
        args.out.write_text(json.dumps({**facts(__file__), "updates": UPDATES, "rows": rows}, indent=1) + "\n")
    if any(found["share"] < LEAST for found in rows):
        sys.exit(f"recipes: a smart_loss below {LEAST:g} of its task_loss")


if __name__ == "__main__":
    main()
