"""Broken input of predict, evaluate and export: one line, exit status 2, and nothing left behind."""

import json
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
from smart_fairseq.convert.checkpoint import check_head
from smart_fairseq.data.binarize import read_manifest
from smart_fairseq.data.folders import DATA
from smart_fairseq.errors import UsageError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("errors"), ("RTE", "MRPC", "MNLI", "STS-B"))


def refused(main, capsys, *flags: str) -> str:
    return toolkit.error_line("predict|evaluate", main, flags, capsys)


def test_checkpoints_that_do_not_fit(place, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--cpu"]
    data = ["--data-dir", str(place / "bins" / "RTE-bin")]

    def says(path, *more):
        return refused(predict.main, capsys, "--checkpoint", str(path), *data, *out, *more)

    assert "nowhere.pt: --checkpoint: no such file" in says("nowhere.pt")
    both = ["--checkpoint", checkpoint(place, "RTE"), "nowhere.pt", *data]
    with pytest.MonkeyPatch.context() as patch:  # before the first one's rows are predicted
        patch.setattr(evaluate, "Model", None)
        assert "nowhere.pt: --checkpoint: no such file" in refused(evaluate.main, capsys, *both)
    assert f"{tmp_path}: --checkpoint: a folder; name a file in it" in says(tmp_path)
    # the place is found out before the model is loaded
    below = str(tmp_path / "file" / "below")
    (tmp_path / "file").touch()
    assert f"{below}/submission.zip: cannot be written" in says("nowhere.pt", "--out", below)
    for flag in ("--json", "--outputs", "--picture"):
        line = refused(evaluate.main, capsys, "--checkpoint", "nowhere.pt", *data, flag, below)
        assert f"{below}: cannot be written ({tmp_path / 'file'}: " in line
    for flag in ("--json", "--outputs"):
        line = refused(evaluate.main, capsys, "--checkpoint", "nowhere.pt", *data, flag, str(tmp_path))
        assert f"{tmp_path}: cannot be written (it is a folder); name a file" in line
    assert "gives 3 outputs, and RTE has 2" in says(checkpoint(place, "MNLI"))
    assert "is a regression, and RTE has classes: another task's" in says(checkpoint(place, "STS-B"))
    regression = ["--checkpoint", checkpoint(place, "RTE"), "--data-dir", str(place / "bins" / "STS-B-bin")]
    assert "classifies, and STS-B is a regression: another" in refused(evaluate.main, capsys, *regression, "--cpu")
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
        flags += ["bad.pt", "out.pt"]
    else:
        flags += ["--data-dir", str(place / "bins" / "RTE-bin"), "--checkpoint", "bad.pt", "--cpu"]
        flags += ["--out", "out"] if name == "predict" else []
    main = {"predict": predict, "evaluate": evaluate, "export": export}[name].main
    line = toolkit.error_line(name, main, flags, capsys)
    assert re.match(rf"{name}: error: bad\.pt: .*{message}", line) and line.isprintable()
    assert not re.search("weights_only|add_safe_globals|http", line)
    assert os.listdir() == ["bad.pt"]


def inside(*path, value):
    """Another value in the checkpoint."""

    def change(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


EMBEDDINGS = "encoder.sentence_encoder.embed_tokens.weight"
CHANGED = {  # what is changed in a whole checkpoint, and whether predict can do without it
    "weights in words": (inside("model", EMBEDDINGS, value="many"), False),
    "weights in a list": (inside("model", "encoder.lm_head.bias", value=[0.0]), False),
    "weights without a size": (inside("model", EMBEDDINGS, value=torch.tensor(1.0)), False),
    "a number for a name": (inside("model", 7, value=torch.zeros(1)), False),
    "a head without a part": (inside("model", "classification_heads.mine", value=torch.zeros(1)), False),
    "a configuration in words": (inside("cfg", value="roberta_large"), False),
    "a model in words": (inside("cfg", "model", value="roberta"), False),
    "no model's settings": (inside("cfg", "model", value=None), False),
    "no task's settings": (inside("cfg", "task", value=None), False),
    "no criterion's settings": (inside("cfg", "criterion", value=3), False),
    "a history in words": (inside("optimizer_history", value="long"), True),
    "an epoch in words": (inside("extra_state", value={"train_iterator": "first"}), True),
    "a teacher in words": (inside("last_optimizer_state", value="wise"), True),
    "a teacher of one": (inside("last_optimizer_state", value={"mbpp": {"teacher": ["wise"]}}), True),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_checkpoints_that_something_changed(place, tmp_path, capsys, kind):
    """Each command says so in a line, or what was changed does not matter to it."""
    change, may_predict = CHANGED[kind]
    state = torch.load(checkpoint(place, "RTE"))
    change(state)
    model, data = str(tmp_path / "changed.pt"), str(place / "bins" / "RTE-bin")
    torch.save(state, model)
    statuses = []
    for main, flags in (
        (predict.main, ["--data-dir", data, "--checkpoint", model, "--cpu", "--out", str(tmp_path / "out")]),
        (export.main, [model, str(tmp_path / "out.pt")]),
        (export.main, [model, str(tmp_path / "out.pt"), "--teacher", "--overwrite"]),
        (export.main, [model, str(tmp_path / "hf"), "--format=huggingface", f"--bpe-dir={place / 'bpe'}"]),
    ):
        capsys.readouterr()
        statuses.append(main(flags))
        lines = capsys.readouterr().err.splitlines()
        assert statuses[-1] == 0 or (
            len(lines) == 1 and re.match(r"(predict|export): error: .*changed\.pt: ", lines[0])
        )
    assert 2 in statuses and (may_predict or statuses[0] == 2)
    there = [name for name, status in zip(("out", "out.pt", "out.pt", "hf"), statuses) if status == 0]
    assert {path.name for path in tmp_path.iterdir()} == {"changed.pt", *there}


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
    assert expected in toolkit.error_line("export", export.main, [model, str(tmp_path / "plain.pt")], capsys)
    with pytest.raises(UsageError, match=re.escape(expected)):  # fairseq-validate
        checkpoint_utils.load_model_ensemble_and_task([model], {"data": str(place / "bins" / "RTE-bin")})
    assert {path.name for path in tmp_path.iterdir()} == {"other.pt"}


def test_every_weight_comes_from_the_checkpoint(place):
    """Whichever is missing, the model says so: none is left as it was drawn."""
    path = checkpoint(place, "RTE")
    models, *_ = checkpoint_utils.load_model_ensemble_and_task([path], {"data": str(place / "bins" / "RTE-bin")})
    weights = torch.load(path)["model"]
    assert len(weights) > 40
    for name in weights.keys() - {"encoder.sentence_encoder.version"}:  # of the format, no weight
        rest = {key: tensor for key, tensor in weights.items() if key != name}
        if name.startswith("classification_heads."):
            with pytest.raises(UsageError, match=re.escape(name.removeprefix(f"classification_heads.{toolkit.HEAD}."))):
                check_head(Path(path), rest, toolkit.HEAD)
        else:
            with pytest.raises(RuntimeError, match=re.escape(name)):
                models[0].load_state_dict(rest)


def test_flags_that_do_not_fit(place, tmp_path, capsys):
    model, out = checkpoint(place, "RTE"), ["--out", str(tmp_path / "out")]
    bins = ["--data-dir", str(place / "bins")]
    assert "it must be TASK=PATH" in refused(predict.main, capsys, "--checkpoint", model, *bins, *out)
    twice = ["--checkpoint", f"RTE={model}", f"RTE={model}"]
    assert "names RTE twice" in refused(predict.main, capsys, *twice, *bins, *out)
    line = refused(predict.main, capsys, "--checkpoint", f"QNLI={model}", *bins, *out)
    assert "--checkpoint names QNLI, and --data-dir has" in line
    for data in (bins, ["--data-dir", str(place / "bins" / "RTE-bin")]):
        line = refused(predict.main, capsys, "--checkpoint", f"RTF={model}", *data, *out)
        assert re.search(r"--checkpoint names 'RTF', which is no task; --data-dir has (.*, )?RTE", line)
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
    with pytest.raises(UsageError, match=r"give one of the folders in it: .*RTE-bin"):
        read_manifest(place / "bins")
    test = ["--split", "test", "--data-dir", str(place / "bins" / "RTE-bin")]
    assert "test has no labels" in refused(evaluate.main, capsys, *test, "--checkpoint", model)


FILES = {
    "a wrong header": ("id\tlabel\n0\tentailment\n", r"p.tsv:1: the header is 'id\\tlabel'"),
    "a wrong label": ("index\tprediction\n0\tyes\n", r"p.tsv:2: prediction 'yes' is not one of entailment"),
    "one column": ("index\tprediction\n0\n", r"p.tsv:2: 1 column, and 2 are needed"),
    "an id twice": ("index\tprediction\n0\tentailment\n0\tentailment\n", r"p.tsv:3: id '0' was there already"),
    "rows missing": ("index\tprediction\n0\tentailment\n", r"p.tsv: holds 1 predictions, .* 15 rows; 14 are missing"),
    "nothing": ("", r"p.tsv: is empty"),
    "the header alone": ("index\tprediction\n", r"p.tsv: holds 0 predictions"),
    "columns exchanged": ("prediction\tindex\n", r"p.tsv:1: the header is"),
    "another case": ("index\tprediction\n0\tEntailment\n", r"p.tsv:2: prediction 'Entailment' is not one of"),
    "a blank line": ("index\tprediction\n\n", r"p.tsv:2: 1 column, and 2 are needed"),
    "terminal codes": ("index\tprediction\n0\t\x1b[31m\n", r"p.tsv:2: prediction '\\x1b\[31m' is not one of"),
    "a zero byte": ("index\tprediction\n0\t\0\n", r"p.tsv:2: holds a zero byte"),
    "other ids": (
        "index\tprediction\n" + "".join(f"x{number}\tentailment\n" for number in range(15)),
        r"p.tsv: holds 15 predictions, .* 15 rows; 15 are missing, the first for id '0'",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_prediction_files_that_are_not_in_order(place, tmp_path, capsys, kind):
    text, message = FILES[kind]
    (tmp_path / "p.tsv").write_text(text)
    data = ["--data-dir", str(place / "bins" / "RTE-bin")]
    assert re.search(message, refused(evaluate.main, capsys, *data, "--predictions", str(tmp_path / "p.tsv")))


LINES = {
    "null": ("null", "p.jsonl:1: each line must be an object"),
    "a list": ("[]", "p.jsonl:1: each line must be an object"),
    "brackets": ("[" * 10_000, "p.jsonl:1: each line must be an object"),
    "half a surrogate pair": ('{"uid": "\\ud800", "label": "e"}', "p.jsonl:1: each line must be an object"),
    "a blank line": ('{"uid": "a", "label": "e"}\n\n', "p.jsonl:2: each line must be an object"),
    "another label": ('{"uid": "a", "label": 1}', "p.jsonl:1: prediction '1' is not one of"),
    "an id twice": ('{"uid": "a", "label": "e"}\n' * 2, "p.jsonl:2: id 'a' was there already"),
}


@pytest.mark.parametrize("kind", LINES)
def test_lines_of_predictions_that_are_not_in_order(place, tmp_path, capsys, kind):
    text, message = LINES[kind]
    (tmp_path / "p.jsonl").write_text(text)
    data = ["--data-dir", str(place / "bins" / "MNLI-bin"), "--split", "valid"]
    assert message in refused(evaluate.main, capsys, *data, "--predictions", str(tmp_path / "p.jsonl"))


def test_an_id_in_two_files_of_a_run(place, tmp_path, capsys):
    (tmp_path / "p.tsv").write_text("index\tprediction\n0\tentailment\n")
    file, data = str(tmp_path / "p.tsv"), ["--data-dir", str(place / "bins" / "RTE-bin")]
    line = refused(evaluate.main, capsys, *data, "--predictions", f"{file},{file}")
    assert "p.tsv: id '0' was in a file before it already" in line


def test_anli_files_and_scores_that_are_not_in_order(place, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"uid": "u"}\n')
    (tmp_path / "s.tsv").write_text("index\tprediction\n0\tnan\n")
    data = ["--data-dir", str(place / "bins" / "MNLI-bin"), "--split", "valid"]
    line = refused(evaluate.main, capsys, *data, "--predictions", str(tmp_path / "p.jsonl"))
    assert "p.jsonl:1: each line must be an object" in line
    data = ["--data-dir", str(place / "bins" / "STS-B-bin")]
    line = refused(evaluate.main, capsys, *data, "--predictions", str(tmp_path / "s.tsv"))
    assert "s.tsv:2: prediction 'nan' is not a number" in line


def manifest(**changes):
    return lambda folder: (folder / "preprocess.json").write_text(json.dumps({**read_manifest(folder), **changes}))


def edit(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


NOT_OURS = "preprocess.json: is not what preprocess.py writes"
DAMAGED = {
    "preprocess.json cut": (edit("preprocess.json", lambda raw: raw[:9]), "preprocess.json:2: cannot be read"),
    "preprocess.json null": (edit("preprocess.json", lambda raw: b"null"), "preprocess.json: holds a NoneType"),
    "brackets": (edit("preprocess.json", lambda raw: b"[" * 10_000), "preprocess.json: cannot be read"),
    "unknown task": (manifest(task="RTF", labels=None), NOT_OURS),
    "task without a form": (
        edit("preprocess.json", lambda raw: b'{"task": "RTF", "rows": {}}'),
        "task 'RTF' is not one",
    ),
    "task a list": (manifest(task=["RTE"]), NOT_OURS),
    "task half a pair": (edit("preprocess.json", lambda raw: b'{"task": "\\ud800", "rows": {}}'), "cannot be read"),
    "rows a list": (manifest(rows=[15]), NOT_OURS),
    "labels a number": (manifest(labels=5), NOT_OURS),
    "labels of labels": (manifest(labels=[{}]), NOT_OURS),
    "divisor a word": (manifest(divisor="five"), NOT_OURS),
    "divisor 0": (manifest(divisor=0), NOT_OURS),
    "parts a number": (manifest(parts=5), NOT_OURS),
    "parts of other sizes": (manifest(parts={"valid": [["R1", 7], ["R2", 3]]}), NOT_OURS),
    "split elsewhere": (manifest(rows={"valid/../../x": 15}), "ids/valid/../../x.tsv: is missing|x.idx: is missing"),
    "no ids": (edit("ids/valid.tsv", lambda raw: b""), "ids/valid.tsv: is empty"),
    "fewer ids": (edit("ids/valid.tsv", lambda raw: raw[: len(raw) // 2]), "ids/valid.tsv: holds \\d+ ids, and input0"),
    "an id twice": (edit("ids/valid.tsv", lambda raw: raw.replace(b"\n1\t", b"\n0\t")), "valid.tsv: holds an id twice"),
    "ids in latin-1": (edit("ids/valid.tsv", lambda raw: raw + b"\xe9\n"), "ids/valid.tsv:17: byte 0xe9"),
    "labels' index cut": (edit("label/valid.idx", lambda raw: raw[:-5]), "valid.idx: is cut short or damaged"),
    "labels' index of another kind": (edit("label/valid.idx", lambda raw: b"TNTIDX\0\0" + raw), "is not an index of"),
    "a count beyond": (edit("label/valid.idx", lambda raw: raw[:18] + b"\xff" * 8 + raw[26:]), "cut short or damaged"),
    "sizes below 0": (
        edit("label/valid.idx", lambda raw: raw[:26] + b"\xff" * (len(raw) - 26)),
        "cut short or damaged",
    ),
    "starts elsewhere": (
        edit("label/valid.idx", lambda raw: raw[:-8] + bytes(8)),
        "valid.idx: is cut short or damaged",
    ),
    "labels cut": (edit("label/valid.bin", lambda raw: raw[:-2]), "valid.bin: holds 29 ids, and its .idx says 30"),
    "labels 0": (edit("label/valid.bin", lambda raw: bytes(len(raw))), "label/valid.bin: holds labels beyond"),
    # number 3 counts from the end of the classes
    "labels 3": (
        edit("label/valid.bin", lambda raw: b"\3\0" * (len(raw) // 2)),
        "label/valid.bin: holds labels beyond",
    ),
    "labels of others": (edit("label/dict.txt", lambda raw: b"yes 1\nno 1\n"), "dict.txt: holds the labels yes, no"),
    "one label": (
        edit("label/dict.txt", lambda raw: raw.split(b"\n")[0]),
        "dict.txt: holds the labels entailment, and",
    ),
    "no label dictionary": (edit("label/dict.txt", lambda raw: b""), "label/dict.txt: is empty"),
    "texts' index empty": (edit("input0/valid.idx", lambda raw: b""), "input0/valid.idx: is not an index of"),
    "texts cut": (
        edit("input1/valid.bin", lambda raw: raw[:-2]),
        "input1/valid.bin: holds \\d+ ids, and its .idx says",
    ),
    "ids beyond": (edit("input0/valid.bin", lambda raw: b"\xff" * len(raw)), "valid.bin: holds ids beyond the \\d+ of"),
    "another dictionary": (edit("input0/dict.txt", lambda raw: b"a 1\n"), "bad.pt: its weights do not fit the model"),
    "a dictionary without counts": (edit("input0/dict.txt", lambda raw: b"a\n"), "bad.pt: cannot be loaded"),
}


UNSEEN = {"labels 0", "labels 3", "labels of others", "divisor a word"}


@pytest.mark.parametrize("kind", DAMAGED)
def test_data_folders_that_are_damaged(place, tmp_path, capsys, kind):
    damage, message = DAMAGED[kind]
    damaged, model = tmp_path / "RTE-bin", shutil.copy(checkpoint(place, "RTE"), tmp_path / "bad.pt")
    shutil.copytree(place / "bins" / "RTE-bin", damaged)
    damage(damaged)
    flags = ["--data-dir", str(damaged), "--checkpoint", str(model), "--cpu", "--json", str(tmp_path / "scores")]
    split = ["--split", "valid/../../x"] if kind == "split elsewhere" else []
    assert re.search(message, refused(evaluate.main, capsys, *flags, *split))
    # predict, which needs fewer of the files, says the same or predicts
    flags[-2:] = ["--split", "valid", "--out", str(tmp_path / "out")]
    if predict.main([*flags, *split]) == 2:
        assert re.search(rf"{message}|: another task's$|--split is 'valid'; .* has$", capsys.readouterr().err)
    else:
        assert kind in UNSEEN
        shutil.rmtree(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["RTE-bin", "bad.pt"]


def test_targets_that_are_damaged(place, tmp_path, capsys):
    shutil.copytree(place / "bins" / "STS-B-bin", tmp_path / "STS-B-bin")
    path = tmp_path / "STS-B-bin" / "label" / "valid.label"
    lines = path.read_text().splitlines()
    (tmp_path / "p.tsv").write_text("index\tprediction\n0\t1\n")
    flags = ["--data-dir", str(tmp_path / "STS-B-bin"), "--predictions", str(tmp_path / "p.tsv")]
    for third, message in (
        ("", "'' is no number"),
        ("nan", "'nan' is no number"),
        ("0.5 0.5", "'0.5 0.5' is no number"),
    ):
        path.write_text("\n".join([*lines[:2], third, *lines[3:]]) + "\n")
        assert f"valid.label:3: {message}" in refused(evaluate.main, capsys, *flags)
    path.write_text("\n".join(lines[1:]) + "\n")
    expected = f"label/valid.label: does not have the {len(lines)} rows of ids/valid.tsv"
    for main, more in ((predict.main, ["--out", str(tmp_path / "out")]), (evaluate.main, [])):
        model = ["--checkpoint", checkpoint(place, "STS-B"), "--cpu", "--split", "valid"]
        assert expected in refused(main, capsys, *flags[:2], *model, *more)


def test_repeated_ids_of_a_training_part(place, tmp_path, capsys):
    """Rows are trained on and scored by their place; what predict writes would be found by id."""
    data, model = tmp_path / "RTE-bin", ["--checkpoint", checkpoint(place, "RTE"), "--cpu", "--split", "train"]
    shutil.copytree(place / "bins" / "RTE-bin", data)
    edit("ids/train.tsv", lambda raw: raw.replace(b"\n1\t", b"\n0\t"))(data)
    flags = ["--data-dir", str(data), *model]
    assert evaluate.main(flags) == 0
    line = refused(predict.main, capsys, *flags, "--out", str(tmp_path / "out"))
    assert "ids/train.tsv: holds an id twice, and predictions are found by their ids; predict another split" in line
    assert [path.name for path in tmp_path.iterdir()] == ["RTE-bin"]


def test_a_model_of_one_answer_and_a_training_folder_that_is_gone_are_said(place, tmp_path, capsys):
    state = torch.load(checkpoint(place, "RTE"))
    state["model"]["classification_heads.sentence_classification_head.out_proj.bias"][0] += 1e6
    state["cfg"]["task"]["data"] = "gone-bin"
    del state["task_state"][DATA]  # as earlier versions wrote it
    torch.save(state, tmp_path / "one.pt")
    data = str(place / "bins" / "RTE-bin")
    gone = f"trained on gone-bin, which is gone: its classes were not compared with those of {data}\n"
    for main, more in ((predict.main, ["--split", "valid", "--out", str(tmp_path / "out")]), (evaluate.main, [])):
        for model, expected in ((str(tmp_path / "one.pt"), True), (checkpoint(place, "RTE"), False)):
            capsys.readouterr()
            assert main(["--data-dir", data, "--checkpoint", model, "--cpu", *more]) == 0
            said = capsys.readouterr().out
            assert (gone in said) == ("RTE valid: all 15 rows are predicted as " in said) == expected, said


def test_a_checkpoint_that_diverged(place, tmp_path, capsys):
    state = torch.load(checkpoint(place, "RTE"))
    state["model"]["classification_heads.sentence_classification_head.out_proj.bias"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    flags = ["--data-dir", str(place / "bins" / "RTE-bin"), "--out", str(tmp_path / "out"), "--cpu"]
    line = refused(predict.main, capsys, "--checkpoint", str(tmp_path / "nan.pt"), *flags)
    assert "nan.pt: gives no finite numbers for 15 of 15 rows" in line
