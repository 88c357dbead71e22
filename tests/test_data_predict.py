"""From a checkpoint to submission files and scores, and back to what fairseq-validate logs."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import toolkit
import torch
from data_samples import ROOT, make_anli, make_glue, make_gpt2_bpe, train, write
from fairseq import checkpoint_utils

from smart_fairseq import export
from smart_fairseq.commands import evaluate, predict
from smart_fairseq.commands.preprocess import anli_main, glue_main
from smart_fairseq.data import metrics
from smart_fairseq.data.tasks import GLUE, NLI_LABELS, TASKS
from smart_fairseq.errors import UsageError
from smart_fairseq.inference import Model, Predictions, batches


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Official files, data folders and a checkpoint for each task."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only stand in each other's way on matrices this small
    place = tmp_path_factory.mktemp("predict")
    make_gpt2_bpe(place / "bpe")
    make_glue(place / "glue")
    flags = ["--data-dir", str(place / "glue"), "--bpe-dir", str(place / "bpe"), "--out", str(place / "bins")]
    assert glue_main(["--task", "all", *flags]) == 0
    for name, classes, more in (
        ("RTE", 2, ["--separator-token", "2"]),
        ("CoLA", 2, ["--report-mcc"]),
        ("MRPC", 2, ["--separator-token", "2", "--report-acc-and-f1"]),
        ("STS-B", 1, ["--separator-token", "2", "--regression-target", "--report-pearson-and-spearman"]),
        ("MNLI", 3, ["--separator-token", "2"]),
    ):
        train(place / "bins" / f"{name}-bin", place / "checkpoints" / name, classes, *more)
    yield place
    torch.set_num_threads(threads)


def checkpoint(place: Path, name: str) -> str:
    return str(place / "checkpoints" / name / "checkpoint_last.pt")


def table(path: Path):
    return [line.split("\t") for line in path.read_text().splitlines()]


# Round trip -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, logged",
    [
        ("CoLA", {"mcc": "mcc", "accuracy": "accuracy"}),
        ("MRPC", {"acc_and_f1": "acc_and_f1", "f1": "f1", "accuracy": "accuracy"}),
        ("STS-B", {"pearson": "pearson", "spearman": "spearman", "pearson_and_spearman": "pearson_and_spearman"}),
    ],
)
def test_scores_of_predictions_equal_what_fairseq_validate_logs(place, tmp_path, name, logged):
    data = place / "bins" / f"{name}-bin"
    run = subprocess.run(
        [
            *(sys.executable, "-m", "fairseq_cli.validate", str(data), "--user-dir", str(ROOT / "smart_fairseq")),
            *("--path", checkpoint(place, name), "--task", "sentence_prediction", "--valid-subset", "valid"),
            *("--criterion", "sentence_prediction", "--batch-size", "5", "--cpu", "--log-format", "json"),
            # otherwise fairseq leaves the last batch out, without a word
            *("--num-workers", "0", "--required-batch-size-multiple", "1"),
        ],
        capture_output=True,
        text=True,
    )
    found = [line for line in run.stdout.splitlines() if '"valid_' in line or '"accuracy"' in line or '"loss"' in line]
    assert run.returncode == 0 and found, run.stdout + run.stderr
    fairseqs = {
        key.replace("valid_", ""): value for key, value in json.loads(found[-1][found[-1].index("{") :]).items()
    }
    out = tmp_path / "out"
    flags = ["--data-dir", str(data), "--cpu"]
    assert predict.main([*flags, "--checkpoint", checkpoint(place, name), "--split", "valid", "--out", str(out)]) == 0
    file = out / f"{name}.valid.tsv"
    scored = tmp_path / "scores.json"
    assert evaluate.main([*flags, "--predictions", str(file), "--json", str(scored)]) == 0
    ours = json.loads(scored.read_text())["splits"]["valid"]["runs"][str(file)]
    assert len({row[1] for row in table(file)[1:]}) > 1  # a constant would prove nothing
    for metric, key in logged.items():
        assert round(ours[metric], 1) == pytest.approx(float(fairseqs[key]), abs=1e-9), (metric, fairseqs)
    # and straight from the checkpoint
    assert evaluate.main([*flags, "--checkpoint", checkpoint(place, name), "--json", str(scored)]) == 0
    direct = json.loads(scored.read_text())["splits"]["valid"]["runs"][checkpoint(place, name)]
    assert direct == pytest.approx(ours, abs=1e-4)


def test_batches_change_nothing(place, tmp_path):
    data = place / "bins" / "MRPC-bin"
    small = Model(Path(checkpoint(place, "MRPC")), data, cpu=True).predict("valid", 1)
    large = Model(Path(checkpoint(place, "MRPC")), data, cpu=True).predict("valid", 10**6)
    assert small.ids == large.ids == [str(number) for number in range(27)]
    np.testing.assert_allclose(small.scores, large.scores, atol=1e-5)
    np.testing.assert_allclose(small.scores.sum(1), 1, atol=1e-6)


def test_as_a_program_it_predicts_the_same(place, tmp_path):
    """A program registers what the checkpoint needs by itself, and fairseq says nothing while it loads."""
    flags = ["--checkpoint", checkpoint(place, "MRPC"), "--data-dir", str(place / "bins" / "MRPC-bin")]
    flags += ["--split", "valid", "--cpu"]
    command = [sys.executable, "-m", "smart_fairseq.commands", "predict", *flags, "--out", str(tmp_path / "program")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert not done.stderr
    assert predict.main([*flags, "--out", str(tmp_path / "here")]) == 0
    assert table(tmp_path / "program" / "MRPC.valid.tsv") == table(tmp_path / "here" / "MRPC.valid.tsv")


def test_batches_hold_rows_of_like_length():
    sizes = np.array([3, 9, 4, 9, 1])
    assert list(batches(sizes, 18)) == [[1, 3], [2, 0, 4]]
    assert [len(batch) for batch in batches(sizes, 1)] == [1] * 5


# Submission files -------------------------------------------------------------------------------------------------


def test_submission_files_and_zip(place, tmp_path, capsys):
    out = tmp_path / "submission"
    names = ("RTE", "CoLA", "STS-B", "MNLI")
    checkpoints = [f"{name}={checkpoint(place, name)}" for name in names]
    flags = ["--data-dir", str(place / "bins"), "--out", str(out), "--cpu"]
    assert predict.main(["--checkpoint", *checkpoints, *flags]) == 0
    said = capsys.readouterr().out
    rte = table(out / "RTE.tsv")
    assert rte[0] == ["index", "prediction"]
    assert [row[0] for row in rte[1:]] == [str(number) for number in range(15)]
    assert {row[1] for row in rte[1:]} <= {"entailment", "not_entailment"}
    assert {row[1] for row in table(out / "CoLA.tsv")[1:]} <= {"0", "1"}
    assert {row[1] for row in table(out / "AX.tsv")[1:]} <= set(NLI_LABELS)  # MNLI's model, without being asked
    assert all(0 <= float(row[1]) <= 5 for row in table(out / "STS-B.tsv")[1:])
    assert "RTE.tsv: 15 rows, and the GLUE server expects 3000" in said
    assert "the server also wants SST-2.tsv, MRPC.tsv, QQP.tsv, QNLI.tsv, WNLI.tsv" in said
    with zipfile.ZipFile(out / "submission.zip") as archive:
        assert set(archive.namelist()) == {
            f"{name}.tsv" for name in ("RTE", "CoLA", "STS-B", "MNLI-m", "MNLI-mm", "AX")
        }
    # a later run adds to it; baselines only when asked for
    checkpoints = [f"RTE={checkpoint(place, 'RTE')}"]
    assert predict.main(["--checkpoint", *checkpoints, *flags, "--fill-missing", "majority"]) == 0
    assert "WNLI.tsv: the majority baseline" in capsys.readouterr().out
    assert table(out / "RTE.tsv") == rte
    with zipfile.ZipFile(out / "submission.zip") as archive:
        assert len(archive.namelist()) == 11
    for name in GLUE:
        for split, file in TASKS[name].submission.items():
            if name in ("WNLI", "QNLI", "SST-2"):
                assert len(table(out / file)) == TASKS[name].rows[split] + 1


def test_official_files_give_the_same_predictions(place, tmp_path):
    out = tmp_path / "out"
    flags = ["--checkpoint", f"RTE={checkpoint(place, 'RTE')}", "--cpu", "--out"]
    assert predict.main([*flags, str(out / "bins"), "--data-dir", str(place / "bins")]) == 0
    official = ["--data-dir", str(place / "glue"), "--bpe-dir", str(place / "bpe")]
    assert predict.main([*flags, str(out / "official"), *official]) == 0
    assert (out / "bins" / "RTE.tsv").read_bytes() == (out / "official" / "RTE.tsv").read_bytes()


def test_official_files_give_the_same_scores(place, tmp_path):
    model, scores = ["--checkpoint", checkpoint(place, "MNLI"), "--cpu"], []
    official = ["--data-dir", str(place / "glue"), "--bpe-dir", str(place / "bpe"), "--task", "MNLI"]
    for number, flags in enumerate((["--data-dir", str(place / "bins"), "--task", "MNLI"], official)):
        file = tmp_path / f"{number}.json"
        assert evaluate.main([*model, *flags, "--json", str(file)]) == 0
        scores.append(json.loads(file.read_text()))
    assert scores[0] == scores[1] and list(scores[0]["splits"]) == ["valid", "valid1"]


def test_a_checkpoint_that_diverged(place, tmp_path, capsys):
    state = torch.load(checkpoint(place, "RTE"))
    state["model"]["classification_heads.sentence_classification_head.out_proj.bias"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    flags = ["--data-dir", str(place / "bins" / "RTE-bin"), "--out", str(tmp_path / "out"), "--cpu"]
    line = refused(predict.main, capsys, "--checkpoint", str(tmp_path / "nan.pt"), *flags)
    assert "nan.pt: gives no finite numbers for 15 of 15 rows" in line


def test_scores_for_the_server_are_clipped_and_others_are_not(tmp_path):
    found = Predictions(TASKS["STS-B"], "test", ["1", "0"], ["5.200000", "-0.100000"], np.zeros((2, 1)))
    assert table(predict.write_submission(found, tmp_path))[1:] == [["0", "0.000"], ["1", "5.000"]]
    assert table(predict.write_predictions(found, tmp_path))[1:] == [["1", "5.200000"], ["0", "-0.100000"]]


def test_anli_by_uid_and_by_round(place, tmp_path, capsys):
    data = make_anli(tmp_path / "data")
    flags = ["--data-dir", str(data), "--bpe-dir", str(place / "bpe"), "--out", str(tmp_path / "ANLI-bin")]
    assert anli_main(flags) == 0
    # MNLI's head serves, and its own order of the classes counts
    model = ["--checkpoint", checkpoint(place, "MNLI"), "--data-dir", str(tmp_path / "ANLI-bin"), "--cpu"]
    assert predict.main([*model, "--out", str(tmp_path / "out"), "--split", "valid"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "ANLI-R2.valid.jsonl").read_text().splitlines()]
    assert [row["uid"] for row in rows] == ["R2dev0", "R2dev1", "R2dev2"]
    assert {row["label"] for row in rows} <= set("enc")
    files = ",".join(str(tmp_path / "out" / f"ANLI-R{number}.valid.jsonl") for number in (1, 2, 3))
    scored = tmp_path / "scores.json"
    more = ["--data-dir", str(tmp_path / "ANLI-bin"), "--json", str(scored)]
    assert evaluate.main(["--predictions", files, *more]) == 0
    scores = json.loads(scored.read_text())["splits"]["valid"]["runs"][files]
    assert list(scores) == ["accuracy R1", "accuracy R2", "accuracy R3", "accuracy"]
    assert scores["accuracy"] == pytest.approx(sum(scores[f"accuracy R{number}"] for number in (1, 2, 3)) / 3)


# Several runs -----------------------------------------------------------------------------------------------------


def test_several_checkpoints_with_mean_median_and_deviation(place, tmp_path, capsys):
    data = place / "bins" / "MNLI-bin"
    other = train(data, tmp_path / "other", 3, "--separator-token", "2", "--seed", "8")
    scored = tmp_path / "scores.json"
    capsys.readouterr()
    flags = ["--data-dir", str(data), "--checkpoint", checkpoint(place, "MNLI"), str(other), "--cpu"]
    assert evaluate.main([*flags, "--json", str(scored)]) == 0
    result = json.loads(scored.read_text())["splits"]
    assert list(result) == ["valid", "valid1"]
    runs = [run["accuracy"] for run in result["valid"]["runs"].values()]
    assert result["valid"]["summary"]["mean"]["accuracy"] == pytest.approx(np.mean(runs))
    assert result["valid"]["summary"]["standard deviation"]["accuracy"] == pytest.approx(np.std(runs, ddof=1))
    said = capsys.readouterr().out
    assert re.search(r"^mean +\d+\.\d\d$", said, re.MULTILINE) and "MNLI valid1, 30 rows" in said


# Metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_equal_those_of_scikit_learn_and_scipy():
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import f1_score, matthews_corrcoef

    draw = np.random.default_rng(0)
    for classes in (2, 3):
        predicted, gold = (draw.integers(0, classes, 200).astype(str) for _ in range(2))
        assert metrics.matthews(predicted, gold) == pytest.approx(100 * matthews_corrcoef(gold, predicted))
    predicted, gold = (draw.integers(0, 2, 200).astype(str) for _ in range(2))
    assert metrics.f1(predicted, gold) == pytest.approx(100 * f1_score(gold, predicted, pos_label="1"))
    assert metrics.acc_and_f1(predicted, gold) == (metrics.accuracy(predicted, gold) + metrics.f1(predicted, gold)) / 2
    first, second = draw.integers(0, 9, 100) / 2.0, draw.normal(size=100)
    assert metrics.pearson(first, second) == pytest.approx(100 * pearsonr(first, second)[0])
    assert metrics.spearman(first, second) == pytest.approx(100 * spearmanr(first, second)[0])


def test_metrics_of_degenerate_predictions():
    none, some = np.array(["0", "0"]), np.array(["0", "1"])
    assert metrics.f1(none, none) == 0.0
    assert metrics.matthews(none, some) == 0.0
    assert np.isnan(metrics.pearson(np.ones(3), np.arange(3.0)))


# Broken input -----------------------------------------------------------------------------------------------------


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
    assert "cannot be loaded as a checkpoint" in says(write(tmp_path / "text.pt", "no checkpoint"))
    cut = tmp_path / "cut.pt"
    cut.write_bytes(Path(checkpoint(place, "RTE")).read_bytes()[:3000])
    assert "cannot be loaded as a checkpoint" in says(cut)
    assert "gives 3 outputs, and RTE has 2" in says(checkpoint(place, "MNLI"))
    assert "classes 1, 0" in says(checkpoint(place, "MRPC"))  # as many classes, but others
    assert "--split is 'dev'; " in says(checkpoint(place, "RTE"), "--split", "dev")
    assert "--max-tokens is '0'" in says(checkpoint(place, "RTE"), "--max-tokens", "0")
    assert not (tmp_path / "out").exists()


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
    import shutil

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


def test_probabilities_feed_the_analysis_of_agreement(place, tmp_path, capsys):
    from smart_fairseq.commands import agreement

    flags = ["--data-dir", str(place / "bins" / "MNLI-bin"), "--out", str(tmp_path), "--cpu", "--split", "valid"]
    assert predict.main(["--checkpoint", checkpoint(place, "MNLI"), *flags, "--probabilities"]) == 0
    file = tmp_path / "MNLI.valid.tsv"
    assert agreement.main(["--data-dir", str(place / "glue"), "--predictions", str(file)]) == 0
    assert re.search(r"^MNLI.valid +4/1/0 +20 ", capsys.readouterr().out, re.MULTILINE)
