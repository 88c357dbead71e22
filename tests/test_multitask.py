"""`--task smart_multitask`: several prepared data folders, one encoder, a head for each; through fairseq-train."""

import doctest
import itertools
import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_samples import make_place
from fairseq import checkpoint_utils
from fairseq.data import FairseqDataset
from fairseq.logging import metrics
from fairseq.models.roberta import RobertaModel
from multitask_runs import around, command, second_stage
from processes import assert_same_run, finish, start, updates
from toolkit import (
    BOLD,
    CRITERIA,
    HEAD,
    NO_DROPOUT,
    STEADY,
    USER_DIR,
    Regularised,
    assert_close,
    assert_equal,
    assert_resumes,
    build,
    error_line,
    refused,
    slow_but,
    tensors,
    train,
    watch_terms,
)

from smart_fairseq import export
from smart_fairseq.commands import evaluate, predict
from smart_fairseq.data.binarize import MANIFEST
from smart_fairseq.data.folders import find_tasks
from smart_fairseq.errors import UsageError
from smart_fairseq.evaluation.labels import gold_labels
from smart_fairseq.evaluation.metrics import score
from smart_fairseq.inference import Model
from smart_fairseq.method.divergence import squared_error, symmetric_kl
from smart_fairseq.training import batches, checks
from smart_fairseq.training.batches import MultitaskDataset, in_turn, shares
from smart_fairseq.training.objective import log_by_task, spread

TASKS = ("RTE", "MRPC", "STS-B", "CoLA")
METRICS = {"RTE": "accuracy", "MRPC": "acc_and_f1", "STS-B": "pearson_and_spearman", "CoLA": "mcc"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Official files in glue/, and a data folder of each task in bins/."""
    return make_place(tmp_path_factory.mktemp("place"), ())


@pytest.fixture(scope="module")
def run(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The save folder of a run on all four tasks, with its log beside it as log.json."""
    folder = tmp_path_factory.mktemp("run") / "run"
    flags = [*BOLD, "--lr", "1e-4", "--best-checkpoint-metric", "average", "--maximize-best-checkpoint-metric"]
    log = train(command(place / "bins", TASKS, *flags, save_dir=folder, max_update=32, validate=True))
    (folder / "log.json").write_text(json.dumps(log))
    # outputs that differ from row to row
    for path in folder.glob("*.pt"):
        state = torch.load(path)
        for name, weight in state["model"].items():
            if name.startswith("classification_heads") and name.endswith("weight"):
                weight.mul_(20)
        torch.save(state, path)
    return folder


def test_the_example_holds() -> None:
    assert doctest.testmod(batches) == (0, 1)


# --- which batches ---------------------------------------------------------------------------------


def test_shares_by_hand() -> None:
    """At 1/2: roots 4, 3, 2, 1 of 30 batches, so tenths of 30; at 0 a quarter each, 7.5, the first two rounded up."""
    sizes = [16, 9, 4, 1]
    assert shares(sizes, 1) == sizes
    assert shares(sizes, 0.5) == [12, 9, 6, 3]
    assert shares(sizes, 0) == [8, 8, 7, 7]
    assert shares([1000, 1], 2) == [1001, 1]  # a task that is there takes part
    for exponent in (0, 0.3, 0.7):
        assert sum(shares(sizes, exponent)) == 30


@pytest.mark.parametrize(("count", "size"), [(3, 7), (10, 4), (5, 5), (1, 3)])
def test_all_batches_of_a_task_come_equally_often(count: int, size: int) -> None:
    """Over ``size`` epochs each exactly ``count`` times, and in two passes in a row not in the same order."""
    taken = [in_turn(count, size, epoch, [1, 0]) for epoch in range(1, size + 1)]
    assert all(len(places) == count for places in taken)
    together = [place for places in taken for place in places]
    assert np.bincount(together, minlength=size).tolist() == [count] * size
    if count == size:
        assert taken[0] == list(range(size))  # as a run on this task alone has them
    else:
        passes = [together[start : start + size] for start in range(0, len(together), size)]
        assert all(sorted(once) == list(range(size)) for once in passes)
        assert len(passes) == 1 or len({tuple(once) for once in passes}) > 1
    assert in_turn(count, size, 2, [1, 0]) == taken[1]


class Rows(FairseqDataset):
    """Rows of a length each, sorted by it."""

    def __init__(self, *lengths: int) -> None:
        self.sizes = [np.array(lengths)]

    def __len__(self) -> int:
        return len(self.sizes[0])

    def __getitem__(self, index: int) -> int:
        return int(self.sizes[0][index])

    def collater(self, samples: list[int]) -> dict[str, Any]:
        return {"lengths": samples}

    def size(self, index: int) -> int:
        return int(self.sizes[0][index])

    num_tokens = size

    def ordered_indices(self) -> np.ndarray:
        return np.argsort(self.sizes[0], kind="stable")


def test_a_batch_is_of_one_task() -> None:
    """Its data set's own batches, by length here, in its own numbering; empty batches stay so."""
    data = MultitaskDataset({0: Rows(5, 3, 4, 1, 2), 3: Rows(9, 7, 8)})
    assert len(data) == 8 and data.can_reuse_epoch_itr_across_epochs
    assert data.sizes.tolist() == [5, 3, 4, 1, 2, 9, 7, 8]
    assert [data.num_tokens(index) for index in range(8)] == [data.size(index) for index in range(8)]
    batches = data.batch_by_size(data.ordered_indices(), max_sentences=2)
    assert [batch.tolist() for batch in batches] == [[3, 4], [1, 2], [0], [6, 7], [5]]
    found = [data.collater([data[index] for index in batch]) for batch in batches]
    assert found[0] == {"lengths": [1, 2], "multitask": 0} and found[3] == {"lengths": [7, 8], "multitask": 3}
    assert data.collater([]) == {}
    with pytest.raises(ValueError):
        data.collater([data[0], data[7]])


def test_epochs_of_a_power_differ_and_come_back() -> None:
    """With alpha 0 as many batches of each; the long task's are others in the next epoch, the same when asked again."""
    data = MultitaskDataset({0: Rows(*range(1, 13)), 1: Rows(20, 21)}, exponent=0, seed=5)
    assert not data.can_reuse_epoch_itr_across_epochs

    def epoch(number: int) -> list[int]:
        data.set_epoch(number)
        return [int(batch[0]) for batch in data.batch_by_size(data.ordered_indices(), max_sentences=1)]

    first, second = epoch(1), epoch(2)
    assert len(first) == len(second) == 14
    assert sum(index >= 12 for index in first) == sum(index >= 12 for index in second) == 7
    assert set(first) != set(second) and epoch(1) == first
    assert len({index for index in first + second if index < 12}) == 12  # 7 and 7 of 12: all, before one comes again


def test_an_epoch_holds_every_batch_of_every_task(place: Path) -> None:
    """In an order that mixes them, other than the next epoch's; the log has an entry for each task's batch."""
    flags = ["--smart-weight", "0", "--smart-bregman-weight", "0"]
    log = train(command(place / "bins", TASKS, *flags, max_update=40))
    names = [[name for name in TASKS if line.get(f"{name}_loss", "-") != "-"] for line in log["train_inner"]]
    assert all(len(found) == 1 for found in names)
    # 30 training rows each, batches of 4
    order = [found[0] for found in names]
    assert {name: order[:32].count(name) for name in TASKS} == dict.fromkeys(TASKS, 8)
    assert order[:8] != order[32:] and len(set(order[:8])) > 2


ALONE = [("smart", "RTE"), ("smart, tangent", "STS-B"), ("freelb", "STS-B"), ("freeat", "RTE"), ("r3f", "RTE")]


# --- one task --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "task"), slow_but(ALONE, itertools.product(CRITERIA, ["RTE", "STS-B"])))
def test_a_single_task_equals_the_run_on_it_alone(way: str, task: str, place: Path, tmp_path: Path) -> None:
    """Every update's log, and weights, optimizer and teacher within the third epoch, bit for bit; dropout on."""
    regularised: Regularised = CRITERIA[way]
    outputs = ["--num-classes", "1", "--regression-target"] if task == "STS-B" else ["--num-classes", "2"]
    alone = [
        *(str(place / "bins" / f"{task}-bin"), "--user-dir", USER_DIR, "--task", "sentence_prediction", *outputs),
        *(*around(regularised.criterion, 18), "--save-dir", str(tmp_path / "alone"), *regularised.flags),
    ]
    several = command(
        place / "bins",
        [task],
        *regularised.flags,
        save_dir=tmp_path / "several",
        max_update=18,
        criterion=regularised.criterion,
    )
    logs = [train(arguments)["train_inner"] for arguments in (alone, several)]
    assert len(logs[0]) == 18
    times = ("wps", "ups", "wall", "train_wall", "accuracy")
    for one, other in zip(*logs):
        ours = {key: value for key, value in other.items() if not key.startswith(f"{task}_") and key not in times}
        assert ours == {key: value for key, value in one.items() if key not in times}
        assert other[f"{task}_task_loss"] == one["task_loss"]
        if task == "RTE":
            assert other["RTE_accuracy"] == one["accuracy"]
    states = [torch.load(tmp_path / name / "checkpoint_last.pt") for name in ("alone", "several")]
    found, expected = tensors(states[1]["model"]), tensors(states[0]["model"])
    assert len(expected) > 30 and found.keys() == {name.replace(HEAD, task) for name in expected}
    for name, weight in expected.items():
        assert_equal(found[name.replace(HEAD, task)], weight)
    expected, found = (tensors(state["last_optimizer_state"]) for state in states)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert_equal(found[name], weight)


# --- several ---------------------------------------------------------------------------------------


def test_each_task_has_its_own_head_loss_divergence_and_dropout(place: Path) -> None:
    """By hand from the logits: a batch of STS-B and one of RTE through one criterion; other heads get no gradient."""
    flags = [*NO_DROPOUT, *BOLD, "--smart-bregman-weight", "0", "--multitask-dropout", "CoLA=0.25"]
    _, task, model, criterion = build(command(place / "bins", TASKS, *flags))
    heads = model.classification_heads
    assert {name: head.out_proj.out_features for name, head in heads.items()} == {
        "RTE": 2,
        "MRPC": 2,
        "STS-B": 1,
        "CoLA": 2,
    }
    assert {name: head.dropout.p for name, head in heads.items()} == {"RTE": 0, "MRPC": 0, "STS-B": 0, "CoLA": 0.25}
    for head in heads.values():
        torch.nn.init.normal_(head.out_proj.weight, std=1.0)
    data = task.datasets["train"]
    seen = watch_terms(criterion)
    for name, first in (("STS-B", 60), ("RTE", 0)):
        sample = data.collater([data[index] for index in range(first, first + 4)])
        model.zero_grad()
        torch.manual_seed(3)
        loss, size, log = criterion(model.train(), sample)
        loss.backward()
        with torch.no_grad():
            logits = model(**sample["net_input"], features_only=True, classification_head_name=name)[0]
            moved = criterion.forward_of(model, sample)(perturbation=seen[-1].perturbation)
        target = sample["target"].view(-1)
        if name == "STS-B":
            expected, divergence = ((logits.view(-1) - target) ** 2).sum(), squared_error
        else:
            expected, divergence = torch.nn.functional.cross_entropy(logits, target, reduction="sum"), symmetric_kl
        assert size == 4 and criterion.divergence is divergence
        assert_close(log["task_loss"], expected)
        assert log["smart_loss"] > 1e-8
        assert_close(log["smart_loss"], divergence(moved, logits).sum(), rtol=1e-3)
        assert_close(loss.detach(), log["task_loss"] + log["smart_loss"])
        assert {found for found, head in heads.items() if head.out_proj.weight.grad is not None} == {name}


def test_a_head_rests_while_no_batch_of_its_task_comes(place: Path, tmp_path: Path) -> None:
    """Between the first update and the second one head moves, that of the second batch, with weight decay on."""
    states = []
    for count in (1, 2):
        flags = [*BOLD, "--weight-decay", "0.1", "--max-update", str(count)]
        log = train(command(place / "bins", TASKS, *flags, save_dir=tmp_path / str(count)))["train_inner"]
        states.append(torch.load(tmp_path / str(count) / "checkpoint_last.pt")["model"])
    (task,) = [name for name in TASKS if log[1].get(f"{name}_task_loss", "-") != "-"]
    moved = {name.split(".")[1] for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert moved == {task, "sentence_encoder", "lm_head"}  # which shares the embeddings


def test_the_terms_are_those_of_each_task(place: Path) -> None:
    """--smart-divergence js is for classes, and a regression keeps the squared error."""
    _, _, _, criterion = build(command(place / "bins", TASKS, *BOLD, "--smart-divergence", "js"))
    for objective in criterion.objectives:
        criterion.judge_by(objective)
        assert (criterion.divergence is squared_error) == (objective.name == "STS-B")
        assert criterion.settings.divergence is criterion.divergence
    assert criterion.divergence is not symmetric_kl
    assert "--smart-divergence is js" in refused(command(place / "bins", ["STS-B"], "--smart-divergence", "js"))


def test_teacher_and_terms_are_over_all_tasks(run: Path) -> None:
    """Every task's terms act once the teacher lags behind; the teacher's heads follow each its own."""
    log = json.loads((run / "log.json").read_text())["train_inner"]
    for name in TASKS:
        lines = [line for line in log if line.get(f"{name}_task_loss", "-") != "-"]
        assert len(lines) == 8
        assert all(line[f"{name}_smart_loss"] == line["smart_loss"] > 0 for line in lines)
        assert all(line[f"{name}_bregman_loss"] == line["bregman_loss"] for line in lines)
        assert lines[-1]["bregman_loss"] > 0
    state = torch.load(run / "checkpoint_last.pt")
    names = [name for name in state["model"] if not name.endswith(("version", "lm_head.weight"))]
    teacher = dict(zip(names, state["last_optimizer_state"]["mbpp"]["teacher"]))
    assert len(teacher) == len(state["last_optimizer_state"]["mbpp"]["teacher"])
    for name in TASKS:
        key = f"classification_heads.{name}.out_proj.weight"
        assert teacher[key].shape == state["model"][key].shape
        assert not torch.equal(teacher[key], state["model"][key] / 20)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_ends_where_float32_does(precision: str, place: Path) -> None:
    """Twelve updates of all tasks: each batch's loss and term to 5 %, in the same order, and no term is dropped."""
    flags = [*NO_DROPOUT, "--smart-epsilon", "5e-2", "--smart-step-size", "1", "--lr", "1e-4", "--adam-eps", "1e-4"]
    half: dict[str, Any] = {"bf16": True} if precision == "bf16" else {"fp16": True, "fp16_no_flatten_grads": True}
    flags += ["--fp16-init-scale", "4"]
    runs = [train(command(place / "bins", TASKS, *flags, max_update=12), **c)["train_inner"] for c in ({}, half)]
    assert {name for line in runs[0] for name in TASKS if line.get(f"{name}_task_loss", "-") != "-"} == {*TASKS}
    for exact, ours in zip(*runs, strict=True):
        for key, value in exact.items():
            if key.endswith(("task_loss", "smart_loss")) and value != "-":
                assert ours[key] == pytest.approx(value, rel=0.05, abs=1e-4), key
        assert exact["smart_loss"] > 1e-6
        assert not any(key.endswith("_dropped") for key in ours)


def test_validation_reports_each_official_metric_and_their_average(run: Path, place: Path) -> None:
    """As scikit-learn and scipy define them, from the predictions of the weights that were validated."""
    log = json.loads((run / "log.json").read_text())
    (valid,) = log["valid"]
    state = torch.load(run / "checkpoint_best.pt")
    for name, weight in state["model"].items():
        if name.startswith("classification_heads") and name.endswith("weight"):
            weight.div_(20)  # as it was
    torch.save(state, run.parent / "validated.pt")
    official = []
    for name in TASKS:
        folder = place / "bins" / f"{name}-bin"
        model = Model(run.parent / "validated.pt", folder, cpu=True)
        found = evaluate.metrics_of(
            model.task, folder, "valid", model.predict("valid", 8192).labels, gold(folder, model)
        )
        for metric, value in found.items():
            assert valid[f"valid_{name}_{metric}"] == pytest.approx(value, abs=0.051), (name, metric)
        assert next(iter(found)) == METRICS[name]
        official.append(found[METRICS[name]])
    assert valid["valid_average"] == pytest.approx(np.mean(official), abs=0.006)
    assert "valid_accuracy" not in valid and valid["valid_STS-B_loss"] > 0
    assert state["extra_state"]["best"] == valid["valid_average"]


def gold(folder: Path, model: Model) -> list[str]:
    return gold_labels(folder, "valid", model.task)


def test_a_constant_regression_counts_as_zero(place: Path) -> None:
    """The correlation is not a number; the average is."""
    flags = ["--smart-weight", "0", "--lr", "0"]
    _, task, _, _ = build(command(place / "bins", ["RTE", "STS-B"], *flags, max_update=1, validate=True))
    logs = []
    for number, predicted, gold_ones in ((0, [0.0, 1.0], [0.0, 1.0]), (1, [0.5, 0.5], [0.2, 0.8])):
        logs.append({"sample_size": 2, "loss": torch.tensor(1.0)})
        spread(logs[-1], number, 2)
        rows = [[number] * 2, predicted, gold_ones, [0, 0], [1, 1]]
        logs[-1]["outputs"] = torch.tensor(rows, dtype=torch.float64)
    with metrics.aggregate(new_root=True) as found:
        log_by_task(task.objectives, logs)
    values = found.get_smoothed_values()
    assert values["RTE_accuracy"] == 100 and math.isnan(values["STS-B_pearson"]) and values["average"] == 50


def test_every_split_that_some_tasks_have(place: Path) -> None:
    """MNLI's second validation set is validated beside the first, without the others, whose metrics cannot select."""
    flags = ["--valid-subset", "valid,valid1", "--maximize-best-checkpoint-metric", "--best-checkpoint-metric"]
    message = refused(command(place / "bins", ["RTE", "MNLI"], *flags, "RTE_accuracy", validate=True))
    assert "--best-checkpoint-metric is RTE_accuracy; it must be one of average, loss, nll_loss, MNLI_acc" in message
    flags.append("MNLI_accuracy")
    log = train(command(place / "bins", ["RTE", "MNLI"], *flags, max_update=1, validate=True))
    first, second = log["valid"], log["text"]
    assert len(first) == 1 and "valid_RTE_accuracy" in first[0] and "valid_MNLI_accuracy" in first[0]
    (line,) = [json.loads(text) for text in second if str(text).startswith("{") and "valid1_average" in str(text)]
    assert "valid1_MNLI_accuracy" in line and "valid1_RTE_accuracy" not in line


def test_a_task_without_a_validation_set_trains(place: Path, tmp_path: Path) -> None:
    """It takes no part in validation, which the log says, and its metric cannot select."""
    for name in ("RTE", "MRPC"):
        shutil.copytree(place / "bins" / f"{name}-bin", tmp_path / f"{name}-bin")
    manifest = json.loads((tmp_path / "MRPC-bin" / MANIFEST).read_text())
    del manifest["rows"]["valid"]
    (tmp_path / "MRPC-bin" / MANIFEST).write_text(json.dumps(manifest))
    arguments = command(tmp_path, ["RTE", "MRPC"], max_update=8, validate=True)
    log = train(arguments)
    assert sum("valid goes without MRPC: " in str(line) for line in log["text"]) == 1
    assert any(line.get("MRPC_task_loss", "-") != "-" for line in log["train_inner"])
    (valid,) = log["valid"]
    assert valid["valid_average"] == pytest.approx(valid["valid_RTE_accuracy"], abs=0.05)
    assert not [key for key in valid if "MRPC" in key]
    assert "--best-checkpoint-metric is MRPC_f1" in refused([*arguments, "--best-checkpoint-metric", "MRPC_f1"])


@pytest.mark.parametrize("alpha", slow_but(["0.5"], ["1", "0.5"]))
def test_a_resumed_run_equals_one_that_went_on(alpha: str, place: Path, tmp_path: Path) -> None:
    """From within the second epoch; the same batches, weights, optimizer and teacher, bit for bit."""
    tasks = ["MRPC", "STS-B", "CoLA"] if alpha == "1" else ["RTE", "MNLI", "STS-B"]
    flags = [*BOLD, "--multitask-alpha", alpha, "--batch-size", "8", "--save-interval-updates", "15"]
    arguments = command(place / "bins", tasks, *flags, save_dir=tmp_path / "run", max_update=26)
    assert_resumes(arguments, tmp_path / "run", 15)


def test_a_run_on_other_tasks_or_in_another_order_does_not_go_on(place: Path, tmp_path: Path) -> None:
    """Heads of one shape, one of which would go on with the other's teacher and moments."""
    where = {"save_dir": tmp_path / "run", "max_update": 2}
    train(command(place / "bins", ["RTE", "MRPC"], **where))
    for tasks in (["MRPC", "RTE"], ["RTE", "CoLA"]):
        message = refused(command(place / "bins", tasks, **{**where, "max_update": 4}))
        assert f"on the tasks RTE, MRPC, and this one is on {', '.join(tasks)}; --multitask-tasks" in message
    anew = command(place / "bins", ["MRPC", "RTE"], "--reset-optimizer", "--reset-dataloader", **where)
    assert train(anew)["train_inner"]


def test_two_workers_equal_one(place: Path, tmp_path: Path) -> None:
    """Two workers, whose batches are of different tasks, and one that accumulates the same two; validation as well."""
    # sgd, because adam turns a gradient of rounding into a whole step
    flags = [*STEADY, "--smart-epsilon", "0.1", "--smart-step-size", "1", "--curriculum", "0", "--mbpp-base", "sgd"]
    processes = []
    for name, workers in (("one", 1), ("two", 2)):
        more = ["--update-freq", str(2 // workers), "--lr", "0.05"]
        options = {"save_dir": tmp_path / name, "max_update": 10, "validate": True}
        processes += start(command(place / "bins", TASKS, *flags, *more, **options), tmp_path / name, workers)
    finish(processes, tmp_path / "two")
    assert_same_run(tmp_path, ["one", "two"], count=10)
    sizes = [[line[f"{number}/sample_size"] for number in range(4)] for line in updates(tmp_path / "one")]
    assert sum(max(size) <= 4 for size in sizes) > 4  # two tasks in one update
    found = []
    for out in ("one.0.log", "two.0.log"):  # the first worker writes
        lines = [line.split(":", 2)[2] for line in (tmp_path / out).read_text().splitlines() if "valid_average" in line]
        times = ("wps", "wall", "wpb", "bsz", "num_updates")
        found.append({k: v for k, v in json.loads(lines[-1]).items() if not k.endswith(times)})
    assert found[0] == found[1] and len(found[0]) > 12


# --- from a checkpoint to one task -----------------------------------------------------------------


def test_predictions_are_those_of_the_tasks_own_head(run: Path, place: Path) -> None:
    """Logits of RTE and STS-B by the model's own forward on each row."""
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(run / "checkpoint_last.pt")])
    task.load_dataset("valid")
    for name in ("RTE", "STS-B"):
        found = Model(run / "checkpoint_last.pt", place / "bins" / f"{name}-bin", cpu=True).predict("valid", 8192)
        (objective,) = [objective for objective in task.objectives if objective.name == name]
        data = objective.task.datasets["valid"]
        sample = data.collater([data[index] for index in range(len(data))])
        with torch.no_grad():
            expected = model.eval()(**sample["net_input"], features_only=True, classification_head_name=name)[0]
        assert_close(torch.from_numpy(found.logits).float()[sample["id"]], expected, atol=1e-5)
        assert found.logits.std(0).min() > 1e-3


@pytest.mark.parametrize("teacher", [False, True])
def test_export_of_one_task_is_plain_fairseqs(run: Path, place: Path, tmp_path: Path, teacher: bool) -> None:
    """It loads through fairseq's own hub interface, with its own default head, and holds no other task's."""
    for name in ("RTE", "STS-B"):
        out = tmp_path / name / "plain.pt"
        out.parent.mkdir()
        more = ["--teacher"] if teacher else []
        assert export.main([str(run / "checkpoint_last.pt"), str(out), "--task", name, *more]) == 0
        state = torch.load(out, weights_only=True)
        assert {key.split(".")[1] for key in state["model"] if key.startswith("classification_heads")} == {HEAD}
        assert not [
            key
            for section in state["cfg"].values()
            if isinstance(section, dict)
            for key in section
            if "multitask" in key
        ]
        assert state["cfg"]["task"]["_name"] == "sentence_prediction"
        assert state["cfg"]["criterion"]["report_pearson_and_spearman"] is (name == "STS-B")
        hub = RobertaModel.from_pretrained(str(out.parent), "plain.pt", str(place / "bins" / f"{name}-bin"), bpe=None)
        found = Model(out, place / "bins" / f"{name}-bin", cpu=True)
        if not teacher:
            ours = Model(run / "checkpoint_last.pt", place / "bins" / f"{name}-bin", cpu=True)
            expected = ours.predict("valid", 8192).logits
            assert np.abs(found.predict("valid", 8192).logits - expected).max() < 1e-5
        ids = torch.tensor([[0, 9, 12, 2, 2, 15, 2]])
        with torch.no_grad():
            logits = hub.eval().predict(HEAD, ids, return_logits=True)
            assert_close(logits, found.model(ids, features_only=True, classification_head_name=HEAD)[0])


def test_export_and_predict_name_the_task(
    run: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last, out = str(run / "checkpoint_last.pt"), tmp_path / "plain.pt"

    def failed(main: Any, *arguments: str) -> str:
        line = error_line("export|evaluate|predict", main, arguments, capsys)
        assert not out.exists()
        return line

    assert "holds the tasks RTE, MRPC, STS-B, CoLA; choose one by --task" in failed(export.main, last, str(out))
    assert "holds no task MNLI; its tasks are RTE" in failed(export.main, last, str(out), "--task", "MNLI")
    data = ["--data-dir", str(place / "bins" / "MNLI-bin"), "--cpu"]
    assert "holds no task MNLI; its tasks" in failed(evaluate.main, *data, "--checkpoint", last)
    state = torch.load(last)
    del state["model"]["classification_heads.RTE.dense.bias"]
    torch.save(state, tmp_path / "damaged.pt")
    damaged = str(tmp_path / "damaged.pt")
    assert "has no dense.bias of its classification head 'RTE'" in failed(
        export.main, damaged, str(out), "--task", "RTE"
    )
    data = ["--data-dir", str(place / "bins" / "RTE-bin"), "--cpu"]
    assert "has no dense.bias of" in failed(predict.main, *data, "--checkpoint", damaged, "--out", str(out))
    with pytest.raises(UsageError, match=r"has no dense\.bias of"):  # fairseq-validate
        checkpoint_utils.load_model_ensemble_and_task([damaged])
    assert export.main([damaged, str(out), "--task", "MRPC"]) == 0  # whose head is whole
    assert export.main([str(out), str(tmp_path / "again.pt"), "--task", "MRPC"]) == 2
    assert "is not of --task smart_multitask; leave --task out" in capsys.readouterr().err


def test_evaluate_and_predict_one_task(run: Path, place: Path, tmp_path: Path) -> None:
    """Also where the folders that it was trained on are gone."""
    shutil.copytree(place / "bins" / "MRPC-bin", tmp_path / "MRPC-bin")
    state = torch.load(run / "checkpoint_last.pt")
    state["cfg"]["task"]["data"] = str(tmp_path / "gone")
    torch.save(state, tmp_path / "moved.pt")
    out = tmp_path / "scores.json"
    for checkpoint in (run / "checkpoint_last.pt", tmp_path / "moved.pt"):
        flags = ["--data-dir", str(tmp_path / "MRPC-bin"), "--checkpoint", str(checkpoint), "--cpu"]
        assert evaluate.main([*flags, "--json", str(out)]) == 0
        assert predict.main([*flags, "--split", "valid", "--out", str(tmp_path / "out")]) == 0
        rows = [line.split("\t") for line in (tmp_path / "out" / "MRPC.valid.tsv").read_text().splitlines()[1:]]
        model = Model(run / "checkpoint_last.pt", place / "bins" / "MRPC-bin", cpu=True)
        expected = score(model.task.metrics, [row[1] for row in rows], gold(model.folder, model), False)
        ((found),) = json.loads(out.read_text())["splits"]["valid"]["runs"].values()
        assert found == pytest.approx(expected)


def test_a_run_on_one_task_starts_from_the_shared_encoder(run: Path, place: Path, tmp_path: Path) -> None:
    """The paper's second stage: the head is new, or the task's own by its name."""
    start = torch.load(run / "checkpoint_last.pt")["model"]
    for head in (HEAD, "RTE"):
        end = second_stage(run, place / "bins" / "RTE-bin", tmp_path / head, head)
        assert {name.split(".")[1] for name in end if name.startswith("classification_heads")} == {head}
        for name in ("encoder.sentence_encoder.embed_tokens.weight", "encoder.sentence_encoder.layers.1.fc1.weight"):
            assert_close(end[name], start[name])
        own = torch.allclose(
            end[f"classification_heads.{head}.dense.weight"], start["classification_heads.RTE.dense.weight"], atol=1e-6
        )
        assert own is (head == "RTE")


# --- before training -------------------------------------------------------------------------------


def damage(folder: Path, kind: str) -> None:
    if kind == "no folder":
        shutil.rmtree(folder)
    elif kind == "no manifest":
        (folder / MANIFEST).unlink()
    elif kind == "no training part":
        manifest = json.loads((folder / MANIFEST).read_text())
        del manifest["rows"]["train"]
        (folder / MANIFEST).write_text(json.dumps(manifest))
    elif kind == "fewer labels":
        lines = (folder / "label" / "train.label").read_text().splitlines()
        (folder / "label" / "train.label").write_text("\n".join(lines[:-1]) + "\n")
    elif kind == "no number":
        lines = (folder / "label" / "train.label").read_text().splitlines()
        (folder / "label" / "train.label").write_text("\n".join([lines[0], "much", *lines[2:]]) + "\n")
    elif kind == "no labels":
        (folder / "label" / "valid.label").unlink()
    elif kind == "cut short":
        path = folder / "input1" / "train.bin"
        path.write_bytes(path.read_bytes()[:-2])
    elif kind == "another dictionary":
        path = folder / "input0" / "dict.txt"
        path.write_text("\n".join(path.read_text().splitlines()[::-1]) + "\n")
    elif kind == "no dictionary":
        (folder / "input0" / "dict.txt").unlink()
    elif kind == "the same task":
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**manifest, "task": "RTE"}))


DAMAGES = {  # of STS-B's folder, and what must be said, the file first
    "no folder": r"STS-B-bin: no such folder; --multitask-tasks names data folders in ",
    "no manifest": r"STS-B-bin: holds no preprocess\.json; make it with preprocess\.py",
    "no training part": r"STS-B-bin: has no split train; ",
    "fewer labels": r"STS-B-bin/label/train\.label: holds 29 rows, and preprocess\.json says 30; ",
    "no number": r"STS-B-bin/label/train\.label:2: 'much' is no number; run preprocess again",
    "no labels": r"STS-B-bin/label/valid\.label: is missing, so valid has no labels; ",
    "cut short": r"STS-B-bin/input1/train\.bin: holds \d+ ids, and its \.idx says \d+; ",
    "another dictionary": r"STS-B-bin/input0/dict\.txt: is not that of .*RTE-bin, and all tasks share one encoder; ",
    "no dictionary": r"STS-B-bin/input0/dict\.txt: cannot be read \(No such file",
    "the same task": r"STS-B-bin: holds RTE, as .*RTE-bin does; choose one of the two by --multitask-tasks",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_missing_and_broken_data_is_named_before_training(kind: str, place: Path, tmp_path: Path) -> None:
    for name in ("RTE", "STS-B"):
        shutil.copytree(place / "bins" / f"{name}-bin", tmp_path / f"{name}-bin")
    damage(tmp_path / "STS-B-bin", kind)
    message = refused(command(tmp_path, ["RTE", "STS-B"], validate=True))
    assert re.match(re.escape(str(tmp_path)) + "/" + DAMAGES[kind], message), message
    assert "\n" not in message


def test_flags_that_do_not_fit(place: Path, tmp_path: Path) -> None:
    def said(*flags: str, tasks: Sequence[str] | None = ("RTE", "STS-B"), data: Path = place / "bins") -> str:
        return refused(command(data, tasks, *flags))

    assert "--best-checkpoint-metric is accuracy; it must be one of average, loss, nll_loss, RTE_accuracy" in said(
        "--best-checkpoint-metric", "accuracy"
    )
    assert "--regression-target is set with --task smart_multitask" in said("--regression-target")
    missing = said("--multitask-tasks", "QNLI", tasks=None)
    assert "QNLI: no such folder; --multitask-tasks names data folders in" in missing and "RTE-bin" in missing
    twice = said("--multitask-tasks", "RTE,RTE-bin", tasks=None)
    assert twice.endswith("RTE-bin: named twice; name it once by --multitask-tasks")
    assert "--report-mcc is set with --task smart_multitask" in said("--report-mcc")
    assert "--classification-head-name is RTE with" in said("--classification-head-name", "RTE")
    assert "--criterion is sentence_prediction with --task smart_multitask" in said(
        "--criterion", "sentence_prediction"
    )
    assert "--multitask-alpha is -1" in said("--multitask-alpha", "-1")
    assert "--multitask-dropout is 'CoLA=0.1'; it must be TASK=SHARE with one of RTE, STS-B" in said(
        "--multitask-dropout", "CoLA=0.1"
    )
    assert "--multitask-dropout is 'RTE=1'" in said("--multitask-dropout", "RTE=1")
    assert "--multitask-tasks names no folder" in said("--multitask-tasks", ",")
    manifest = shutil.copytree(place / "bins" / "RTE-bin", tmp_path / "bins" / "W-bin") / "preprocess.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "task": "WNLI-ranking"}))
    assert "W-bin: holds candidates for pronouns" in said(tasks=None, data=tmp_path / "bins")
    assert "nowhere: no such folder" in said(tasks=None, data=tmp_path / "nowhere")
    assert "holds no data folder; make some" in said(tasks=None, data=tmp_path)
    arguments = command(place / "bins", ["RTE", "STS-B"], "--valid-subset", "valid7", validate=True)
    assert "no task has a split valid7" in refused(arguments)


def test_a_folder_is_found_by_its_task(place: Path) -> None:
    found = find_tasks("--multitask-tasks", place / "bins", ["STS-B", "RTE-bin"])
    assert {name: folder.name for name, (_, folder) in found.items()} == {"STS-B": "STS-B-bin", "RTE": "RTE-bin"}


def test_all_folders_where_none_is_named(place: Path) -> None:
    """Sorted by name, or the one that is given itself; AX has no training part, so it is said."""
    assert "AX-bin: has no split train" in refused(command(place / "bins", None))
    _, task, _, _ = build(command(place / "bins" / "RTE-bin", None))
    assert [objective.name for objective in task.objectives] == ["RTE"]


def test_workers_need_a_wrapper_that_lets_heads_rest(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, model, criterion = build(command(place / "bins", TASKS))
    surroundings = criterion.cfg, criterion.encoder_for(model), criterion.objectives
    checks.check_workers(*surroundings)  # one worker
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda *_: 2)
    with pytest.raises(
        UsageError, match=r"--ddp-backend is pytorch_ddp with --task smart_multitask .*; use legacy_ddp"
    ):
        checks.check_workers(*surroundings)
