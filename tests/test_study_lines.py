"""runs.jsonl with damage: one line that names file and line, from whatever reads it, and nothing of it is lost."""

import json
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import FORKS, join
from study_samples import study_of, write_fake, write_plan
from toolkit import error_line
from wnli_samples import prepared

import smart_fairseq
from smart_fairseq.study import studying
from smart_fairseq.study.__main__ import main
from smart_fairseq.study.lines import facts, lines_to_change, read_lines, write_lines
from smart_fairseq.study.plan import read_plan

PLAN = """
out: {folder}/out
work: {folder}/work
encoder: {{flags: {{{model}}}}}
train: {{batch-size: 4, lr: 1e-3, epochs: 1}}
tasks:
  letters: {{data: {data}, rows: 12}}
methods:
  plain: {{criterion: sentence_prediction, optimizer: adam}}
seeds: [1, 2, 3, 4]
"""
FACTS = {"commit": "abc", "torch": "2", "date": "2026-01-01"}


@pytest.fixture
def plan(tmp_path: Path, study_data: Path) -> Path:
    """A plan of four runs, three of which have lines."""
    path = write_plan(tmp_path, study_data, PLAN)
    study = studying.Study(read_plan(path))
    lines = []
    for asked in study.plan.runs()[:3]:
        numbers = {"metrics": {"accuracy": 50.0 + asked.seed}, "terms": {"task_loss": 0.5}}
        rows = {"rows": {"train": 12, "valid": 22}, "updates": 3}
        lines.append({"key": study.key(asked), **asked.settings(), **numbers, **rows, **FACTS})
    write_lines(study.jsonl, lines)
    return path


def edited(**changes: Any) -> Any:
    """The line with other values, without those that are None."""

    def edit(line: str) -> str:
        entries = {**json.loads(line), **changes}
        return json.dumps({name: value for name, value in entries.items() if value is not None})

    return edit


# what becomes of the second line, and what must be said of it
DAMAGED: dict[str, tuple[Any, str]] = {
    "cut": (lambda line: line[: len(line) // 2], r"\(Unterminated string|\(Expecting"),
    "empty": (lambda line: "", r"\(Expecting value\)"),
    "no JSON": (lambda line: "{key: 1}", r"\(Expecting property name"),
    "marks of a merge": (lambda line: "<<<<<<< HEAD\n" + line, r"\(Expecting value\)"),
    "two in one": (lambda line: line + line, r"\(Extra data\)"),
    "brackets": (lambda line: "[" * 10_000, r"\(nested too deeply\)"),
    "a list": (lambda line: f"[{line}]", r"\(a JSON list, and an object is needed\)"),
    "null": (lambda line: "null", r"\(a JSON NoneType, and"),
    "no key": (edited(key=None), r"\(no key 'key'\)"),
    "no metrics": (edited(metrics=None), r"\(no key 'metrics'\)"),
    "no terms": (edited(terms=None), r"\(no key 'terms'\)"),
    "no date": (edited(date=None), r"\(no key 'date'\)"),
    "metrics in a list": (edited(metrics=[50.0]), r"\(key 'metrics' holds list\)"),
    "a seed in words": (edited(seed="two"), r"\(key 'seed' holds str\)"),
    "a metric in words": (edited(metrics={"accuracy": "high"}), r"\(a word where a number is needed\)"),
    "a term in words": (edited(terms={"task_loss": "low"}), r"\(a word where a number is needed\)"),
    "seconds in words": (edited(seconds_per_update="1 s"), r"\(a word where a number is needed\)"),
    "rows without valid": (edited(rows={"train": 12}), r"\('rows' or 'draw' lacks a part\)"),
    "a key twice": (lambda line: line.replace('"seed": 2', '"seed": 2, "seed": 3'), r"\(key 'seed' twice\)"),
    "a metric twice": (
        lambda line: line.replace('"accuracy": 52.0', '"accuracy": 52.0, "accuracy": 60.0'),
        r"\(key 'accuracy' twice\)",
    ),
    "half a surrogate pair": (lambda line: line.replace("abc", r"\ud800"), r"\('utf-8' codec.*surrogates"),
    "latin-1": (lambda line: line.replace("abc", "\xe9"), r"\('utf-8' codec can't decode byte 0xe9"),
}
WAYS = [["--report"], ["--rescore"], ["--dry-run"], [], ["--into", "page.md"]]


def refused(plan: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line; every file stays as it was."""

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in plan.parent.rglob("*") if path.is_file() and path.name != "lock"}

    before = files()
    line = error_line("study", main, [plan, *flags], capsys)
    assert files() == before
    return line


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_line_is_named(kind: str, plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, reason = DAMAGED[kind]
    path = plan.parent / "out" / "runs.jsonl"
    first, second, third = path.read_text().splitlines()
    encoding = "latin-1" if kind == "latin-1" else "utf-8"
    path.write_text("\n".join([first, damage(second), third]) + "\n", encoding=encoding)
    expected = rf"study: error: {re.escape(str(path))}:2: is not the line of a run .*; remove it, and its run is rep"
    line = refused(plan, capsys, "--report")
    assert re.match(expected, line) and re.search(reason, line), line


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_whatever_reads_the_lines_refuses_them(way: list[str], plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A write that was cut short by another program: the last line's end is missing."""
    path = plan.parent / "out" / "runs.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path}:3: is not the line of a run (" in refused(plan, capsys, *way)


def test_a_run_with_two_lines_is_named(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two copies of a file put together: which of the two numbers counts is for the reader to say."""
    path = plan.parent / "out" / "runs.jsonl"
    key = json.loads(path.read_text().splitlines()[1])["key"]
    path.write_text(path.read_text() + edited(metrics={"accuracy": 99.0})(path.read_text().splitlines()[1]) + "\n")
    expected = f"{path}:4: is about the run '{key}' of line 2 again; remove one of the two"
    for way in WAYS[:3]:
        assert expected in refused(plan, capsys, *way)


def test_lines_that_are_in_order(plan: Path) -> None:
    """A number that is not finite comes back; a file without lines has none."""
    path = plan.parent / "out" / "runs.jsonl"
    lines = read_lines(path)
    assert [line["seed"] for line in lines] == [1, 2, 3]
    write_lines(path, [{**lines[0], "metrics": {"accuracy": float("nan")}}])
    assert np.isnan(read_lines(path)[0]["metrics"]["accuracy"]) and "NaN" not in path.read_text()
    path.write_text("")
    assert read_lines(path) == []


# Two studies that write to one file


def test_a_line_that_is_written_meanwhile_stays(plan: Path, tmp_path: Path) -> None:
    """A study whose run has ended waits for a program that has read the lines and will write them."""
    path = plan.parent / "out" / "runs.jsonl"
    process = FORKS.Process(target=study_of, args=(plan, write_fake(tmp_path)))
    with lines_to_change(path) as lines:
        process.start()
        while not list(plan.parent.glob("work/logits/*.npz")) and process.is_alive():
            time.sleep(0.02)
        time.sleep(0.5)  # without a lock it would be done by now
        lines.append({**lines[0], "key": "other"})
    assert join([process], timeout=60) == [0]
    assert [(line["seed"], line["key"] == "other") for line in read_lines(path)] == [
        *((seed, False) for seed in (1, 2, 3)),
        (1, True),
        (4, False),
    ]


def test_a_run_that_two_studies_have_done_has_one_line(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studying, "WORKER", (sys.executable, str(write_fake(tmp_path))))
    study, made = studying.Study(read_plan(plan)), studying.Study.line

    def line(study: studying.Study, *given: Any) -> Any:
        """The other one writes its line first."""
        found = made(study, *given)
        with lines_to_change(study.jsonl) as lines:
            lines.append({**found, "host": "another"})
        return found

    monkeypatch.setattr(studying.Study, "line", line)
    assert study.go(1) == []
    assert [line["seed"] for line in read_lines(study.jsonl)] == [1, 2, 3, 4]


def test_a_line_that_is_written_while_others_are_scored_anew_stays(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = studying.Study(read_plan(plan))

    def metrics(study: studying.Study, asked: Any, key: str) -> dict[str, float]:
        """Another study's run ends."""
        lines = read_lines(study.jsonl)
        write_lines(study.jsonl, [*lines, {**lines[0], "key": f"other {asked.seed}"}])
        return {"accuracy": 0.0}

    monkeypatch.setattr(studying.Study, "metrics", metrics)
    assert study.rescore() == 3
    found = [(line["key"].split(" ")[0] == "other", line["metrics"]) for line in read_lines(study.jsonl)]
    assert found == [(False, {"accuracy": 0.0})] * 3 + [(True, {"accuracy": 51.0})] * 3


def test_the_commit_is_the_packages_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed within a repository that does not track it, it has none; where it is tracked, that one's."""
    package = tmp_path / "venv" / "smart_fairseq" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.touch()
    monkeypatch.setattr(smart_fairseq, "__file__", str(package))

    def git(*command: str) -> str:
        settings = ["-c", "user.name=a", "-c", "user.email=b", "-c", "commit.gpgsign=false"]
        call = ["git", *settings, *command]
        return subprocess.run(call, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "someone's own")
    assert facts()["commit"] == ""
    git("add", ".")
    git("commit", "-m", "with the package")
    assert facts()["commit"] == git("rev-parse", "--short", "HEAD")
    package.write_text("other")
    assert facts()["commit"].endswith(" and changes")


@pytest.mark.parametrize("part", ["node", "processor", "GPU"])
def test_hosts_differ_in_name_processor_or_gpu(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a word that does not hold the name; the same again where nothing has changed."""
    found = []
    for name in ("one", "one", "another"):
        given = {**dict.fromkeys(("node", "processor", "GPU"), "same"), part: name}
        text = f"processor\t: 0\nmodel name\t: {given['processor']}\ncpu MHz\t: {len(found)}\n"
        monkeypatch.setattr(platform, "node", lambda given=given: given["node"])
        monkeypatch.setattr(Path, "read_text", lambda path, encoding, text=text: text)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda given=given: given["GPU"])
        found.append(facts()["host"])
    assert found[0] == found[1] != found[2] and not {"one", "same"} & set(found)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("null", ": holds a NoneType, and a JSON object is needed"),
        ("{", ":1: cannot be read as JSON (Expecting"),
        ('{"task": "\\ud800"}', ": cannot be read as JSON ('utf-8' codec"),
    ],
)
def test_a_damaged_data_folder_is_named(
    content: str, said: str, plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = plan.parent / "data"
    shutil.copytree(re.search(r"data: (\S+),", plan.read_text())[1], data)  # type: ignore[index]
    (data / "preprocess.json").write_text(content)
    plan.write_text(re.sub(r"data: \S+,", f"data: {data},", plan.read_text()))
    assert f"{data}/preprocess.json{said}" in refused(plan, capsys, "--dry-run")


def test_a_place_without_room_for_lines_is_named_before_any_training(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    plan.write_text(plan.read_text().replace(f"out: {tmp_path}/out", f"out: {tmp_path}/file/out"))
    assert "file/out/runs.jsonl: cannot be written" in refused(plan, capsys)
    assert not (tmp_path / "work" / "logs").exists()


def test_f1_needs_the_class_whose_it_is(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a class 1 it would be 0 whatever was predicted."""
    data = shutil.copytree(re.search(r"data: (\S+),", plan.read_text())[1], tmp_path / "words")  # type: ignore[index]
    labels = (data / "label" / "dict.txt").read_text()
    plan.write_text(re.sub(r"data: \S+,", f"data: {data}, metrics: [f1],", plan.read_text()))
    assert main([str(plan), "--dry-run"]) == 0
    (data / "label" / "dict.txt").write_text(labels.replace("1 ", "good ", 1).replace("0 ", "bad ", 1))
    expected = "tasks.letters: metrics is \"['f1']\"; it must be a list of accuracy, mcc"
    assert refused(plan, capsys, "--dry-run").endswith(expected)


def test_a_folder_of_candidates_is_refused(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its first two texts and its labels look like those of pairs."""
    data = prepared(tmp_path / "wnli")
    plan.write_text(re.sub(r"data: \S+,", f"data: {data},", plan.read_text()))
    expected = f"study: error: {data}: holds WNLI-ranking, which ranks rows, as studies do not; name another task's"
    assert refused(plan, capsys, "--dry-run") == expected
