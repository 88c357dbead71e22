"""Broken input of predict, evaluate and export: one line, exit status 2, and nothing left behind."""

import os
import re
import shutil
from pathlib import Path

import pytest
import toolkit
import torch
from data_samples import checkpoint, make_place
from fairseq import checkpoint_utils
from hostile_samples import CHECKPOINTS

from smart_fairseq import export
from smart_fairseq.commands import evaluate, predict
from smart_fairseq.errors import UsageError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("errors"), ("RTE", "MRPC", "MNLI"))


def refused(main, capsys, *flags: str) -> str:
    capsys.readouterr()
    assert main(list(flags)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and re.match(r"(predict|evaluate): error: ", lines[0]), lines
    return lines[0]


def test_checkpoints_that_do_not_fit(place, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--cpu"]
    data = ["--data-dir", str(place / "bins" / "RTE-bin")]

    def says(path, *more):
        return refused(predict.main, capsys, "--checkpoint", str(path), *data, *out, *more)

    assert "nowhere.pt: --checkpoint: no such file" in says("nowhere.pt")
    # the place is found out before the model is loaded
    below = str(tmp_path / "file" / "below")
    (tmp_path / "file").touch()
    assert f"{below}/submission.zip: cannot be written" in says("nowhere.pt", "--out", below)
    for flag in ("--json", "--outputs", "--picture"):
        line = refused(evaluate.main, capsys, "--checkpoint", "nowhere.pt", *data, flag, below)
        assert f"{below}: cannot be written ({tmp_path / 'file'}: " in line
    assert "gives 3 outputs, and RTE has 2" in says(checkpoint(place, "MNLI"))
    assert "classes 1, 0" in says(checkpoint(place, "MRPC"))  # as many classes, but others
    assert "--split is 'dev'; " in says(checkpoint(place, "RTE"), "--split", "dev")
    assert "--max-tokens is '0'" in says(checkpoint(place, "RTE"), "--max-tokens", "0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["predict", "evaluate", "evaluate --full", "export", "export --teacher"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_files_that_are_no_checkpoint(place, tmp_path, capsys, monkeypatch, kind, command):
    """In our own words: torch's advise to load the file unsafely."""
    monkeypatch.chdir(tmp_path)
    make, message = CHECKPOINTS[kind]
    make(Path(checkpoint(place, "RTE")), Path("bad.pt"))
    name, *flags = command.split()
    if name == "export":
        assert export.main(["bad.pt", "out.pt", *flags]) == 2
    else:
        flags += ["--data-dir", str(place / "bins" / "RTE-bin"), "--checkpoint", "bad.pt", "--cpu"]
        assert {"predict": predict, "evaluate": evaluate}[name].main(
            [*flags, *(("--out", "out") if name == "predict" else ())]
        ) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"{name}: error: bad\.pt: .*{message}", line) and line.isprintable()
    assert not re.search("weights_only|add_safe_globals|http", line)
    assert os.listdir() == ["bad.pt"]


HEADS = {  # what becomes of the names of the head's weights, "" where they go, and what must be said
    "none": (r".*", "", "has no classification head {}; it holds none: "),
    "another name": (r"{}", "mine", "has no classification head {}; its heads are mine"),
    "half of it": (r".*dense\.bias", "", "has no dense.bias of its classification head {}; "),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_checkpoint_without_its_head_is_not_scored_with_a_random_one(place, tmp_path, capsys, kind):
    pattern, name, what = HEADS[kind]
    state = torch.load(checkpoint(place, "RTE"))
    for key in [key for key in state["model"] if key.startswith("classification_heads.")]:
        tensor, key = state["model"].pop(key), re.sub(pattern.format(toolkit.HEAD), name, key, count=1)
        if key:
            state["model"][key] = tensor
    model = str(tmp_path / "other.pt")
    torch.save(state, model)
    data = ["--data-dir", str(place / "bins" / "RTE-bin"), "--checkpoint", model, "--cpu"]
    expected = f"other.pt: {what.format(repr(toolkit.HEAD))}"
    assert expected in refused(predict.main, capsys, *data, "--out", str(tmp_path / "out"))
    assert expected in refused(evaluate.main, capsys, *data, "--split", "valid")
    assert export.main([model, str(tmp_path / "plain.pt")]) == 2
    assert expected in capsys.readouterr().err
    with pytest.raises(UsageError, match=re.escape(expected)):  # fairseq-validate
        checkpoint_utils.load_model_ensemble_and_task([model], {"data": str(place / "bins" / "RTE-bin")})
    assert {path.name for path in tmp_path.iterdir()} == {"other.pt"}


def test_flags_that_do_not_fit(place, tmp_path, capsys):
    model, out = checkpoint(place, "RTE"), ["--out", str(tmp_path / "out")]
    bins = ["--data-dir", str(place / "bins")]
    assert "it must be TASK=PATH" in refused(predict.main, capsys, "--checkpoint", model, *bins, *out)
    twice = ["--checkpoint", f"RTE={model}", f"RTE={model}"]
    assert "names RTE twice" in refused(predict.main, capsys, *twice, *bins, *out)
    line = refused(predict.main, capsys, "--checkpoint", f"QNLI={model}", *bins, *out)
    assert "--checkpoint names QNLI, and --data-dir has" in line
    both = ["--checkpoint", f"RTE={model}", f"MRPC={checkpoint(place, 'MRPC')}"]
    assert "MRPC-bin: has no test split of MRPC" in refused(predict.main, capsys, *both, *bins, *out)
    assert not (tmp_path / "out").exists()  # found before RTE was predicted
    line = refused(predict.main, capsys, "--checkpoint", model, "--data-dir", str(place / "bpe"), *out)
    assert "holds no data folder, and no official files" in line
    line = refused(predict.main, capsys, "--checkpoint", model, "--data-dir", "nowhere", *out)
    assert "nowhere: --data-dir: no such folder" in line
    line = refused(evaluate.main, capsys, "--data-dir", str(place / "bins" / "RTE-bin"))
    assert "--checkpoint or --predictions must be given" in line
    line = refused(evaluate.main, capsys, "--data-dir", str(place / "bins"), "--checkpoint", model)
    assert "holds 6 data folders; name one, or say which --task" in line
    test = ["--split", "test", "--data-dir", str(place / "bins" / "RTE-bin")]
    assert "test has no labels" in refused(evaluate.main, capsys, *test, "--checkpoint", model)


FILES = {
    "a wrong header": ("id\tlabel\n0\tentailment\n", r"p.tsv:1: the header is 'id\\tlabel'"),
    "a wrong label": ("index\tprediction\n0\tyes\n", r"p.tsv:2: prediction 'yes' is not one of entailment"),
    "one column": ("index\tprediction\n0\n", r"p.tsv:2: 1 column, and 2 are needed"),
    "an id twice": ("index\tprediction\n0\tentailment\n0\tentailment\n", r"p.tsv:3: id '0' was there already"),
    "rows missing": ("index\tprediction\n0\tentailment\n", r"p.tsv: holds 1 predictions, .* 15 rows; 14 are missing"),
    "nothing": ("", r"p.tsv: is empty"),
}


@pytest.mark.parametrize("kind", FILES)
def test_prediction_files_that_are_not_in_order(place, tmp_path, capsys, kind):
    text, message = FILES[kind]
    (tmp_path / "p.tsv").write_text(text)
    data = ["--data-dir", str(place / "bins" / "RTE-bin")]
    assert re.search(message, refused(evaluate.main, capsys, *data, "--predictions", str(tmp_path / "p.tsv")))


def test_anli_files_and_scores_that_are_not_in_order(place, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"uid": "u"}\n')
    (tmp_path / "s.tsv").write_text("index\tprediction\n0\tnan\n")
    data = ["--data-dir", str(place / "bins" / "MNLI-bin"), "--split", "valid"]
    line = refused(evaluate.main, capsys, *data, "--predictions", str(tmp_path / "p.jsonl"))
    assert "p.jsonl:1: each line must be an object" in line
    data = ["--data-dir", str(place / "bins" / "STS-B-bin")]
    line = refused(evaluate.main, capsys, *data, "--predictions", str(tmp_path / "s.tsv"))
    assert "s.tsv:2: prediction 'nan' is not a number" in line


def test_data_folders_that_are_damaged(place, tmp_path, capsys):
    damaged = tmp_path / "RTE-bin"
    shutil.copytree(place / "bins" / "RTE-bin", damaged)
    model = ["--data-dir", str(damaged), "--checkpoint", checkpoint(place, "RTE"), "--cpu"]
    index = damaged / "label" / "valid.idx"
    whole = index.read_bytes()
    index.write_bytes(whole[:-5])
    assert "valid.idx: is cut short or damaged" in refused(evaluate.main, capsys, *model)
    index.write_bytes(b"TNTIDX\0\0" + whole)
    assert "is not an index of fairseq's mmap format" in refused(evaluate.main, capsys, *model)
    index.write_bytes(whole)
    data = damaged / "label" / "valid.bin"
    data.write_bytes(data.read_bytes()[:-2])
    assert "valid.bin: holds 29 ids, and its .idx says 30" in refused(evaluate.main, capsys, *model)
    (damaged / "preprocess.json").write_text("{")
    assert "preprocess.json: cannot be read" in refused(evaluate.main, capsys, *model)
    (damaged / "preprocess.json").write_text('{"task": "RTF", "rows": {}}')
    assert "task 'RTF' is not one of" in refused(evaluate.main, capsys, *model)


def test_a_checkpoint_that_diverged(place, tmp_path, capsys):
    state = torch.load(checkpoint(place, "RTE"))
    state["model"]["classification_heads.sentence_classification_head.out_proj.bias"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    flags = ["--data-dir", str(place / "bins" / "RTE-bin"), "--out", str(tmp_path / "out"), "--cpu"]
    line = refused(predict.main, capsys, "--checkpoint", str(tmp_path / "nan.pt"), *flags)
    assert "nan.pt: gives no finite numbers for 15 of 15 rows" in line
