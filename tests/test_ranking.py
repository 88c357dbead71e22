"""Ranking: groups of candidates, from official files to a run's picks; the mathematics by hand."""

import doctest
import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import multitask_runs
import numpy as np
import pytest
import torch
from data_samples import REAL, make_gpt2_bpe, needs_real_files, write
from processes import assert_same_run, finish, start
from toolkit import (
    BOLD,
    CRITERIA,
    HALF,
    NO_DROPOUT,
    STEADY,
    assert_close,
    assert_resumes,
    batch,
    build,
    refused,
    represented,
    train,
    watch_terms,
)

from smart_fairseq import export
from smart_fairseq.commands import evaluate, predict
from smart_fairseq.commands.preprocess import glue_main
from smart_fairseq.data.readers import read_task
from smart_fairseq.data.tasks import TASKS
from smart_fairseq.evaluation.labels import gold_labels
from smart_fairseq.inference import Model
from smart_fairseq.method import ranking
from smart_fairseq.method.divergence import squared_change, squared_error, symmetric_kl, symmetric_kl_of_change
from smart_fairseq.method.ranking import group_places, of_groups, ranking_loss

NAME = "QNLI-ranking"
YES, NO = "entailment", "not_entailment"
# of each question its candidates' labels, in the order of the file below
SIZES = {"train": [3, 2, 3, 4, 2, 3, 2, 3, 2, 3, 4, 2], "dev": [2, 3, 2, 4, 3]}


def questions(folder: Path) -> Path:
    """QNLI's files: the right sentence says "see", rows of a question apart, and two questions with one class each."""
    places = "the dog|a cat|the river|a house|the green|quick dog|old cat|the small|likes|finds|a bird|sees".split("|")
    for split, sizes in SIZES.items():
        rows = []
        for number, size in enumerate(sizes):
            for place in range(size):
                right = place == number % size
                said = f"{places[number]} {'see see' if right else 'cat dog'} {place}"
                rows.append((place, f"what of {places[number]} {number}?\t{said}\t{YES if right else NO}"))
        rows += [(0, f"alone?\tthe dog {end}\t{NO}") for end in "ab"] + [(1, f"sure?\tthe cat\t{YES}")]
        rows.sort(key=lambda row: row[0])  # the first of each question, then the second of each
        lines = [f"{number}\t{line}" for number, (_, line) in enumerate(rows)]
        write(folder / "QNLI" / f"{split}.tsv", "index\tquestion\tsentence\tlabel", *lines)
    write(folder / "QNLI" / "test.tsv", "index\tquestion\tsentence", "0\tq?\tdog see", "1\tr?\ta cat", "2\tq?\tcat")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Official files in glue/, the data folders of the ranking and of RTE in bins/."""
    from data_samples import make_pairs

    found = tmp_path_factory.mktemp("ranking")
    make_pairs(questions(found / "glue") / "RTE", (YES, NO))
    flags = ["--data-dir", str(found / "glue"), "--bpe-dir", str(make_gpt2_bpe(found / "bpe")), "--workers", "1"]
    assert glue_main(["--task", f"{NAME},RTE", *flags, "--out", str(found / "bins")]) == 0
    return found


def command(place: Path, *flags: str, tasks: Sequence[str] = (NAME,), **options: Any) -> list[str]:
    return multitask_runs.command(place / "bins", tasks, *flags, **options)


# --- by hand ---------------------------------------------------------------------------------------


def test_the_examples_hold() -> None:
    assert doctest.testmod(ranking).failed == 0


def test_loss_and_divergence_by_hand() -> None:
    """Groups of 2 and 3: P = (1/4, 3/4) and (1/2, 1/4, 1/4); of the second, two are right; shifts change nothing."""
    scores = torch.tensor([1.0, 3.0, 2.0, 1.0, 1.0]).log().view(5, 1) + torch.tensor([7.0, 7, -2, -2, -2]).view(5, 1)
    groups = group_places([2, 3])
    loss = ranking_loss(scores.requires_grad_(), torch.tensor([1, 0, 0, 1, 1]), groups)
    assert_close(loss, torch.tensor([math.log(4), math.log(2)]))
    loss.sum().backward()
    # P of all, less the right ones' shares among themselves
    assert_close(scores.grad.view(-1), torch.tensor([0.25 - 1, 0.75, 0.5, 0.25 - 0.5, 0.25 - 0.5]))
    other = torch.tensor([3.0, 1.0, 2.0, 1.0, 1.0]).log().view(5, 1)
    # (3/4 - 1/4) log 3, twice, and the second group's distributions are the same
    expected = torch.tensor([math.log(3), 0.0])
    assert_close(of_groups(symmetric_kl, groups)(other, scores.detach()), expected)
    change = other - scores.detach()
    assert_close(of_groups(symmetric_kl_of_change, groups, change=True)(scores.detach(), change), expected)
    # squared sums of what is there, 0 where nothing is
    values = torch.arange(5.0).view(5, 1)
    assert_close(of_groups(squared_change, groups, change=True)(values, values), torch.tensor([1.0, 4 + 9 + 16]))
    assert_close(of_groups(squared_error, groups)(values, 0 * values), torch.tensor([1.0, 4 + 9 + 16]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_place_without_a_candidate_gives_no_gradient_that_is_not_finite(dtype: torch.dtype) -> None:
    """One candidate beside four: its probability is 1 and its gradient 0."""
    scores = torch.tensor([[3.0], [1], [2], [-50], [0]], dtype=dtype, requires_grad=True)
    groups = group_places([1, 4])
    for value in (
        ranking_loss(scores, torch.tensor([1, 0, 1, 0, 0]), groups),
        of_groups(symmetric_kl, groups)(scores, scores.detach() * 0.5),
        of_groups(symmetric_kl_of_change, groups, change=True)(scores, scores.detach() * 0.5),
    ):
        assert value[0] == 0 and value[1] > 0 and value.dtype == torch.float32
        (gradient,) = torch.autograd.grad(value.sum(), scores)
        assert gradient.isfinite().all() and gradient[0] == 0 and gradient[2] != 0


# --- from files to groups --------------------------------------------------------------------------


def test_groups_of_the_files(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of a question together in the order of the first; questions of one class are left out and counted."""
    rows, reports = read_task(TASKS[NAME], place / "glue")
    for split, part in (("train", "train"), ("valid", "dev")):
        texts = [row.texts[0] for row in rows[split]]
        assert [texts.count(text) for text in dict.fromkeys(texts)] == SIZES[part]
        assert [text for text, size in zip(dict.fromkeys(texts), SIZES[part]) for _ in range(size)] == texts
        assert reports[split].left_out == {"no right candidate in 1 groups": 2, "no wrong candidate in 1 groups": 1}
        sizes = (place / "bins" / f"{NAME}-bin" / "groups" / f"{split}.sizes").read_text().split()
        assert [int(size) for size in sizes] == SIZES[part]
    assert [row.id for row in rows["test"]] == ["0", "2", "1"] and rows["test"][0].label is None
    labels = gold_labels(place / "bins" / f"{NAME}-bin", "valid", TASKS[NAME])
    assert labels == ["1", "0", "0", "1", "0", "1", "0", "0", "0", "0", "1", "0", "1", "0"]


def test_what_preprocess_says(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--task", NAME, "--bpe-dir", str(place / "bpe"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert glue_main([*flags, "--data-dir", str(place / "glue")]) == 0
    said = capsys.readouterr().out
    chance = 100 * np.mean([1 / size for size in SIZES["train"]])
    assert f"12 groups of 2 to 4 candidates, of whom guessing finds {chance:.1f} %; 2 left out (no right" in said
    assert "2 groups of 1 to 2 candidates, 1 of them of a single one" in said
    assert "--task smart_multitask --init-token 0 --separator-token 2 --required" in said
    assert f"--best-checkpoint-metric {NAME}_top1" in said
    assert glue_main([*flags, "--data-dir", str(place / "glue"), "--subsample", "0.5"]) == 2
    assert f"--subsample takes rows, and {NAME} has groups" in capsys.readouterr().err
    for label in (YES, NO):
        write(tmp_path / "glue" / "QNLI" / "train.tsv", "index\tquestion\tsentence\tlabel", f"0\tq\ta\t{label}")
        assert glue_main([*flags, "--data-dir", str(tmp_path / "glue")]) == 2
        line = capsys.readouterr().err
        assert "train.tsv: holds no group to rank: no question of it has both a right and a wrong candidate" in line


@needs_real_files
def test_real_premises() -> None:
    """The first lines of SNLI's development part: three hypotheses for nearly each premise, one of them entailed."""
    rows, reports = read_task(TASKS["SNLI-ranking"], REAL)
    assert len(rows["valid"]) == 1194 and len({row.texts[0] for row in rows["valid"]}) == 397
    assert sum(reports["valid"].left_out.values()) == 1288 - 1 - 1194 + 2


# --- the criterion ---------------------------------------------------------------------------------


def slowly(scores: torch.Tensor, targets: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, int]:
    """The task loss and the right picks, group by group."""
    loss, right = torch.zeros(()), 0
    for part, target in zip(scores.view(-1).split(list(sizes)), targets.view(-1).split(list(sizes))):
        loss = loss - part.log_softmax(0)[target.nonzero().item()]
        right += int(target[part.argmax()])
    return loss, right


@pytest.mark.parametrize("mode", ["finite", "tangent"])
def test_loss_terms_and_log_of_a_batch(place: Path, mode: str) -> None:
    """From the scores, group by group; an example is a group, and the size is that of a candidate's perturbation."""
    _, task, model, criterion = build(
        command(place, *NO_DROPOUT, *BOLD, "--smart-mode", mode, "--smart-bregman-weight", "0")
    )
    torch.nn.init.normal_(model.classification_heads[NAME].out_proj.weight, std=1.0)
    assert model.classification_heads[NAME].out_proj.out_features == 1
    sample, seen = batch(task, 4), watch_terms(criterion)
    loss, size, log = criterion(model.train(), sample)
    inputs = {**sample["net_input"], "features_only": True, "classification_head_name": NAME}
    with torch.no_grad():
        scores = model(**inputs)[0]
        moved = criterion.forward_of(model, sample)(perturbation=seen[0].perturbation)
    sizes = SIZES["train"][:4]
    assert scores.shape == (sum(sizes), 1)
    expected, right = slowly(scores, sample["target"], sizes)
    assert size == log["sample_size"] == log["nsentences"] == 4 and log["ncorrect"] == right
    assert_close(log["task_loss"], expected)
    apart = torch.zeros(())
    for p, q in zip(moved.view(-1).split(sizes), scores.view(-1).split(sizes)):
        p, q = p.log_softmax(0), q.log_softmax(0)
        apart = apart + ((p.exp() - q.exp()) * (p - q)).sum()
    assert apart > 1e-7
    assert_close(log["smart_loss"], apart, rtol=2e-2)
    assert_close(loss.detach(), log["task_loss"] + criterion.weights["smart"] * log["smart_loss"])
    assert_close(log["smart_delta"] / size, torch.tensor(0.01))


def test_the_perturbation_climbs_and_grows_with_the_radius(place: Path) -> None:
    """Above random ones of its size, and about with the square of the radius."""
    found = []
    for radius in ("1e-3", "1e-2"):
        size = ["--smart-epsilon", radius, "--smart-norm", "l2", "--smart-bregman-weight", "0"]
        _, task, model, criterion = build(command(place, *NO_DROPOUT, *BOLD, *size))
        torch.nn.init.normal_(model.classification_heads[NAME].out_proj.weight, std=1.0)
        sample, seen = batch(task, 8), watch_terms(criterion)
        found.append(float(criterion(model.train(), sample)[2]["smart_loss"]))
        forward, best = criterion.forward_of(model, sample), seen[0].perturbation
        with torch.no_grad():
            clean = forward()
            for seed in range(5):
                noise = torch.randn(best.shape, generator=torch.Generator().manual_seed(seed))
                noise = noise * (best != 0)  # padding stays
                noise = noise * best.norm(dim=(1, 2), keepdim=True) / noise.norm(dim=(1, 2), keepdim=True)
                assert criterion.divergence(forward(perturbation=noise), clean).sum() < 0.5 * found[-1]
    assert 30 < found[1] / found[0] < 300


@pytest.mark.parametrize("way", represented(list(CRITERIA)))
def test_every_criterion_ranks(place: Path, way: str) -> None:
    """It trains on the loss of the groups, its terms act, and no value is lost."""
    regularised = CRITERIA[way]
    log = train(command(place, *regularised.flags, criterion=regularised.criterion, max_update=9))["train_inner"]
    assert len(log) == 9
    for line in log:
        assert 0 < line[f"{NAME}_task_loss"] < 3 and math.isfinite(line["loss"])
    for term in regularised.terms:
        assert log[-1][f"{NAME}_{term}_loss"] > 0
    if regularised.criterion.startswith(("pgd", "freelb", "freeat")):
        name = regularised.criterion.split("_")[0]
        assert 0 < log[0][f"{name}_delta"] <= 0.5 + 1e-6


@pytest.mark.parametrize("criterion", ["smart", pytest.param("pgd", marks=pytest.mark.slow)])
def test_a_toy_is_learned(place: Path, criterion: str) -> None:
    """Ranking accuracy on the training and on the validation set, from less to all."""
    regularised = CRITERIA[criterion]
    flags = [*NO_DROPOUT, "--lr", "3e-3", "--batch-size", "12"]
    log = train(command(place, *flags, criterion=regularised.criterion, max_update=60, validate=True))
    accuracy = [line[f"{NAME}_accuracy"] for line in log["train_inner"]]
    assert min(accuracy[:3]) < 70 and accuracy[-3:] == [100] * 3
    last = log["valid"][-1]
    assert last[f"valid_{NAME}_top1"] == last["valid_average"] >= 80
    assert last[f"valid_{NAME}_loss"] < log["valid"][0][f"valid_{NAME}_loss"]


def test_half_precision(place: Path) -> None:
    flags = [*NO_DROPOUT, *HALF, "--smart-epsilon", "5e-2", "--smart-step-size", "1"]
    log = train(command(place, *flags, max_update=6))["train_inner"]
    assert all(0 < line[f"{NAME}_task_loss"] < 3 and line["smart_loss"] > 0 for line in log)
    log = train(command(place, *NO_DROPOUT, "--smart-epsilon", "5e-2", "--smart-step-size", "1"), bf16=True)
    assert all(line["smart_loss"] > 0 for line in log["train_inner"])


def test_a_resumed_run_equals_one_that_went_on(place: Path, tmp_path: Path) -> None:
    """From within the second epoch, beside a task of classes, bit for bit; dropout on."""
    flags = [*BOLD, "--save-interval-updates", "15"]
    arguments = command(place, *flags, tasks=[NAME, "RTE"], save_dir=tmp_path / "run", max_update=22)
    assert_resumes(arguments, tmp_path / "run", 15)


@pytest.mark.slow
def test_two_workers_equal_one(place: Path, tmp_path: Path) -> None:
    flags = [*STEADY, "--smart-epsilon", "0.1", "--smart-step-size", "1", "--curriculum", "0", "--mbpp-base", "sgd"]
    processes = []
    for name, workers in (("one", 1), ("two", 2)):
        more = ["--update-freq", str(2 // workers), "--lr", "0.05", "--batch-size", "3"]
        options = {"tasks": [NAME, "RTE"], "save_dir": tmp_path / name, "max_update": 8, "validate": True}
        processes += start(command(place, *flags, *more, **options), tmp_path / name, workers)
    finish(processes, tmp_path / "two")
    assert_same_run(tmp_path, ["one", "two"], count=8)
    found = []
    for out in ("one.0.log", "two.0.log"):
        lines = [line.split(":", 2)[2] for line in (tmp_path / out).read_text().splitlines() if "valid_average" in line]
        found.append({k: v for k, v in json.loads(lines[-1]).items() if NAME in k or "average" in k})
    assert found[0] == found[1] and f"valid_{NAME}_top1" in found[0]


# --- picks -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    options = {"tasks": [NAME, "RTE"], "save_dir": folder, "max_update": 24, "validate": True}
    log = train(command(place, *NO_DROPOUT, "--lr", "3e-3", **options))
    (folder / "log.json").write_text(json.dumps(log["valid"]))
    return folder


def test_predict_and_evaluate(run: Path, place: Path, tmp_path: Path) -> None:
    """Group, rank and score of each row; the ranking accuracy is that of the run's validation."""
    folder = place / "bins" / f"{NAME}-bin"
    flags = ["--data-dir", str(folder), "--checkpoint", str(run / "checkpoint_last.pt"), "--cpu"]
    assert predict.main([*flags, "--split", "valid,test", "--out", str(tmp_path)]) == 0
    header, *lines = (tmp_path / f"{NAME}.valid.tsv").read_text().splitlines()
    assert header == "index\tprediction\tgroup\trank\tscore"
    rows = [line.split("\t") for line in lines]
    gold, found, start = gold_labels(folder, "valid", TASKS[NAME]), 0, 0
    for number, size in enumerate(SIZES["dev"], start=1):
        group = rows[start : start + size]
        scores = [float(row[4]) for row in group]
        assert [row[2] for row in group] == [str(number)] * size
        assert [int(row[3]) for row in group] == [1 + sum(other > s for other in scores) for s in scores]
        assert [row[1] for row in group] == ["1" if s == max(scores) else "0" for s in scores]
        found += gold[start + int(np.argmax(scores))] == "1"
        start += size
    assert len({row[4] for row in rows}) == len(rows)
    out = tmp_path / "scores.json"
    assert evaluate.main([*flags, "--json", str(out)]) == 0
    ((scores_,),) = [json.loads(out.read_text())["splits"]["valid"]["runs"].values()]
    assert scores_ == {"top1": pytest.approx(100 * found / 5)}
    last = json.loads((run / "log.json").read_text())[-1]
    assert last[f"valid_{NAME}_top1"] == pytest.approx(scores_["top1"], abs=0.051)
    assert [line.split("\t")[1:4:2] for line in (tmp_path / f"{NAME}.test.tsv").read_text().splitlines()[1:]][2] == [
        "1",
        "1",
    ]
    predictions = ["--data-dir", str(folder), "--predictions", str(tmp_path / f"{NAME}.valid.tsv")]
    assert evaluate.main([*predictions, "--json", str(out)]) == 0
    ((again,),) = [json.loads(out.read_text())["splits"]["valid"]["runs"].values()]
    assert again == scores_


def test_what_a_ranking_has_not(run: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "bins" / f"{NAME}-bin"
    flags = ["--data-dir", str(folder), "--checkpoint", str(run / "checkpoint_last.pt"), "--cpu", "--full"]
    assert evaluate.main(flags) == 2
    assert f"--full knows classes and regressions, and {NAME} ranks" in capsys.readouterr().err
    both = tmp_path / "both.tsv"
    rows = [f"{number}\t1" for number in (line.split("\t")[0] for line in _ids(folder))]
    write(both, "index\tprediction", *rows)
    assert evaluate.main(["--data-dir", str(folder), "--predictions", str(both)]) == 2
    assert "group 1 has 2 picks; a ranking has one in each group" in capsys.readouterr().err
    calibrated = command(place, "--smart-report-calibration", "--best-checkpoint-metric", f"{NAME}_calibration_error")
    assert f"--best-checkpoint-metric is {NAME}_calibration_error; it must be one of" in refused(calibrated)
    read = refused(command(place, "--multitask-san", NAME, tasks=(NAME, "RTE")))
    assert f"--multitask-san is '{NAME}'; it must be of the tasks of pairs, RTE (no ranking, no single texts)" in read


def _ids(folder: Path) -> list[str]:
    return (folder / "ids" / "valid.tsv").read_text().splitlines()[1:]


def test_export_keeps_the_scores(run: Path, place: Path, tmp_path: Path) -> None:
    folder = place / "bins" / f"{NAME}-bin"
    out = tmp_path / "plain.pt"
    assert export.main([str(run / "checkpoint_last.pt"), str(out), "--task", NAME]) == 0
    expected = Model(run / "checkpoint_last.pt", folder, cpu=True).predict("valid", 8192)
    found = Model(out, folder, cpu=True).predict("valid", 8192)
    assert np.abs(found.scores - expected.scores).max() < 1e-6 and found.labels == expected.labels


DAMAGES = {
    "none": (None, r"groups/train\.sizes: is missing; run preprocess again"),
    "no number": ("3\nmany\n", r"groups/train\.sizes:2: 'many' is no number of rows"),
    "too few": ("3\n2\n", r"groups/train\.sizes: has groups of 5 rows together, and train has 33"),
    "other groups": ("1\n" * 33, r"groups/train\.sizes:2: no candidate of this group is right; run preprocess again"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_groups_are_named_before_training(kind: str, place: Path, tmp_path: Path) -> None:
    text, message = DAMAGES[kind]
    shutil.copytree(place / "bins", tmp_path / "bins")
    path = tmp_path / "bins" / f"{NAME}-bin" / "groups" / "train.sizes"
    path.unlink() if text is None else path.write_text(text)
    assert re.search(message, refused(command(tmp_path)))
