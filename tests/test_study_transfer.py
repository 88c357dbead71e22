"""A study's models scored on the rows of other folders: what is stored and reported, by which key, what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from study_samples import PLAN, keys, without_plain, write_data, write_plan
from toolkit import error_line

from smart_fairseq.inference import Model
from smart_fairseq.study import studying
from smart_fairseq.study.__main__ import main
from smart_fairseq.study.lines import read_lines
from smart_fairseq.study.plan import read_plan
from smart_fairseq.study.rows import Source, take_all


def with_transfer(folder: Path, data: Path, other: Path | str) -> Path:
    text = PLAN.replace("rows: 12}}", f"rows: 12, transfer: {{{{other: {other}}}}}}}}}")
    return write_plan(folder, data, text)


def test_all_labelled_rows_of_every_split(tmp_path: Path) -> None:
    source = Source(write_data(tmp_path / "data", train=6, valid=4))
    take_all(source, tmp_path / "all")
    taken = Source(tmp_path / "all")
    assert taken.splits == ["valid"] and taken.classes == source.classes
    assert taken.labels("valid").tolist() == [*source.labels("train"), *source.labels("valid")]
    assert len((tmp_path / "all" / "ids" / "valid.tsv").read_text().splitlines()) == 1 + 10


def test_the_same_weights_predict_the_other_folder(tmp_path: Path) -> None:
    """Stored, scored and reported: what the kept checkpoint says of the other folder's rows, read anew."""
    data = write_data(tmp_path / "data")
    other = write_data(tmp_path / "other", train=10, valid=7, wrong=0.5)
    plan = with_transfer(tmp_path / "a", data, other)
    plan.write_text(without_plain(f"keep: true\n{plan.read_text()}".replace("[1, 2]", "[1]")))
    assert main([str(plan), "--jobs", "1"]) == 0
    study = studying.Study(read_plan(plan))
    asked = study.plan.runs()[0]
    (folder,) = map(Path, study.elsewhere(asked.task).values())
    model, labels = Model(study.run(asked).save_dir / "checkpoint_last.pt", folder), Source(folder).labels("valid")
    logits = model.predict("valid", 4096).logits
    with np.load(study.logits(study.key(asked))) as stored:
        np.testing.assert_array_equal(stored["logits_on_other"], logits)
        np.testing.assert_array_equal(stored["labels_on_other"], labels)
        assert len(stored["logits"]) != len(labels) == 17
    line = read_lines(tmp_path / "a" / "out" / "runs.jsonl")[0]
    assert line["transfer"] == ["other"]
    assert line["metrics"]["accuracy_on_other"] == pytest.approx(100 * (logits.argmax(1) == labels).mean())
    report = (tmp_path / "a" / "out" / "report.md").read_text()
    assert "| accuracy on other |" in report and f"evaluated on {line['rows']['valid']} rows, 17 on other;" in report


def test_the_key_knows_the_other_folder(tmp_path: Path) -> None:
    data, other = write_data(tmp_path / "data"), write_data(tmp_path / "other", train=10)
    before = keys(write_plan(tmp_path, data))
    after = keys(with_transfer(tmp_path, data, other))
    shutil.rmtree(other)
    changed = keys(with_transfer(tmp_path, data, write_data(tmp_path / "other", train=11)))
    assert not {*before.values()} & {*after.values()} and not {*after.values()} & {*changed.values()}


def test_lines_are_taken_that_have_it(tmp_path: Path) -> None:
    """Of two lines of the same settings the plan with the other folder takes the one that was scored there."""
    data, other = write_data(tmp_path / "data"), write_data(tmp_path / "other", train=10)
    without, plan = read_plan(write_plan(tmp_path / "a", data)), read_plan(with_transfer(tmp_path / "b", data, other))
    asked = plan.runs()[0]
    made = {**asked.settings(), "metrics": {}, "terms": {}, "updates": 1, "rows": {"train": 12, "valid": 9}}
    made |= dict.fromkeys(("commit", "torch", "date"), "x")
    lines = [{**made, "key": "a"}, {**made, "key": "b", **asked.beside()}, {**made, "key": "c", "attack": {}}]
    for folder in (plan.out, without.out):
        folder.mkdir(parents=True)
        (folder / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [line["key"] for line in studying.lines_of(plan)] == ["b"]
    assert [line["key"] for line in studying.lines_of(without)] == ["a"]


def test_what_cannot_be_scored_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, other = write_data(tmp_path / "data"), write_data(tmp_path / "other")
    words = shutil.copytree(other, tmp_path / "words")
    (words / "input0" / "dict.txt").write_text("other 1\n")
    unlabelled = shutil.copytree(other, tmp_path / "unlabelled")
    for path in (unlabelled / "label").glob("*.idx"):
        path.unlink()
    classes = shutil.copytree(other, tmp_path / "classes")
    (classes / "label" / "dict.txt").write_text("yes 1\nno 1\n")
    ranking = shutil.copytree(other, tmp_path / "ranking")
    (ranking / "preprocess.json").write_text('{"task": "QNLI-ranking", "rows": {}}')
    cases = {
        tmp_path / "nowhere": "holds no preprocess.json",
        unlabelled: "has no labelled split",
        words: "transfer: other: {} has other dictionary than",
        classes: "transfer: other: {} has other classes than",
        write_data(tmp_path / "pairs", kind="pairs"): "transfer: other: {} has other texts in a row than",
        ranking: "{}: holds QNLI-ranking, which ranks rows, as studies do not",
    }
    for folder, said in cases.items():
        plan = with_transfer(tmp_path / "a", data, folder)
        assert said.format(folder) in error_line("study", main, [plan, "--dry-run"], capsys)
    plan = with_transfer(tmp_path / "a", data, other)
    plan.write_text(plan.read_text().replace("{other:", "{o p:"))
    assert "transfer: name is 'o p'; it must be of letters" in error_line("study", main, [plan, "--dry-run"], capsys)
