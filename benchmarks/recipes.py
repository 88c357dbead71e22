"""Do the recipes of examples/ and README's command act? Each on the demo's encoder; its terms beside its task loss.

    make demo                                                # once, for the encoder and the sentences
    python benchmarks/recipes.py --out benchmarks/results/recipes.json

What is measured is the size of the terms, so the data are the demo's movie sentences, the shorter half, in pairs where
the task has two texts; the label is how positive the first text is, in as many steps as the task has labels. All
settings are the recipe's (the command's), learning rate and warm-up too, but data, architecture, and the end after 60
updates. It takes half an hour.
"""

import argparse
import dataclasses
import json
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from facts import ROOT, facts
from omegaconf import OmegaConf

from smart_fairseq.commands import preprocess
from smart_fairseq.commands.options import import_report, plugin_flags
from smart_fairseq.data.lines import Row
from smart_fairseq.data.readers import read_task
from smart_fairseq.data.tasks import TASKS, Task
from smart_fairseq.study.recipe import prepare

UPDATES, LONGEST = 60, 18  # words
LEAST = 1e-3  # of the task loss


def write_data(like: Task, batch: int, sentences: list[Row], imported: Path, target: Path) -> None:
    """A data folder of the task's form: training rows for all updates, four for validation."""
    count = UPDATES * batch + 4
    drawn = random.Random(1).sample(sentences, like.texts * count)
    first, second = drawn[:count], drawn[count:]
    rows = []
    for place, row in enumerate(sorted(first, key=lambda row: sum(map(float, row.votes)) / len(row.votes))):
        texts = (row.texts[0], second[place].texts[0]) if second else row.texts
        share = place / count
        label = str(share * like.divisor) if like.regression else like.labels[int(share * len(like.labels))]
        rows.append(row._replace(texts=texts, label=label, votes=()))
    random.Random(2).shuffle(rows)
    data = preprocess.Data(dataclasses.replace(like, rows={}), {"train": rows[:-4], "valid": rows[-4:]})
    prepare(data, target, imported, max_tokens=128)


def task_of(recipe: Any) -> Task:
    """A task of the recipe's form."""
    criterion = recipe.criterion
    pair = recipe.task.separator_token is not None
    if criterion.regression_target:
        return TASKS["STS-B"]
    return TASKS[{(2, False): "CoLA", (2, True): "MRPC", (3, True): "MNLI"}[recipe.task.num_classes, pair]]


def recipe_command(path: Path, data: Path, imported: Path, logs: Path) -> list[str]:
    """What starts a recipe on these data and this encoder."""
    recipe, architecture = OmegaConf.load(path), import_report(imported)["overrides"]
    return [
        *("-c", "from fairseq_cli.hydra_train import cli_main; cli_main()"),
        *("--config-dir", str(path.parent), "--config-name", path.stem),
        *(f"task.data={data}", f"checkpoint.restore_file={imported / 'model.pt'}"),
        *(f"common.user_dir={ROOT / 'smart_fairseq'}", "common.cpu=true", "common.log_interval=1"),
        *(override for override in architecture if not override.startswith("optimization.lr=")),
        *("dataset.num_workers=0", "dataset.disable_validation=true", "dataset.valid_subset=valid"),
        *(f"optimization.max_update={UPDATES}", f"+lr_scheduler.total_num_update={recipe.optimization.max_update}"),
        *("checkpoint.no_save=true", f"hydra.run.dir={logs}"),
    ]


def readme_command(data: Path, imported: Path) -> list[str]:
    """README's command for RTE on these data and this encoder; of two values of a flag the second counts."""
    printed = re.search(r"^fairseq-train RTE-bin (.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert printed
    # the separator is for fairseq's RoBERTa; this encoder marks pairs itself
    words = shlex.split(printed[1].replace("\\\n", " ").replace(" --separator-token 2", ""))
    return [
        *("-c", "from fairseq_cli.train import cli_main; cli_main()", str(data), *words),
        *(*plugin_flags(), "--finetune-from-model", str(imported / "model.pt"), *import_report(imported)["flags"]),
        *("--cpu", "--num-workers", "0", "--disable-validation", "--no-save", "--save-dir", str(data / "none")),
        *("--log-format", "json", "--log-interval", "1", "--max-update", str(UPDATES)),
    ]


def run(name: str, command: list[str], logs: Path) -> dict[str, Any]:
    """Run it; means of its log's entries over the last 20 updates."""
    command = [sys.executable, *command]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = done.stdout + done.stderr + "".join(p.read_text() for p in logs.rglob("*.log"))
    lines = [json.loads(text) for text in dict.fromkeys(re.findall(r'\{"epoch".*?"task_loss".*?\}', log))]
    if done.returncode or len(lines) < UPDATES:
        sys.exit(f"recipes: error: {name}: ended with status {done.returncode}\n{done.stderr[-2000:]}")
    last = lines[UPDATES - 20 : UPDATES]
    found = {n: sum(float(line[n]) for line in last) / 20 for n in ("task_loss", "smart_loss", "bregman_loss")}
    return {"recipe": name, **found, "share": found["smart_loss"] / found["task_loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / ".demo", help="where `make demo` put encoder and sentences")
    parser.add_argument("--out", type=Path, help="keep the figures as JSON; what is in it is not run again")
    args = parser.parse_args()
    imported = (args.demo / "encoder" / "fairseq").resolve()
    sentences = read_task(TASKS["movie"], args.demo / "tasks")[0]["train"]
    sentences = [row for row in sentences if len(row.texts[0].split()) <= LONGEST]
    rows = json.loads(args.out.read_text())["rows"] if args.out and args.out.exists() else []
    done = {row["recipe"] for row in rows}
    print(
        "| recipe | task_loss | smart_loss | bregman_loss | smart_loss / task_loss |\n| --- | --- | --- | --- | --- |"
    )
    recipes = {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "examples").glob("*/config/*.yaml"))}
    with tempfile.TemporaryDirectory() as folder:
        for name in [name for name in [*recipes, "README.md"] if name not in done]:
            recipe = OmegaConf.load(recipes.get(name, ROOT / "examples/glue/config/rte.yaml"))
            data, logs = Path(folder) / Path(name).stem, Path(folder) / "logs" / Path(name).stem
            write_data(task_of(recipe), recipe.dataset.batch_size, sentences, imported, data)
            if name in recipes:
                command = recipe_command(recipes[name], data, imported, logs)
            else:
                command = readme_command(data, imported)
            found = run(name, command, logs)
            rows.append({**found, "commit": facts(__file__)["commit"]})
            cells = [f"{found[n]:.3g}" for n in ("task_loss", "smart_loss", "bregman_loss", "share")]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
            if args.out:
                args.out.write_text(json.dumps({**facts(__file__), "updates": UPDATES, "rows": rows}, indent=1) + "\n")
    if any(found["share"] < LEAST for found in rows):
        sys.exit(f"recipes: a smart_loss below {LEAST:g} of its task_loss")


if __name__ == "__main__":
    main()
