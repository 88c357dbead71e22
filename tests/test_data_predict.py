"""From a checkpoint to submission files and scores, and back to what fairseq-validate logs."""

import argparse
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from data_samples import ROOT, checkpoint, make_anli, make_place, train
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import validate
from toolkit import USER_DIR, capture_log, error_line

from smart_fairseq.commands import evaluate, predict
from smart_fairseq.commands.preprocess import anli_main
from smart_fairseq.data.tasks import GLUE, NLI_LABELS, TASKS
from smart_fairseq.evaluation import metrics
from smart_fairseq.inference import Model, Predictions, batches


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("predict"))


def table(path: Path):
    return [line.split("\t") for line in path.read_text().splitlines()]


# Round trip -------------------------------------------------------------------------------------------------------


def fairseq_validate(*arguments):
    """What the program logs of the set, as its cli_main runs it."""
    parsers = [options.get_validation_parser() for _ in range(2)]
    args, given = (
        options.parse_args_and_arch(parser, input_args=list(arguments), suppress_defaults=bare)
        for parser, bare in zip(parsers, (False, True))
    )
    with capture_log() as log, pytest.MonkeyPatch.context() as patch:
        patch.setattr(validate, "reset_logging", lambda: None)  # it takes away who listens
        validate.main(convert_namespace_to_omegaconf(args), override_args=given)
    (line,) = log["valid"]
    return {key.removeprefix("valid_"): value for key, value in line.items()}


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
    fairseqs = fairseq_validate(
        *(str(data), "--user-dir", USER_DIR, "--path", checkpoint(place, name), "--task", "sentence_prediction"),
        *("--valid-subset", "valid", "--criterion", "sentence_prediction", "--batch-size", "5", "--cpu"),
        # otherwise fairseq leaves the last batch out, without a word
        *("--log-format", "json", "--num-workers", "0", "--required-batch-size-multiple", "1"),
    )
    out = tmp_path / "out"
    flags = ["--data-dir", str(data), "--cpu"]
    assert predict.main([*flags, "--checkpoint", checkpoint(place, name), "--split", "valid", "--out", str(out)]) == 0
    file = out / f"{name}.valid.tsv"
    scored = tmp_path / "scores.json"
    file = file.rename(tmp_path / "with, a comma.tsv")
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


@pytest.mark.slow
def test_as_a_program_it_predicts_the_same(place, tmp_path):
    """A program registers what the checkpoint needs by itself, and fairseq says nothing while it loads."""
    flags = ["--checkpoint", checkpoint(place, "MRPC"), "--data-dir", str(place / "bins" / "MRPC-bin")]
    flags += ["--split", "valid", "--cpu"]
    script = str(ROOT / "examples" / "glue" / "predict.py")
    command = [sys.executable, script, *flags, "--out", str(tmp_path / "program")]
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
    # what is not for the server leaves its zip alone
    assert predict.main(["--checkpoint", *checkpoints[:1], *flags, "--split", "valid"]) == 0
    assert "submission.zip" not in capsys.readouterr().out
    # a later run adds to it; baselines only when asked for
    checkpoints = [f"RTE={checkpoint(place, 'RTE')}"]
    assert predict.main(["--checkpoint", *checkpoints, *flags, "--fill-missing", "majority"]) == 0
    assert "WNLI.tsv: the majority baseline" in capsys.readouterr().out
    assert table(out / "RTE.tsv") == rte
    with zipfile.ZipFile(out / "submission.zip") as archive:
        assert len(archive.namelist()) == 11
    # and the next one knows them
    assert predict.main(["--checkpoint", *checkpoints, *flags]) == 0
    alike = re.search(r"one answer for all rows, as of a baseline, is in (.*)", capsys.readouterr().out)[1].split(", ")
    assert {"SST-2.tsv", "MRPC.tsv", "QQP.tsv", "QNLI.tsv", "WNLI.tsv"} <= set(alike)
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


def test_scores_for_the_server_are_clipped_and_others_are_not(tmp_path):
    found = Predictions(TASKS["STS-B"], "test", ["1", "0"], ["5.200000", "-0.100000"], np.zeros((2, 1)))
    assert table(predict.write_submission(found, tmp_path))[1:] == [["0", "0.000"], ["1", "5.000"]]
    assert table(predict.write_predictions(found, tmp_path))[1:] == [["1", "5.200000"], ["0", "-0.100000"]]


def test_ids_that_the_server_does_not_know_are_named_before_the_work(place, tmp_path, capsys):
    data = shutil.copytree(place / "bins" / "CoLA-bin", tmp_path / "CoLA-bin")
    ids = data / "ids" / "test.tsv"
    ids.write_text(ids.read_text().replace("\n1\t", "\nx1\t"))
    flags = ["--checkpoint", checkpoint(place, "CoLA"), "--data-dir", data, "--out", tmp_path / "out", "--cpu"]
    line = error_line("predict", predict.main, flags, capsys)
    assert f"{ids}: id 'x1' is no whole number" in line and not (tmp_path / "out").exists()


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


def test_a_run_whose_correlation_is_not_a_number_is_in_the_summary():
    """A constant has none; of the others median and deviation would be luck, so there is none of these either."""
    found = evaluate.summary([{"spearman": 40.0, "accuracy": 1.0}, {"spearman": np.nan, "accuracy": 3.0}])
    assert found["mean"]["accuracy"] == 2 and found["standard deviation"]["accuracy"] == pytest.approx(2**0.5)
    assert all(np.isnan(values["spearman"]) for values in found.values())
    assert "-" in evaluate.table(list(found.items()))


def test_only_the_rounds_of_anli_are_written_as_its_letters(tmp_path):
    """A task of the user's may be called ANLI-mine."""
    row = Predictions(TASKS["CoLA"], "valid", ["1"], ["1"], np.ones((1, 2)), ("1", "0"))

    class Known:
        def predict(self, split, max_tokens):
            return row

    options = argparse.Namespace(max_tokens=8, probabilities=False)
    (path,) = predict.predict_task("ANLI-mine", Known(), "valid", tmp_path, options)
    assert path.suffix == ".tsv" and table(path)[1] == ["1", "1"]


def test_held_out_rows_of_all_rounds_of_anli_are_written_by_id(tmp_path):
    (tmp_path / "preprocess.json").write_text('{"task": "ANLI", "rows": {"valid": 1}, "parts": {}}')
    row = Predictions(TASKS["ANLI-R1"], "valid", ["u1"], ["neutral"], np.ones((1, 3)), TASKS["ANLI-R1"].labels)
    known = argparse.Namespace(predict=lambda split, max_tokens: row, folder=tmp_path)
    options = argparse.Namespace(max_tokens=8, probabilities=False)
    (path,) = predict.predict_task("ANLI", known, "valid", tmp_path, options)
    assert path.suffix == ".tsv" and table(path)[1] == ["u1", "neutral"]


def test_metrics_equal_those_of_scikit_learn_and_scipy():
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    draw, value = np.random.default_rng(0), metrics.value_of
    for classes in (2, 3):
        predicted, gold = (draw.integers(0, classes, 200).astype(str) for _ in range(2))
        assert value("mcc", predicted, gold) == pytest.approx(100 * matthews_corrcoef(gold, predicted))
    predicted, gold = (draw.integers(0, 2, 200).astype(str) for _ in range(2))
    f1, accuracy = 100 * f1_score(gold, predicted, pos_label="1"), 100 * accuracy_score(gold, predicted)
    assert value("f1", predicted, gold) == pytest.approx(f1)
    assert value("acc_and_f1", predicted, gold) == pytest.approx((f1 + accuracy) / 2)
    first, second = draw.integers(0, 9, 100) / 2.0, draw.normal(size=100)
    assert value("pearson", first, second) == pytest.approx(100 * pearsonr(first, second)[0])
    assert value("spearman", first, second) == pytest.approx(100 * spearmanr(first, second)[0])


def test_metrics_of_degenerate_predictions():
    none, some = np.array(["0", "0"]), np.array(["0", "1"])
    assert metrics.value_of("f1", none, none) == 0.0
    assert metrics.value_of("mcc", none, some) == 0.0
    assert np.isnan(metrics.value_of("pearson", np.ones(3), np.arange(3.0)))


def test_probabilities_feed_the_analysis_of_agreement(place, tmp_path, capsys):
    from smart_fairseq.commands import agreement

    flags = ["--data-dir", str(place / "bins" / "MNLI-bin"), "--out", str(tmp_path), "--cpu", "--split", "valid"]
    assert predict.main(["--checkpoint", checkpoint(place, "MNLI"), *flags, "--probabilities"]) == 0
    file = tmp_path / "MNLI.valid.tsv"
    assert agreement.main(["--data-dir", str(place / "glue"), "--predictions", str(file)]) == 0
    assert re.search(r"^MNLI.valid +4/1/0 +20 ", capsys.readouterr().out, re.MULTILINE)
