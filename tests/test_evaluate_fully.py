"""The command evaluate with --full and what goes with it, on tiny models."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import checkpoint, make_gpt2_bpe, make_place, train, write

from smart_fairseq.commands import evaluate
from smart_fairseq.data.bpe import find_bpe
from smart_fairseq.evaluation import report
from smart_fairseq.evaluation.full import RADII, divergence, evaluate_model
from smart_fairseq.evaluation.labels import write_shares
from smart_fairseq.inference import Model
from smart_fairseq.study.scores import all_scores


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Official files, data folders and checkpoints; two of RTE."""
    place = make_place(tmp_path_factory.mktemp("full"), ("RTE", "MRPC", "STS-B", "MNLI"))
    other = ["--separator-token", "2", "--seed", "8"]
    train(place / "bins" / "RTE-bin", place / "checkpoints" / "RTE-other", 2, *other)
    return place


def data_of(place: Path, name: str) -> list[str]:
    return ["--data-dir", str(place / "bins" / f"{name}-bin"), "--cpu"]


def test_divergence_by_hand():
    """Of (1/2, 1/2) and (9/10, 1/10) 0.4 log 9; of single outputs 3 and 1 their squared difference."""
    one, other = np.log([[0.5, 0.5], [0.5, 0.5]]), np.log([[0.9, 0.1], [np.nan, 0.5]])
    np.testing.assert_allclose(divergence(one, other), [0.4 * np.log(9), np.nan])  # a row that was not attacked
    np.testing.assert_array_equal(divergence(np.array([[3.0]]), np.array([[1.0]])), [4])


def test_everything_of_two_checkpoints(place, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    models = [checkpoint(place, "RTE"), checkpoint(place, "RTE-other")]
    more = ["--attack-rows", "9", "--typos", "--bpe-dir", str(place / "bpe")]
    more += ["--outputs", str(tmp_path / "new" / "o.npz")]
    more += ["--picture", str(tmp_path / "p"), "--json", str(tmp_path / "j.json")]
    assert evaluate.main([*data_of(place, "RTE"), "--checkpoint", *models, *more]) == 0
    said = capsys.readouterr().out
    assert "RTE valid, 15 rows; intervals: bootstrap, 2000 samples of rows" in said
    assert re.search(r"^metric +A +95 % interval +B +95 % interval +B - A +95 % interval$", said, re.MULTILINE)
    assert re.search(
        r"^A is .*; temperature [\d.]+, fitted .*; attack: 10 steps, 9 rows; typing errors: in 15 of 15",
        said,
        re.MULTILINE,
    )
    found = json.loads((tmp_path / "j.json").read_text())["valid"]
    assert list(found) == models
    first, other = found.values()
    for name in ("cross entropy", "cross entropy, other half, calibrated", "accuracy, attack at 30 %", "sensitivity"):
        values = [run["metrics"][name]["value"] for run in (first, other)]
        between = other["difference to the first"][name]
        assert between["value"] == pytest.approx(values[1] - values[0])
        assert between["interval"][0] <= between["value"] <= between["interval"][1]
    metrics = first["metrics"]
    assert metrics["cross entropy, fairseq's unit"]["value"] == pytest.approx(
        metrics["cross entropy"]["value"] / np.log(2)
    )
    # what the table says follows from what was kept
    with np.load(tmp_path / "new" / "o.npz") as kept:
        assert kept["valid.ids"].tolist() == [str(number) for number in range(15)]
        gold, logits = kept["valid.0.gold"], kept["valid.0.logits"]
        np.testing.assert_allclose(kept["valid.0.probabilities"], np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
        assert metrics["accuracy"]["value"] == pytest.approx(100 * (logits.argmax(1) == gold).mean())
        study = all_scores(logits, gold, [], ["0", "1"], seed=1)
        for name, same in (("cross entropy", "cross_entropy"), ("calibration error", "calibration_error")):
            assert metrics[f"{name}, other half, calibrated"]["value"] == pytest.approx(study[f"{same}_scaled"])
        attacked = kept["valid.0.attack_loss"]
        assert attacked.shape == (len(RADII), 15, 2)
        chosen = np.isfinite(attacked[0, :, 0])
        assert chosen.sum() == 9
        before = metrics["accuracy, attacked rows before"]["value"]
        assert before == pytest.approx(100 * (logits.argmax(1) == gold)[chosen].mean())
        right = attacked[-1, chosen].argmax(1) == gold[chosen]
        assert metrics["accuracy, attack at 30 %"]["value"] == pytest.approx(100 * right.mean())
        assert kept["valid.1.typos"].shape == (15, 2) and (kept["valid.1.typos"] != kept["valid.1.logits"]).any()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"new", "j.json", "p-valid-reliability.png", "p-valid-attack.png"}


def test_without_the_new_options_all_is_as_before(place, capsys):
    assert evaluate.main([*data_of(place, "RTE"), "--checkpoint", checkpoint(place, "RTE")]) == 0
    accuracy = re.search(r"^/.* +([\d.]+)$", capsys.readouterr().out, re.MULTILINE)[1]
    assert evaluate.main([*data_of(place, "RTE"), "--checkpoint", checkpoint(place, "RTE"), "--full"]) == 0
    said = capsys.readouterr().out
    assert float(re.search(r"^accuracy \(%\) +([\d.]+)", said, re.MULTILINE)[1]) == pytest.approx(float(accuracy))
    assert "attack" not in said and "typing" not in said


@pytest.mark.parametrize("name", ["MRPC", "STS-B", "MNLI"])
def test_official_metrics_are_those_of_the_plain_command(place, tmp_path, name):
    results = []
    for flags in ([], ["--full"]):
        file = tmp_path / f"{len(results)}.json"
        flags = [*flags, "--json", str(file), "--split", "valid", "--checkpoint", checkpoint(place, name)]
        assert evaluate.main([*data_of(place, name), *flags]) == 0
        results.append(json.loads(file.read_text()))
    plain = next(iter(results[0]["splits"]["valid"]["runs"].values()))
    full = next(iter(results[1]["valid"].values()))["metrics"]
    assert {metric: full[metric]["value"] for metric in plain} == pytest.approx(plain, abs=1e-4)


def test_regression(place):
    data = place / "bins" / "STS-B-bin"
    model = Model(Path(checkpoint(place, "STS-B")), data, cpu=True)
    found = evaluate_model(model, data, attack=True, typos=find_bpe(None, place / "bpe"), resamples=50)
    gold, scores = found["arrays"]["gold"], found["arrays"]["probabilities"][:, 0]
    # in the file's units, 0 to 5
    assert found["metrics"]["mean squared error"]["value"] == pytest.approx(25 * ((scores - gold) ** 2).mean())
    assert found["metrics"]["mean error"]["value"] == pytest.approx(5 * (scores - gold).mean())
    fitted_on, rest = np.split(np.random.default_rng(1).permutation(len(gold)), [len(gold) // 2])
    slope, offset = np.polyfit(scores[fitted_on], gold[fitted_on], 1)
    calibrated = 25 * ((slope * scores + offset - gold)[rest] ** 2).mean()
    assert found["metrics"]["mean squared error, other half, calibrated"]["value"] == pytest.approx(calibrated)
    errors = [found["metrics"][f"mean squared error, attack at {100 * radius:g} %"]["value"] for radius in RADII]
    assert found["metrics"]["mean squared error"]["value"] < errors[0] and errors == sorted(errors)
    assert (found["line"]["slope"], found["line"]["offset"]) == pytest.approx((slope, offset))
    study = all_scores(found["arrays"]["logits"], gold, [], [], seed=1)  # in the unit of training
    assert 25 * study["squared_error_scaled"] == pytest.approx(calibrated)
    assert "temperature" not in found and "mean squared error, typing errors" in found["metrics"]
    change = (found["arrays"]["attack_random"][0, :, 0] - scores) ** 2
    assert found["metrics"]["sensitivity, random signs"]["value"] == pytest.approx(change.mean() / 1e-4)


def test_a_picture_of_a_regression(place, tmp_path, monkeypatch):
    """A panel for each checkpoint, its points the outputs against the labels, in the labels' unit."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    found = evaluate_model(Path(checkpoint(place, "STS-B")), place / "bins" / "STS-B-bin", resamples=50)
    assert "straight line" in report.notes(found)[0]
    figures, save = [], report.save
    monkeypatch.setattr(report, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    (path,) = report.draw({"one": found, "other": found}, tmp_path / "p")
    assert path == tmp_path / "p-outputs.png" and path.read_bytes().startswith(b"\x89PNG")
    assert figures[0].number not in pyplot.get_fignums()
    points = [axis.collections[0].get_offsets() for axis in figures[0].axes]
    expected = 5 * np.stack([found["arrays"]["gold"], found["arrays"]["logits"][:, 0]], 1)
    np.testing.assert_allclose(points, [expected, expected])


def test_a_study_gets_the_same_at_every_call_and_from_a_path(place):
    data, path = place / "bins" / "RTE-bin", Path(checkpoint(place, "RTE"))
    torch.set_num_threads(2)
    one = evaluate_model(path, data, attack=True, attack_rows=4, resamples=50)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    other = evaluate_model(Model(path, data, cpu=True), data, attack=True, attack_rows=4, resamples=50)
    assert json.dumps(one["metrics"]) == json.dumps(other["metrics"])
    assert one["resampled"]["accuracy"].shape == (51,)
    assert evaluate_model(path, data, resamples=50, seed=2)["metrics"] != one["metrics"]


def test_annotators_of_a_data_folder(place, tmp_path):
    import shutil

    data = tmp_path / "RTE-bin"
    shutil.copytree(place / "bins" / "RTE-bin", data)
    model = Model(Path(checkpoint(place, "RTE")), data, cpu=True)
    write_shares(data, "valid", model.classes, np.full((15, 2), 0.5))
    found = evaluate_model(model, data, resamples=50)
    logs = np.log(found["arrays"]["probabilities"])
    assert found["metrics"]["divergence from annotators"]["value"] == pytest.approx((np.log(0.5) - logs.mean(1)).mean())


def test_annotators_of_official_files(place, tmp_path):
    """Four of five for one label or three, one or two for the next, as the files have them."""
    flags = ["--data-dir", str(place / "glue"), "--task", "MNLI", "--bpe-dir", str(place / "bpe"), "--cpu"]
    flags += ["--split", "valid", "--outputs", str(tmp_path / "o.npz"), "--json", str(tmp_path / "j.json"), "--typos"]
    assert evaluate.main([*flags, "--checkpoint", checkpoint(place, "MNLI")]) == 0
    found = next(iter(json.loads((tmp_path / "j.json").read_text())["valid"].values()))
    shares = np.zeros((30, 3))
    lines = (place / "glue" / "MNLI" / "dev_matched.tsv").read_text().split("\n")[1:31]
    for row, line in zip(shares, lines):
        for vote in line.split("\t")[3:8]:
            row[found["classes"].index(vote)] += 0.2
    with np.load(tmp_path / "o.npz") as kept:
        logs = np.log(kept["valid.0.probabilities"])
    expected = np.where(shares > 0, shares * (np.log(np.maximum(shares, 1e-9)) - logs), 0).sum(1).mean()
    assert found["metrics"]["divergence from annotators"]["value"] == pytest.approx(expected)


def refused(capsys, *flags: str) -> str:
    capsys.readouterr()
    assert evaluate.main(list(flags)) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert not said.out  # nothing was run for it
    assert len(lines) == 1 and lines[0].startswith("evaluate: error: "), lines
    return lines[0]


def test_flags_that_do_not_fit(place, tmp_path, capsys):
    data, model = data_of(place, "RTE"), ["--checkpoint", checkpoint(place, "RTE")]
    assert "--full needs --checkpoint" in refused(capsys, *data, "--full", "--predictions", "p.tsv")
    assert "names one twice" in refused(capsys, *data, *model, *model, "--full")
    assert "names one twice" in refused(capsys, *data, *model, *model)
    assert "--typos needs --bpe-dir" in refused(capsys, *data, *model, "--typos")
    assert "--attack-rows is '0'" in refused(capsys, *data, *model, "--attack-rows", "0")
    assert "--seed is 'x'" in refused(capsys, *data, *model, "--full", "--seed", "x")
    other = make_gpt2_bpe(tmp_path / "bpe")
    write(other / "dict.txt", *reversed((other / "dict.txt").read_text().splitlines()))
    line = refused(capsys, *data, *model, "--typos", "--bpe-dir", str(other))
    assert "dict.txt: differs from" in line and "give the --bpe-dir of preprocess" in line


def test_pictures_need_matplotlib_before_the_work(place, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    model = ["--checkpoint", checkpoint(place, "RTE"), "--picture", "p"]
    assert "--picture needs matplotlib" in refused(capsys, *data_of(place, "RTE"), *model)
