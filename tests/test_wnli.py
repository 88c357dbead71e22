"""`--task smart_wnli`: candidates for a pronoun, scored by the LM head; through fairseq-train, predict and evaluate."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from toolkit import (
    BOLD,
    DEVICE,
    NO_DROPOUT,
    assert_close,
    assert_equal,
    batch,
    build,
    capture_log,
    refused,
    train,
    watch_terms,
)
from wnli_samples import assert_worst, command, prepared, set_up, table

from smart_fairseq import export
from smart_fairseq.commands import evaluate, predict
from smart_fairseq.data.binarize import indexed_writer, read_indexed, read_manifest
from smart_fairseq.errors import UsageError
from smart_fairseq.inference import Model
from smart_fairseq.method.candidates import best_of_others, candidate_scores, margin_loss
from smart_fairseq.training import candidates
from smart_fairseq.training.candidates import HEAD, read_groups, row_logits


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("wnli"))


# --- score and loss --------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    """Candidate 0 has tokens of probability 1/2 and 1/8, so 1/4 in the geometric mean; 1 has none; 2 has one of 3/4."""
    probabilities = torch.tensor([[1 / 2, 1 / 2, 0.0], [7 / 8, 0.0, 1 / 8], [1 / 4, 3 / 4, 0.0]])
    scores = candidate_scores(probabilities.log() + 3, torch.tensor([0, 2, 1]), torch.tensor([0, 0, 2]), 3)
    assert_close(scores.exp(), torch.tensor([1 / 4, 0, 3 / 4]))


def test_loss_by_hand() -> None:
    """Two right (-1, -2) and one wrong (-1.5): 1 + 4 * 0, and 2 + 4 * (0.5 + 0.25); a group without a pair has none."""
    scores = torch.tensor([[-1.0, -2.0, -1.5, -0.1], [-1.0, -9.0, -9.0, -9.0]], requires_grad=True)
    labels = torch.tensor([[1, 1, 0, -1], [1, -1, -1, -1]])
    loss = margin_loss(scores, labels, alpha=4, beta=0.25)
    assert_close(loss, torch.tensor([(1 + 2 + 4 * 0.75) / 2, 0.0]))
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert_close(gradient[0], torch.tensor([-1 / 2, -1 / 2 - 4 / 2, 4 / 2, 0]))
    assert not gradient[1].any()


def test_a_row_is_right_where_no_other_candidate_is_better() -> None:
    scores = torch.tensor([[-1.0, -3.0, -2.0], [-5.0, -1e4, -1e4]])
    assert best_of_others(scores)[0].tolist() == [-2, -1, -1]
    logits = row_logits(scores, torch.tensor([[0, 0, 0], [1, 0, 2], [2, 1, 0], [3, 0, 0]]))
    assert logits.argmax(1).tolist() == [1, 0, 1, 1]  # alone in its group, the third is the best
    assert logits[1].tolist() == [-1, -2]


# --- what is in a batch ----------------------------------------------------------------------------


def test_groups_hold_a_pronouns_candidates_and_borrow_those_of_training_without_their_labels(data: Path) -> None:
    train_groups = read_groups(data, "train")
    assert [sorted(group.labels.values()) for group in train_groups] == [[0, 1]] * 9 + [[1]]
    found = read_groups(data, "valid")
    # the first sentence is train's last, whose name is another candidate; the other has none
    assert [list(group.labels.values()) for group in found] == [[0, -1], [0]]
    assert [list(group.rows.values()) for group in found] == [[[0]], [[1]]]
    assert {*found[0].labels} == {*train_groups[9].labels, *found[0].rows}


def test_training_takes_what_has_something_to_rank(data: Path) -> None:
    with capture_log() as log:
        _, task, _, _ = build(command(data))
        task.load_dataset("valid")
    assert len(task.dataset("train")) == 9
    assert any("training uses 9 of 10 pronouns" in str(line) for line in log["text"])
    assert any("1 rows of valid have no other candidate" in str(line) for line in log["text"])


def independent_scores(task: Any, model: Any, data: Path, hook: Any = None) -> dict[int, float]:
    """By the row of train its score, each row in a pass of its own, from the files and fairseq's forward alone."""
    mask, scores = task.source_dictionary.index("<mask>"), {}
    texts, starts, ends = (read_indexed(data / f"input{place}" / "train") for place in range(3))
    for number, (text, start, end) in enumerate(zip(texts, starts, ends)):
        tokens = torch.tensor([0, *text.tolist()], device=DEVICE)
        span = slice(len(start), len(end))
        masked = tokens.clone()
        masked[span] = mask
        logits = model(masked[None])[0][0, span]
        scores[number] = logits.double().log_softmax(-1).gather(1, tokens[span, None]).mean().item()
    return scores


def test_the_models_scores_are_the_mean_log_probabilities_of_the_masked_tokens(data: Path) -> None:
    task, model, _ = set_up(data)
    model.eval()
    sample = batch(task, 9)
    with torch.no_grad():
        found = model(**sample["net_input"], features_only=True, classification_head_name=HEAD)[0]
        expected = independent_scores(task, model, data)
    assert len(sample["rows"]) == 18
    for row, group, place in sample["rows"].tolist():
        assert found[group, place].item() == pytest.approx(expected[row], rel=1e-4)
    assert found.std() > 0.01


# --- SMART -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["finite", "tangent"])
def test_the_term_is_the_divergence_of_the_groups_shares_at_a_point_that_raises_it(data: Path, mode: str) -> None:
    sizes = ["--smart-epsilon", "1e-3", "--smart-noise-std", "1e-4", "--smart-steps", "2", "--smart-step-size", "1e-2"]
    task, model, criterion = set_up(data, "--smart-mode", mode, *sizes, "--smart-weight", "1")
    terms, sample = watch_terms(criterion), batch(task, 5)
    _, size, log = criterion(model, sample)
    (term,) = terms
    assert term.perturbation is not None
    assert size == 5
    rows, length = sample["net_input"]["src_tokens"].shape
    assert term.perturbation.shape == (5, rows // 5 * length, 16)
    assert log["smart_delta"].item() == pytest.approx(5 * 1e-3, rel=1e-4)  # a group has one ball

    assert_worst(model, sample, term, HEAD)
    term.value.backward()
    assert model.encoder.lm_head.dense.weight.grad.any()


def test_groups_of_different_sizes_do_not_disturb_each_other(data: Path) -> None:
    task, model, criterion = set_up(data)
    dataset = task.dataset("train")
    alone = [batch(task, 1, start) for start in (0, 1)]
    third = next(iter(dataset.groups[1].labels))
    dataset.groups[1].labels[(*third, *third)] = 0  # of one more candidate
    apart = [criterion(model, sample)[2] for sample in (alone[0], batch(task, 1, 1))]
    together = criterion(model, batch(task, 2))[2]
    assert batch(task, 2)["target"].tolist()[0][2] == -1
    # the term starts from other noise in a batch of another width
    for key, tolerance in {"task_loss": 1e-5, "smart_loss": 1e-2}.items():
        assert together[key].item() == pytest.approx(sum(log[key].item() for log in apart), rel=tolerance)


def test_the_term_and_the_teacher_act_on_training(data: Path) -> None:
    def mean(term: str, weight: str) -> float:
        off = {"smart": "0", "bregman": "0", term: weight}
        flags = ["--smart-weight", off["smart"], "--smart-bregman-weight", off["bregman"], *NO_DROPOUT, "--lr", "3e-3"]
        lines = train(command(data, *flags, updates=24))["train_inner"]
        return sum(line[f"{term}_loss"] for line in lines[12:]) / 12

    for term in ("smart", "bregman"):  # each makes small what it measures
        assert 0 < mean(term, "1e6") < 0.5 * mean(term, "1e-6")


def test_training_ranks_the_right_candidates_first(data: Path) -> None:
    lines = train(command(data, *NO_DROPOUT, "--smart-weight", "0", "--no-shuffle", "--lr", "3e-3", updates=60))[
        "train_inner"
    ]
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert lines[-1]["accuracy"] == 100


# --- end to end ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run")
    return folder, train(command(data, save_dir=folder, updates=6))


def test_from_training_to_the_submission_file(
    run: tuple[Path, Any], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, log = run
    checkpoint = str(folder / "checkpoint_best.pt")
    options = ["--checkpoint", checkpoint, "--data-dir", str(data), "--cpu"]
    assert predict.main([*options, "--out", str(tmp_path)]) == 0
    assert predict.main([*options, "--out", str(tmp_path), "--split", "valid"]) == 0
    submission = table(tmp_path / "WNLI.tsv")
    assert submission[0] == ["index", "prediction"]
    assert [row[0] for row in submission[1:]] == ["0", "1", "2", "3"]
    # one candidate of each pronoun is the best
    assert [sorted(row[1] for row in submission[start : start + 2]) for start in (1, 3)] == [["0", "1"]] * 2
    # accuracy: of both rows, 0 is right; the second is alone
    predicted = [row[1] for row in table(tmp_path / "WNLI-ranking.valid.tsv")[1:]]
    assert predicted[1] == "1"
    accuracy = 50.0 * predicted.count("0")
    assert max(line["valid_accuracy"] for line in log["valid"]) == accuracy
    capsys.readouterr()
    assert evaluate.main(options) == 0
    assert f"{accuracy:.2f}" in capsys.readouterr().out
    assert evaluate.main([*options, "--full"]) == 2
    assert "--full knows classes and regressions, and WNLI-ranking ranks: leave it out" in capsys.readouterr().err
    with pytest.raises(
        UsageError, match=r"ranks candidates by its LM head .* fairseq and transformers know no such head"
    ):
        export.export(Path(checkpoint), tmp_path / "plain.pt")
    # of train every row, also those that had nothing to rank
    model = Model(Path(checkpoint), data, cpu=True)
    found = model.predict("train", 512)
    assert len(found.labels) == read_manifest(data)["rows"]["train"] == 19
    assert_equal(torch.tensor(found.logits[:, 1] >= found.logits[:, 0]), torch.tensor([x == "1" for x in found.labels]))
    assert (found.logits[:, 1] < 0).all()


def test_a_tie_with_another_candidate_is_predicted_as_right(
    run: tuple[Path, Any], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in validation; HNN's scores are equal where two candidates saturate its sigmoids."""

    def tied(scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return torch.full((len(rows), 2), -1.5)

    monkeypatch.setattr(candidates, "row_logits", tied)
    assert set(Model(run[0] / "checkpoint_best.pt", data, cpu=True).predict("test", 512).labels) == {"1"}


# --- what is refused before training ---------------------------------------------------------------


def test_an_untrained_lm_head_is_refused_or_warned_of(data: Path, run: tuple[Path, Any]) -> None:
    arguments = command(data)
    arguments.remove("--wnli-new-lm-head")
    assert "LM head is untrained" in refused(arguments)
    with capture_log() as log:
        train(command(data, updates=1))
    assert any("trains one from these sentences alone" in str(line) for line in log["text"])
    with capture_log() as log:  # that of a checkpoint is trained
        train([*arguments, "--finetune-from-model", str(run[0] / "checkpoint_last.pt"), "--max-update", "1"])
    assert not any("LM head" in str(line) for line in log["text"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--wnli-alpha", "-1"], "--wnli-alpha is -1"),
        (["--criterion", "r3f_sentence_prediction"], "--criterion is r3f_sentence_prediction with --task smart_wnli"),
        (["--report-mcc"], "--report-mcc is set with --task smart_wnli"),
        (["--max-positions", "20"], "above --max-positions 20"),
        (["--best-checkpoint-metric", "mcc"], "--best-checkpoint-metric is mcc"),
    ],
)
def test_flags_that_do_not_fit_are_named(data: Path, flags: list[str], words: str) -> None:
    arguments = command(data)
    if "r3f_sentence_prediction" in flags:  # which has none of SMART's
        start = arguments.index(BOLD[0])
        del arguments[start : start + len(BOLD)]
    assert words in refused([*arguments, *flags])


@pytest.mark.parametrize("what", ["another task", "no labels", "other rows", "no candidate", "nothing to rank"])
def test_data_that_do_not_fit_are_named(data: Path, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "bin"
    shutil.copytree(data, folder)
    manifest = read_manifest(folder)
    if what == "another task":
        (folder / "preprocess.json").write_text(json.dumps({**manifest, "task": "WNLI"}))
        assert "holds WNLI; --task smart_wnli needs" in refused(command(folder))
    elif what == "no labels":
        (folder / "label/train.idx").unlink()
        assert "label/train.bin: is missing" in refused(command(folder))
    elif what == "other rows":
        for end in ("bin", "idx"):
            shutil.copy(folder / f"input1/valid.{end}", folder / f"input1/train.{end}")
        assert "different numbers of rows" in refused(command(folder))
    elif what == "no candidate":
        for end in ("bin", "idx"):
            shutil.copy(folder / f"input1/train.{end}", folder / f"input2/train.{end}")
        assert "row 1 of train does not hold its candidate" in refused(command(folder))
    else:
        for kind in ("input0", "input1", "input2", "input3", "label"):
            for end in ("bin", "idx"):
                shutil.copy(folder / f"{kind}/valid.{end}", folder / f"{kind}/train.{end}")
        assert "there is nothing to rank" in refused(command(folder))


def test_a_checkpoint_of_another_task_is_refused(run: tuple[Path, Any], data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    shutil.copytree(data, folder)
    (folder / "preprocess.json").write_text(json.dumps({**read_manifest(folder), "task": "WNLI"}))
    with pytest.raises(UsageError, match="was trained for the task smart_wnli, not sentence_prediction, as WNLI needs"):
        Model(run[0] / "checkpoint_last.pt", folder, cpu=True)


def test_the_lm_head_does_not_rest(data: Path) -> None:
    """Every weight has a gradient, and none is said to have none."""
    task, model, criterion = set_up(data)
    criterion(model, batch(task, 5))[0].backward()
    idle = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert set(criterion.encoder_for(model).resting(HEAD)) == idle == set()


def test_an_empty_split_is_named(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    shutil.copytree(data, folder)
    for place in range(4):
        with indexed_writer(folder / f"input{place}" / "valid", "H"):
            pass
    with indexed_writer(folder / "label" / "valid", "H"):
        pass
    _, task, _, _ = build(command(folder))
    with pytest.raises(UsageError, match="its split valid has no rows; preprocess a file that has some"):
        task.load_dataset("valid")
