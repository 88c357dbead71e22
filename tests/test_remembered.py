"""What a checkpoint remembers of its data folder, when that folder is written anew, or gone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_samples import make_bert_bpe
from toolkit import USER_DIR, capture_log, error_line, refused, saving, train

from smart_fairseq import export
from smart_fairseq.commands import evaluate
from smart_fairseq.commands.preprocess import main
from smart_fairseq.data.folders import DATA
from smart_fairseq.errors import UsageError
from smart_fairseq.files import sha256
from smart_fairseq.inference import Model

KINDS = ("good", "bad", "fair")


@pytest.fixture
def prepare(tmp_path: Path):
    """Writes tmp_path/bin, of so many rows, with these flags."""
    bpe = make_bert_bpe(tmp_path / "bert")

    def write(*flags: str, rows: int = 12, first: int = 0) -> Path:
        file = tmp_path / "rows.jsonl"
        file.write_text(
            "".join(
                json.dumps({"text": f"a {n + first}", "label": KINDS[n % 3], "stars": n % 5, "kind": "b"}) + "\n"
                for n in range(rows)
            )
        )
        given = ["--task", "mine", "--train", str(file), "--valid", str(file), "--text", "text", "--bpe-dir", str(bpe)]
        assert main([*given, "--out", str(tmp_path / "bin"), *flags]) == 0
        return tmp_path / "bin"

    return write


def command(data: Path, save_dir: Path, *flags: str, updates: int = 2) -> list[str]:
    tiny = ["--arch", "roberta", "--encoder-layers", "1", "--encoder-embed-dim", "16", "--encoder-ffn-embed-dim", "16"]
    tiny += ["--encoder-attention-heads", "2", "--max-positions", "64", "--max-update", str(updates), "--cpu"]
    tiny += ["--num-workers", "0"]
    given = ["--task", "sentence_prediction", "--num-classes", "3", "--init-token", "0", "--user-dir", USER_DIR]
    given += ["--criterion", "smart_sentence_prediction", "--optimizer", "adam", "--lr", "1e-3", "--batch-size", "4"]
    return [str(data), *given, *tiny, "--disable-validation", *saving(save_dir), *flags]


def test_classes_keep_the_heads_order(prepare, tmp_path, capsys) -> None:
    """The folder is written anew with another order, then it is gone: the same row has the same answer."""
    data, checkpoint = prepare(), tmp_path / "run" / "checkpoint_last.pt"
    train(command(data, tmp_path / "run"))
    state = torch.load(checkpoint)["task_state"][DATA]
    assert state.pop("train") == sha256(data / "input0" / "train.bin")
    assert state == {"labels": ["bad", "fair", "good"], "divisor": 1.0, "rows": 12, "texts": 1}
    before = Model(checkpoint, data, cpu=True).predict("valid", 64)
    prepare("--labels", "good,bad,fair")
    again = Model(checkpoint, data, cpu=True).predict("valid", 64)
    assert again.classes == before.classes == ("bad", "fair", "good") and again.labels == before.labels
    moved = shutil.move(data, tmp_path / "moved")
    assert Model(checkpoint, Path(moved), cpu=True).predict("valid", 64).labels == before.labels
    assert "is gone" not in capsys.readouterr().out


def test_a_run_does_not_go_on_with_its_classes_in_another_order(prepare, tmp_path) -> None:
    data = prepare()
    train(command(data, tmp_path / "run"))
    prepare("--labels", "good,bad,fair")
    line = refused(command(data, tmp_path / "run", updates=4))
    assert "of a run on the classes bad, fair, good" in line and "on the classes good, bad, fair" in line


def test_a_run_that_goes_on_with_other_rows_says_so(prepare, tmp_path) -> None:
    data = prepare()
    train(command(data, tmp_path / "run"))
    prepare(rows=15)
    with capture_log() as log:
        train(command(data, tmp_path / "run", updates=4))
    assert "of a run on 12 training rows, and the 15 of" in str(log["text"])


def test_a_run_that_goes_on_with_as_many_other_rows_says_so(prepare, tmp_path) -> None:
    """And one that has had all its updates; where the rows are the same, nothing is said of them."""

    def run() -> None:
        train(command(data, tmp_path / "run", "--optimizer", "mbpp", updates=4))

    data = prepare()
    run()
    said = []
    for first in (0, 5):
        prepare(first=first)
        with capture_log() as log:
            run()
        said.append(" ".join(log["text"]))
    assert "are others: this run goes on from there" not in said[0] and "are others: this run goes on" in said[1]
    assert all("holds a run that has had its --max-update 4: fairseq adds one update" in text for text in said)


def test_pairs_and_single_texts_are_not_taken_for_each_other(prepare, tmp_path) -> None:
    data = prepare()
    train(command(data, tmp_path / "run"))
    prepare("--text", "text,kind")
    with pytest.raises(UsageError, match=r"was trained on single texts, and .* has pairs: another task's"):
        Model(tmp_path / "run" / "checkpoint_last.pt", data, cpu=True)


def test_that_the_teacher_was_validated_is_said_of_other_weights(prepare, tmp_path, capsys) -> None:
    data, run = prepare(), tmp_path / "run" / "checkpoint_last.pt"
    train(command(data, tmp_path / "run", "--optimizer", "mbpp", "--smart-validate-with", "teacher"))
    assert export.main([str(run), str(tmp_path / "teacher.pt"), "--teacher"]) == 0
    capsys.readouterr()
    said = []
    for checkpoint in (run, tmp_path / "teacher.pt"):
        Model(checkpoint, data, cpu=True)
        said.append("in training the teacher was validated" in capsys.readouterr().out)
    assert said == [True, False]


def test_scores_on_another_scale_are_refused(prepare, tmp_path, capsys) -> None:
    scores = ["--label", "stars", "--scores"]
    data = prepare(*scores, "4")
    train(command(data, tmp_path / "run", "--regression-target", "--num-classes", "1"))
    prepare(*scores, "8")
    checkpoint = str(tmp_path / "run" / "checkpoint_last.pt")
    line = error_line("evaluate", evaluate.main, ["--data-dir", str(data), "--checkpoint", checkpoint, "--cpu"], capsys)
    assert "was trained on scores from 0 to 4" in line and "go to 8" in line


def test_fairseq_validate_takes_the_checkpoints_classes_alone(prepare, tmp_path) -> None:
    """In another order they are others, and would be counted as they come."""
    data, checkpoint = prepare(), tmp_path / "run" / "checkpoint_last.pt"
    train(command(data, tmp_path / "run"))
    given = ["--task", "sentence_prediction", "--num-classes", "3", "--init-token", "0", "--user-dir", USER_DIR]
    given += ["--criterion", "smart_sentence_prediction", "--path", str(checkpoint), "--batch-size", "4", "--cpu"]
    program = [str(Path(sys.executable).parent / "fairseq-validate"), str(data), *given, "--num-workers", "0"]
    assert subprocess.run(program, capture_output=True).returncode == 0
    prepare("--text", "text,kind")
    failed = subprocess.run(program, capture_output=True, text=True)
    assert "was trained on single texts, and" in failed.stderr.splitlines()[-1] and failed.returncode == 1
    prepare("--labels", "good,bad,fair")
    failed = subprocess.run(program, capture_output=True, text=True)
    assert failed.returncode == 1 and "trained with the classes bad, fair, good, and" in failed.stderr.splitlines()[-1]
