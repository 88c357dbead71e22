"""A study's runs under attack: what is stored, by which key, and that nothing changes for plans without it."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from study_samples import PLAN, keys, write_data, write_fake, write_plan
from toolkit import ROOT, error_line

from smart_fairseq.encoder import Forward, encoder_of
from smart_fairseq.evaluation.attack import PLACE, attack
from smart_fairseq.evaluation.calibration import fit_temperature
from smart_fairseq.inference import Model
from smart_fairseq.study import studying
from smart_fairseq.study.__main__ import main
from smart_fairseq.study.attacked import Attack, scores_under_attack
from smart_fairseq.study.lines import read_lines, write_lines
from smart_fairseq.study.plan import read_plan
from smart_fairseq.study.rows import Source

ATTACK = "attack: {{radii: [0.1, 1], rows: 7}}\n"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studying, "WORKER", (sys.executable, str(write_fake(tmp_path))))


# Keys


def test_the_key_of_a_run_without_attack_is_what_it_was(tmp_path: Path) -> None:
    """The first 16 digits of the SHA-256 of settings, data and encoder, in which nothing speaks of attacks."""
    plan = write_plan(tmp_path, write_data(tmp_path / "data"))
    study = studying.Study(read_plan(plan))
    asked = study.plan.runs()[0]
    settings = {
        "task": "letters",
        "method": "plain",
        "variant": {},
        "seed": 1,
        "draw": {"rows": 12, "stratified": False, "flip": 0.0, "evaluate": None},
        "flags": dict(sorted(asked.flags.items())),
        "epochs": 2.0,
        "warmup": 0.1,
    }
    assert asked.settings() == settings and asdict(asked.task.draw) == settings["draw"]
    assert study.key(asked) == studying._short([settings, study.data["letters"], study.encoders[None]])


@pytest.mark.parametrize("name", ["movie", "compare", "movie-300"])
def test_committed_lines_are_found_by_their_plans(name: str) -> None:
    """Every one whose method and seed the plan still has."""
    plan = read_plan(ROOT / "benchmarks" / "studies" / f"{name}.yaml", files=False)
    lines = read_lines(ROOT / plan.out / "runs.jsonl")
    found = studying.lines_of(plan)
    assert {line["key"] for line in found} <= {line["key"] for line in lines} and len(found) > 5
    asked = {studying._short(run.settings()) for run in plan.runs()}
    assert len(found) == len({studying._short(studying._settings(line)) for line in lines} & asked)


def test_an_attack_is_in_the_key_of_the_runs_that_it_is_for(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    before = keys(write_plan(tmp_path, data))
    after = keys(write_plan(tmp_path, data, PLAN + ATTACK))
    other = keys(write_plan(tmp_path, data, PLAN + ATTACK.replace("7", "8")))
    assert not set(before.values()) & set(after.values()) and not set(after.values()) & set(other.values())
    some = keys(write_plan(tmp_path, data, PLAN + ATTACK.replace("7", "7, methods: [smart], seeds: [2]")))
    assert some == {**before, "letters-smart-seed2": after["letters-smart-seed2"]}


@pytest.mark.usefixtures("fake")
def test_runs_are_attacked_once_and_found_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An attack that is added runs what it is for anew; its lines are then taken, and without it the old ones are."""
    data = write_data(tmp_path / "data")
    plain, attacked = write_plan(tmp_path / "a", data), tmp_path / "a" / "attacked.yaml"
    assert main([str(plain), "--jobs", "1"]) == 0
    attacked.write_text(plain.read_text() + ATTACK.format().replace("7}", "7, seeds: [1]}"))
    capsys.readouterr()
    for done in (2, 4):
        assert main([str(attacked), "--jobs", "1"]) == 0
        assert f"study: 4 runs, {done} done before" in capsys.readouterr().out
    lines = studying.lines_of(read_plan(attacked))
    assert [line.get("attack") for line in lines] == [{"radii": [0.1, 1.0], "rows": 7}] * 2 + [None] * 2
    # class 0 has rows 0, 2, 4 and 6 of the first 7
    assert lines[0]["metrics"]["accuracy_attack_10%"] == pytest.approx(100 * 4 / 7)
    assert "accuracy attack 10%" in (tmp_path / "a" / "out" / "report.md").read_text()
    assert [line.get("attack") for line in studying.lines_of(read_plan(plain))] == [None] * 4
    path = tmp_path / "a" / "out" / "runs.jsonl"
    before = read_lines(path)
    write_lines(path, [{**line, "metrics": {"accuracy": 0.0}} for line in before])
    for plan in (attacked, plain):
        assert main([str(plan), "--rescore"]) == 0
    assert read_lines(path) == before


@pytest.mark.usefixtures("fake")
def test_logits_that_were_not_attacked_are_named(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "a", write_data(tmp_path / "data"), PLAN + ATTACK)
    assert main([str(plan), "--jobs", "1"]) == 0
    study = studying.Study(read_plan(plan))
    logits = study.logits(study.key(study.plan.runs()[0]))
    np.savez(logits, logits=np.zeros((22, 2)), labels=np.zeros(22, np.int64))
    with pytest.raises(Exception, match="the logits of letters-plain-seed1 cannot be read; remove its line"):
        study.rescore()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("[0.1]", "attack is '[0.1]'; it must be a mapping"),
        ("{{rows: 7}}", "attack: radii is 'None'; it must be a list of rising shares"),
        ("{{radii: [0.3, 0.1]}}", "attack: radii is '[0.3, 0.1]'; it must be a list of rising shares"),
        ("{{radii: [0.1, 0.1]}}", "it must be a list of rising shares, above 0 and up to 1"),
        ("{{radii: [0]}}", "attack: radii is '[0]'"),
        ("{{radii: [2]}}", "attack: radii is '[2]'"),
        ("{{radii: [a]}}", "attack: radii is"),
        ("{{radii: []}}", "attack: radii is '[]'"),
        ("{{radii: [0.1], rows: 0}}", "attack: rows is '0'; it must be a whole number from 1"),
        ("{{radii: [0.1], seeds: [3]}}", "attack: seeds is '[3]'; it must be a list of 1, 2"),
        ("{{radii: [0.1], methods: [smooth]}}", "it must be a list of plain, smart"),
        ("{{radii: [0.1], steps: 3}}", "attack: unknown key 'steps'; known are radii, rows, methods, seeds"),
    ],
)
def test_bad_attacks_are_refused_before_any_run(
    given: str, expected: str, tmp_path: Path, study_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write_plan(tmp_path, study_data, PLAN + f"attack: {given}\n")
    assert expected in error_line("study", main, [plan], capsys)
    assert not (tmp_path / "work").exists()


def test_the_attack_of_the_documents_is_one(tmp_path: Path) -> None:
    plan, block = (ROOT / "docs" / "study.md").read_text(encoding="utf-8").split("```yaml\n")[1:3]
    (tmp_path / "movie.yaml").write_text(plan.partition("```")[0] + block.partition("```")[0])
    runs = read_plan(tmp_path / "movie.yaml", files=False).runs()
    assert {str(asked.attack) for asked in runs} == {str(Attack([0.01, 0.03], 256)), "None"}
    assert {asked.seed for asked in runs if asked.attack} == {1, 2}


def test_against_is_for_reports(tmp_path: Path, study_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line("study", main, [write_plan(tmp_path, study_data), "--against", "smart"], capsys)
    assert "--against is smart without --report or --into" in line
    line = error_line("study", main, [write_plan(tmp_path, study_data), "--report", "--rescore"], capsys)
    assert "--rescore beside --report or --into" in line


# What is stored


def test_scores_by_hand() -> None:
    """Rows 1 and 3 of 4, right without attack; at 10 % one of them is wrong."""
    clean = np.eye(2)[[0, 1, 0, 0]]
    stored = {
        "logits": clean,
        "labels": np.array([1, 1, 1, 0]),
        "attack_rows": np.array([1, 3]),
        "attack_radii": np.array([0.01, 0.1]),
        "attack_loss": np.stack([clean[[1, 3]], clean[[1, 1]]]),
        "attack_random": np.stack([clean[[1, 3]], clean[[1, 3]]]),
    }
    assert scores_under_attack(stored) == {
        "accuracy_attack_0%": 100,
        "accuracy_attack_1%": 100,
        "accuracy_attack_10%": 50,
        "accuracy_random_1%": 100,
        "accuracy_random_10%": 100,
    }
    targets = {"labels": np.array([0.5, 0.5], np.float32), "logits": np.array([[0.5], [1.0]])}
    moved = {"attack_loss": np.array([[[2.5]]]), "attack_random": np.array([[[1.5]]])}
    rows = {"attack_rows": np.array([1]), "attack_radii": np.array([0.03])}
    assert scores_under_attack({**targets, **moved, **rows}) == {
        "squared_error_attack_0%": 0.25,
        "squared_error_attack_3%": 4.0,
        "squared_error_random_3%": 1.0,
    }


def test_an_attack_on_its_way_to_the_worker() -> None:
    asked = Attack([0.01, 0.1], 7)
    assert Attack(**json.loads(json.dumps(asdict(asked)))) == asked


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classes", "regression"])
def test_a_run_is_attacked_before_its_checkpoint_goes(kind: str, tmp_path: Path) -> None:
    """As `evaluation.attack` does it on the same rows from the same start; it does harm, more than random signs."""
    data = write_data(tmp_path / "data", kind=kind, valid=40)
    text = PLAN.replace("epochs: 2", "epochs: 30, lr: 1e-2").replace("[1, 2]", "[1]") + "keep: true\n"
    text = text.replace("lr: 1e-3, ", "").replace("smart-weight: 0", "smart-weight: 1")
    plan = write_plan(tmp_path, data, text + ATTACK.replace("7", "30"))
    assert main([str(plan), "--jobs", "2"]) == 0
    study = studying.Study(read_plan(plan))
    stored: list[Any] = []
    for asked in study.plan.runs():
        with np.load(study.logits(study.key(asked))) as file:
            stored.append(dict(file))
        rows, radii = stored[-1]["attack_rows"], stored[-1]["attack_radii"]
        assert len(rows) == 30 and rows.tolist() == stored[0]["attack_rows"].tolist(), "the same for both methods"
        checkpoint = tmp_path / "work" / "checkpoints" / asked.name / "checkpoint_last.pt"
        folder = study.folder(asked)
        model, labels = Model(checkpoint, folder), Source(folder).labels("valid")
        logits = model.predict("valid", 4096).logits
        np.testing.assert_array_equal(logits, stored[-1]["logits"])
        temperature, half = 1.0, np.random.default_rng(1).permutation(len(labels))[: len(labels) // 2]
        if kind == "classes":
            temperature = fit_temperature(logits[half].astype(float), labels[half])
        ((order, sample),) = model.samples("valid", 10_000, rows)
        forward = Forward(encoder_of(model.model), model.model, sample["net_input"], model.head, PLACE)
        gold = torch.from_numpy(labels[order] if kind == "classes" else labels[order].astype(np.float32)[:, None])
        tokens, back = sample["net_input"]["src_tokens"], np.argsort(order)
        found = attack(forward, tokens, torch.tensor(order), gold, radii, temperature)
        for name in ("loss", "random"):
            expected = found[name].numpy()[:, back]
            np.testing.assert_allclose(stored[-1][f"attack_{name}"], expected, rtol=1e-3, atol=1e-4)
    (line, _) = read_lines(tmp_path / "out" / "runs.jsonl")
    metrics, name = line["metrics"], "accuracy" if kind == "classes" else "squared_error"
    attacked, random, clean = (metrics[f"{name}_{at}"] for at in ("attack_100%", "random_100%", "attack_0%"))
    assert attacked < min(random, clean) if kind == "classes" else attacked > max(random, clean)
    assert line["attack"] == {"radii": [0.1, 1.0], "rows": 30} and np.isfinite(list(metrics.values())).all()
