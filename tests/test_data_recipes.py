"""The hydra recipes say what the table of tasks and the paper say, and run."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_samples import ROOT, make_glue, make_gpt2_bpe, train
from fairseq.dataclass.initialize import hydra_init
from fairseq_cli import hydra_train
from hf_samples import write_hf, write_task_data
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from toolkit import USER_DIR, capture_log, command, write_data, write_labels
from toolkit import train as run_training

from smart_fairseq.commands.preprocess import glue_main
from smart_fairseq.config.recipes import RECIPES as SMART_RECIPES
from smart_fairseq.criterions.smart_sentence_prediction import SmartSentencePredictionConfig
from smart_fairseq.data.tasks import ANLI, GLUE, TASKS
from smart_fairseq.errors import explain
from smart_fairseq.import_hf import import_hf
from smart_fairseq.optim.mbpp import MBPPConfig

RECIPES = sorted((ROOT / "examples").glob("*/config/*.yaml"))
LABELLED_ROWS = {"SNLI": 549367, "anli": sum(TASKS[name].rows["train"] for name in ANLI)}
LABELLED_ROWS["anli_mnli_snli_fever"] = LABELLED_ROWS["anli"] + 392702 + 549367 + 208346


def task_of(path):
    by_name = {name.lower().replace("-", "_"): task for name, task in TASKS.items()}
    return TASKS["ANLI-R1"] if path.stem.startswith("anli") else by_name[path.stem]


def test_every_task_that_trains_has_a_recipe():
    expected = {name.lower().replace("-", "_") for name in (*GLUE, "SNLI", "SciTail") if name != "AX"}
    assert {path.stem for path in RECIPES if path.parts[-3] == "glue"} == expected
    assert {path.stem for path in RECIPES if path.parts[-3] == "anli"} == {"anli", "anli_mnli_snli_fever"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    recipe, task = OmegaConf.load(path), task_of(path)
    assert recipe.task.num_classes == task.num_classes
    assert recipe.task.separator_token == (2 if task.texts == 2 else None)
    assert recipe.criterion.regression_target == task.regression
    assert recipe.criterion.classification_head_name == "sentence_classification_head"
    assert recipe.checkpoint.best_checkpoint_metric == task.metrics[0]
    metric = task.metrics[0]
    assert metric == "accuracy" or recipe.criterion[f"report_{metric}"] is True
    assert recipe.dataset.required_batch_size_multiple == 1
    assert ("valid1" in task.splits) == (recipe.dataset.get("valid_subset") == "valid,valid1")
    # the paper's section 4.1
    assert recipe.optimization.max_epoch <= 6 and recipe.optimization.clip_norm == 1
    assert recipe.dataset.batch_size in (16, 32, 64) and recipe.optimization.lr[0] in (1e-5, 2e-5, 3e-5, 5e-5)
    assert recipe.criterion.smart_weight in (1, 3, 5)
    smart = SMART_RECIPES["smart"]
    assert {name: recipe.criterion[name] for name in ("smart_epsilon_unit", "smart_epsilon")}.items() <= smart.items()
    assert recipe.model.pooler_dropout == {"MNLI": 0.3, "CoLA": 0.05}.get(task.name, 0.1)
    rows = LABELLED_ROWS.get(task.name) or LABELLED_ROWS.get(path.stem) or task.rows["train"]
    updates = recipe.optimization.max_epoch * math.ceil(rows / recipe.dataset.batch_size)
    assert recipe.optimization.max_update == updates
    assert recipe.lr_scheduler.warmup_updates == round(updates / 10)
    # keys that the plugin does not know would only be found at the start of a run
    for section, config in (("criterion", SmartSentencePredictionConfig), ("optimizer", MBPPConfig)):
        assert set(recipe[section]) <= {"_name", *config.__dataclass_fields__}, section


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_launch_line_names_the_recipe(path):
    lines = path.read_text().splitlines()
    launch = " ".join(line.lstrip("# ").rstrip("\\") for line in lines[1:3])
    assert lines[0] == "# @package _group_"
    folder = f"examples/{path.parts[-3]}/config"
    assert launch.startswith(f"fairseq-hydra-train --config-dir {folder} --config-name {path.stem} task.data=")
    assert re.search(r"checkpoint.restore_file=\S+ common.user_dir=\$PWD/smart_fairseq", launch)
    name = "ANLI" if path.stem.startswith("anli") else task_of(path).name
    assert f"task.data=$PWD/{name}-bin " in launch


# what the documents offer to change, with a tiny model in the place of each
TINY = ["encoder_layers=2", "encoder_embed_dim=16", "encoder_ffn_embed_dim=32", "encoder_attention_heads=2"]
MOMENTUM = "optimizer.mbpp_recipe=paper"
PAPER = "criterion.smart_recipe=paper criterion.smart_epsilon_unit=absolute criterion.smart_epsilon=1e-5"
OVERRIDES = {
    "RoBERTa base, less memory": "model._name=roberta_base dataset.batch_size=8 optimization.update_freq=[2]",
    "BERT, the paper's constants": f"model._name=smart_bert task.separator_token=null {PAPER} {MOMENTUM}",
    "a narrow encoder": "optimization.lr=[1e-4]",
}


def composed(path, *overrides):
    """The recipe as fairseq-hydra-train composes it."""
    GlobalHydra.instance().clear()
    hydra_init(path.stem)
    with initialize_config_dir(str(path.parent), version_base="1.1"):
        return compose(path.stem, list(overrides))


@pytest.fixture(scope="module")
def data_by_classes(class_data, regression_data, tmp_path_factory):
    three = write_data(tmp_path_factory.mktemp("three") / "data")
    for split, count in (("train", 24), ("valid", 10)):
        write_labels(three, split, ["1", "0"] * (count // 2), last="2", words=("1", "0", "2"))
    return {1: regression_data, 2: class_data, 3: three}


def start(path, data, restore_file, *overrides):
    """An update, after which the terms are in the log."""
    given = [f"task.data={data}", f"checkpoint.restore_file={restore_file}", f"common.user_dir={USER_DIR}"]
    given += ["common.cpu=true", "common.reset_logging=false", "common.log_interval=1", "dataset.num_workers=0"]
    given += ["dataset.disable_validation=true", "checkpoint.no_save=true", "optimization.max_update=1"]
    given += ["lr_scheduler.warmup_updates=0", "dataset.valid_subset=valid"]
    cfg = composed(path, *given, *overrides)
    with capture_log() as log:
        hydra_train._hydra_main(cfg)
    (update,) = log["train_inner"]
    assert update["smart_loss"] > 0 and update["bregman_loss"] > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OVERRIDES)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_starts_with_what_the_documents_offer(path, kind, data_by_classes):
    data = data_by_classes[OmegaConf.load(path).task.num_classes]
    sizes = [f"+model.{size}" for size in (*TINY, "max_positions=32")]
    start(path, data, "checkpoint_last.pt", "task.max_positions=32", *sizes, *OVERRIDES[kind].split())


HALF = {"common.fp16=true": ["common.fp16_no_flatten_grads=true"], "common.bf16=true": []}  # and what a CPU needs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", HALF)
def test_a_recipe_starts_in_half_precision(precision, class_data):
    (recipe,) = (path for path in RECIPES if path.stem == "rte")
    sizes = [f"+model.{size}" for size in (*TINY, "max_positions=32")]
    more = ["model._name=roberta_base", "task.max_positions=32", precision, *HALF[precision]]
    start(recipe, class_data, "checkpoint_last.pt", *more, *sizes)


# what other tests here start with
ELSEWHERE = "model._name=smart_bert_minilm_l6 common.cpu=true optimization.max_update=60 lr_scheduler.warmup_updates=6"
GOING_ON = "checkpoint.reset_optimizer=false checkpoint.reset_dataloader=false checkpoint.reset_meters=false"


@pytest.mark.filterwarnings("ignore")
def test_a_recipe_goes_on_where_it_stopped(class_data, tmp_path):
    """From the encoder at first, and then from its own checkpoint, teacher included."""
    (recipe,) = (path for path in RECIPES if path.stem == "rte")
    run_training(command(class_data, save_dir=tmp_path / "encoder", max_update=1))
    given = [f"checkpoint.finetune_from_model={tmp_path / 'encoder' / 'checkpoint_last.pt'}", *GOING_ON.split()]
    given += ["checkpoint.restore_file=checkpoint_last.pt", f"checkpoint.save_dir={tmp_path / 'run'}"]
    given += [f"task.data={class_data}", f"common.user_dir={USER_DIR}", "model._name=roberta", "task.max_positions=32"]
    given += [f"+model.{size}" for size in (*TINY, "max_positions=32")]
    given += ["common.cpu=true", "common.reset_logging=false", "common.log_interval=1", "dataset.num_workers=0"]
    given += ["dataset.disable_validation=true", "lr_scheduler.warmup_updates=1"]
    logs = []
    for updates in (2, 4):
        with capture_log() as log:
            hydra_train._hydra_main(composed(recipe, *given, f"optimization.max_update={updates}"))
        logs.append(log)
    assert [[line["num_updates"] for line in log["train_inner"]] for log in logs] == [[1, 2], [3, 4]]
    assert any("went on with the checkpoint's teacher, after 2 updates" in str(line) for line in logs[1]["text"])


def test_every_override_of_the_documents_is_started_with():
    """What is left are places of files, and the seed."""
    tested = {override for line in (*OVERRIDES.values(), *HALF, GOING_ON, ELSEWHERE) for override in line.split()}
    places = ("task.data", "common.user_dir", "common.seed")
    places += tuple(f"checkpoint.{name}" for name in ("restore_file", "finetune_from_model", "save_dir"))
    sections = "model|task|criterion|optimizer|lr_scheduler|dataset|optimization|checkpoint|common"
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md"), *RECIPES]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(rf"\b((?:{sections})\.[a-z_0-9]+=[^\s`);,]+)", text))
    assert tested <= named
    assert {override for override in named if not override.startswith(places)} == tested


@pytest.mark.filterwarnings("ignore")
def test_recipe_starts_from_an_imported_encoder(tmp_path):
    """With the overrides that import_hf prints; without, both sizes are said."""
    import_hf(write_hf(tmp_path / "hf", "bert"), tmp_path / "out")
    data, model = write_task_data(tmp_path / "data", tmp_path / "out" / "dict.txt"), tmp_path / "out" / "model.pt"
    (recipe,) = (path for path in RECIPES if path.stem == "sst_2")
    start(recipe, data, model, *json.loads((tmp_path / "out" / "import.json").read_text())["overrides"])
    with pytest.raises(Exception) as caught:
        start(recipe, data, model, "model._name=smart_bert_minilm_l6")
    assert re.search(r"token_types is \[2, 16\] in it and \[2, 384\] in", explain(caught.value))


@pytest.mark.parametrize(
    "name", ["rte", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cola", "mrpc", "sts_b", "mnli"))]
)
def test_recipe_runs(tmp_path, name):
    """Through fairseq-hydra-train, with a tiny model instead of RoBERTa-large; RTE until the log says what acts."""
    task, updates = task_of(Path(name)), 60 if name == "rte" else 4
    make_gpt2_bpe(tmp_path / "bpe")
    make_glue(tmp_path / "glue")
    data = tmp_path / "bin"
    flags = ["--data-dir", str(tmp_path / "glue"), "--bpe-dir", str(tmp_path / "bpe"), "--out", str(data)]
    assert glue_main(["--task", task.name, *flags]) == 0
    regression = ["--regression-target"] if task.regression else []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = train(data, tmp_path / "start", task.num_classes, *regression)
    torch.set_num_threads(threads)
    command = [
        *(sys.executable, "-c", "from fairseq_cli.hydra_train import cli_main; cli_main()"),
        *("--config-dir", str(ROOT / "examples" / "glue" / "config"), "--config-name", name),
        *(f"task.data={data}", f"checkpoint.restore_file={start}", f"common.user_dir={ROOT / 'smart_fairseq'}"),
        *("model._name=roberta", *(f"+model.{size}" for size in TINY), "+model.max_positions=256"),
        *("task.max_positions=256", "common.cpu=true", "dataset.num_workers=0", "common.log_interval=1"),
        *(
            f"optimization.max_update={updates}",
            "optimization.max_epoch=0",
            "lr_scheduler.warmup_updates=1",
            f"checkpoint.save_dir={tmp_path / 'out'}",
        ),
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    # on matrices this small several threads only stand in each other's way
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=one_thread)
    assert run.returncode == 0, run.stderr[-3000:]
    log = run.stdout + run.stderr + "".join(path.read_text() for path in (tmp_path / "run").rglob("*.log"))
    assert '"train_smart_loss"' in log and '"train_bregman_loss"' in log
    if name == "rte":
        share = re.search(r"as shares of the task loss: smart (\S+), bregman (\S+)", log)
        assert share and float(share[1].rstrip(",")) > 1e-3, share
        assert "not acting" not in log.replace("the bregman term is", "")
    assert f"best_{task.metrics[0]}" in log
    assert (tmp_path / "out" / "checkpoint_best.pt").is_file()
