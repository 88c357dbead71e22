"""Studies: the rows that are drawn, trainings that differ in their method alone, resuming, what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import FORKS, join
from study_samples import MODEL, PLAN, study_of, without_plain, write_data, write_fake, write_plan
from toolkit import ROOT, TINY_MODEL, command, error_line, train

from smart_fairseq.data.binarize import read_indexed
from smart_fairseq.errors import UsageError
from smart_fairseq.inference import Model
from smart_fairseq.study import studying, worker
from smart_fairseq.study.__main__ import main
from smart_fairseq.study.lines import read_lines, write_lines
from smart_fairseq.study.plan import read_plan
from smart_fairseq.study.rows import Draw, Source, cut_out, drawn, flipped


def without_times(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(("seconds", "date"))} for line in lines]


def texts(folder: Path, split: str) -> list[tuple[list[int], int]]:
    """(ids, label) of each row."""
    rows = read_indexed(folder / "input0" / split)
    return [(row.tolist(), label) for row, label in zip(rows, Source(folder).labels(split))]


# Rows


def test_rows_are_drawn_and_the_rest_is_left(tmp_path: Path) -> None:
    """Every row of the folder is in one of the two parts, once; ids say where it came from."""
    source = Source(write_data(tmp_path / "data"))
    cut_out(source, tmp_path / "cut", Draw(rows=9), seed=3)
    train, valid = texts(tmp_path / "cut", "train"), texts(tmp_path / "cut", "valid")
    assert (len(train), len(valid)) == (9, 24 - 9 + 10)
    whole = texts(source.folder, "train") + texts(source.folder, "valid")
    assert sorted(train + valid) == sorted(whole)
    for part, rows in (("train", train), ("valid", valid)):
        ids = (tmp_path / "cut" / "ids" / f"{part}.tsv").read_text().splitlines()[1:]
        for identity, row in zip(ids, rows):
            split, place = identity.split(":")
            assert texts(source.folder, split)[int(place)] == row


def test_fewer_rows_are_among_more_and_seeds_differ() -> None:
    labels = np.arange(50) % 2
    few, many, other = (drawn(labels, Draw(rows=n), seed).tolist() for n, seed in ((10, 1), (30, 1), (10, 2)))
    assert set(few) < set(many) and few != other


def test_stratified_rows_keep_the_shares_of_the_classes() -> None:
    """Of 60, 30 and 10 rows, 20 are 12, 6 and 2."""
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    for seed in range(5):
        assert np.bincount(labels[drawn(labels, Draw(rows=20, stratified=True), seed)]).tolist() == [12, 6, 2]
    plain = {tuple(np.bincount(labels[drawn(labels, Draw(rows=20), seed)], minlength=3)) for seed in range(5)}
    assert len(plain) > 1


def test_flipped_labels_are_others_and_as_many_as_asked() -> None:
    labels = np.arange(100) % 3
    changed = flipped(labels, 3, 0.2, seed=1)
    assert (changed != labels).sum() == 20 and set(changed) == {0, 1, 2}
    assert {int(x) for x in (changed - labels)[changed != labels] % 3} == {1, 2}
    assert (flipped(labels, 3, 0.2, seed=1) == changed).all()


def test_labels_are_flipped_for_training_alone(tmp_path: Path) -> None:
    source = Source(write_data(tmp_path / "data"))
    for name, flip in (("as they are", 0.0), ("flipped", 0.5)):
        cut_out(source, tmp_path / name, Draw(rows=12, flip=flip), seed=3)
    one, other = (texts(tmp_path / name, "train") for name in ("as they are", "flipped"))
    assert [ids for ids, _ in one] == [ids for ids, _ in other]
    assert sum(a[1] != b[1] for a, b in zip(one, other)) == 6
    assert texts(tmp_path / "as they are", "valid") == texts(tmp_path / "flipped", "valid")


def test_targets_of_a_regression_task_go_along(tmp_path: Path) -> None:
    source = Source(write_data(tmp_path / "data", kind="regression"))
    cut_out(source, tmp_path / "cut", Draw(rows=9, evaluate=5), seed=3)
    assert [len(Source(tmp_path / "cut").labels(split)) for split in ("train", "valid")] == [9, 5]
    whole = {str(row) for split in ("train", "valid") for row in texts(source.folder, split)}
    assert {str(row) for row in texts(tmp_path / "cut", "train")} < whole


@pytest.mark.parametrize("left", [0, 1])
def test_too_few_rows_to_evaluate_on_are_refused(left: int, tmp_path: Path) -> None:
    """One half fits a temperature: of one row that would be none."""
    source = Source(write_data(tmp_path / "data", train=6, valid=left))
    with pytest.raises(UsageError, match=f"data: has {left} labelled rows to evaluate on, and 2 are needed"):
        cut_out(source, tmp_path / "cut", Draw(), seed=3)
    cut_out(source, tmp_path / "cut", Draw(rows=4 + left), seed=3)
    assert len(Source(tmp_path / "cut").labels("valid")) == 2


# Trainings


def test_methods_begin_alike_and_a_report_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With weight 0 SMART is plain training: the same rows, head and order give the same logits, bit for bit."""
    plan = write_plan(tmp_path, write_data(tmp_path / "data"), PLAN.replace("[1, 2]", "[1]"))
    assert main([str(plan), "--jobs", "2"]) == 0
    lines = read_lines(tmp_path / "out" / "runs.jsonl")
    assert sorted(line["method"] for line in lines) == ["plain", "smart"]
    for line in lines:
        assert line["updates"] == 6 and line["rows"] == {"train": 12, "valid": 22}
        assert 0 < line["cpu_seconds_per_update"] < line["cpu_seconds"]
    with np.load(tmp_path / "work" / "logits" / f"{lines[0]['key']}.npz") as one:
        with np.load(tmp_path / "work" / "logits" / f"{lines[1]['key']}.npz") as other:
            assert (one["logits"] == other["logits"]).all() and np.ptp(one["logits"]) > 0
            (cut,) = (tmp_path / "work" / "rows").iterdir()
            assert one["labels"].tolist() == [label for _, label in texts(cut, "valid")]
    assert lines[0]["metrics"] == lines[1]["metrics"]
    assert not list((tmp_path / "work" / "checkpoints").rglob("*.pt"))
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"runs.jsonl", "report.md", "report.csv", "letters.svg", "letters-cost.svg", ".runs.jsonl.lock"}
    capsys.readouterr()
    assert main([str(plan), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"letters-{m}-seed1: 6 updates, done" for m in ("plain", "smart")]


def test_runs_go_seed_by_seed_and_only_those_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new seed adds its runs; a changed method is run anew, and the report leaves its old lines out."""
    monkeypatch.setattr(studying, "WORKER", (sys.executable, str(write_fake(tmp_path))))
    data = write_data(tmp_path / "data")
    expected = [("plain", 1), ("smart", 1), ("plain", 2), ("smart", 2)]
    for text, more in (
        (PLAN, []),
        (PLAN, []),
        (PLAN.replace("[1, 2]", "[1, 2, 3]"), [("plain", 3), ("smart", 3)]),
        (PLAN.replace("smart-weight: 0", "smart-weight: 0.5"), [("smart", 1), ("smart", 2)]),
    ):
        plan = write_plan(tmp_path, data, text)
        assert main([str(plan), "--jobs", "1"]) == 0
        expected += more
        assert [(line["method"], line["seed"]) for line in read_lines(tmp_path / "out" / "runs.jsonl")] == expected
    assert len(studying.lines_of(read_plan(plan))) == 4
    assert "4 of 4 runs" in (tmp_path / "out" / "report.md").read_text()


def test_a_run_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = write_fake(tmp_path)
    fake.write_text(
        "import sys\nif '2' == sys.argv[sys.argv.index('--seed') + 1]: sys.exit('broken')\n" + fake.read_text()
    )
    monkeypatch.setattr(studying, "WORKER", (sys.executable, str(fake)))
    assert main([str(write_plan(tmp_path, write_data(tmp_path / "data"))), "--jobs", "1"]) == 1
    said = capsys.readouterr()
    assert "letters-plain-seed2: fairseq-train ended with status 1; the whole log is " in said.out
    assert "; broken\n" in said.out and "study: error: 2 of the runs failed: letters-plain-seed2" in said.err
    assert [line["seed"] for line in read_lines(tmp_path / "out" / "runs.jsonl")] == [1, 1]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, study_data: Path) -> list[dict[str, Any]]:
    """The lines of a study that nobody stops."""
    folder = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studying, "WORKER", (sys.executable, str(write_fake(folder))))
        assert main([str(write_plan(folder, study_data)), "--jobs", "1"]) == 0
    return without_times(folder / "out" / "runs.jsonl")


@pytest.mark.parametrize(
    "how",
    [signal.SIGINT, signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
    ids=lambda how: how.name,
)
def test_a_killed_study_goes_on_to_the_same_lines(
    how: signal.Signals,
    unbroken: list[dict[str, Any]],
    study_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed after its first line and resumed: each run's line once, as in an unbroken study."""
    plan, lines = write_plan(tmp_path, study_data), tmp_path / "out" / "runs.jsonl"
    process = FORKS.Process(target=study_of, args=(plan, write_fake(tmp_path, sleep=0.3)))
    process.start()
    while not lines.is_file() and process.is_alive():
        time.sleep(0.02)
    os.kill(process.pid or 0, how)
    assert join([process], timeout=60)[0] not in (0, None)
    assert 1 <= len(read_lines(lines)) < 4
    monkeypatch.setattr(studying, "WORKER", (sys.executable, str(write_fake(tmp_path))))
    assert main([str(plan), "--jobs", "1"]) == 0
    assert without_times(lines) == unbroken


def test_a_dry_run_lists_its_runs_and_says_nothing_else(tmp_path: Path) -> None:
    """fairseq, which checks the flags, has its say on packages that are not there."""
    command = [sys.executable, "-m", "smart_fairseq.study", str(write_plan(tmp_path, write_data(tmp_path / "data")))]
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not done.stderr and all(line.endswith(" updates") for line in done.stdout.splitlines())


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("how", ["diverged", "the attack failed"])
def test_no_checkpoint_is_left_of_a_run_that_fails(
    how: str, keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is to be kept it stays: someone may want to look at it."""

    def load(checkpoint: Path, data: Path, cpu: bool) -> None:
        assert checkpoint.is_file()

    def predicted(model: None) -> tuple[np.ndarray, np.ndarray]:
        if how == "diverged":
            raise UsageError(how)
        return np.zeros((4, 2)), np.zeros(4, np.int64)

    def train(arguments: list[str]) -> Any:
        (tmp_path / "one").mkdir()
        (tmp_path / "one" / "checkpoint_last.pt").touch()

    def attacked(*given: Any) -> None:
        raise RuntimeError(how)

    for name, fake in (("train", train), ("Model", load), ("predicted", predicted), ("attacked", attacked)):
        monkeypatch.setattr(worker, name, fake)
    monkeypatch.setattr(worker, "leave_with_parent", lambda: None)
    monkeypatch.setattr(os, "nice", lambda more: 0)
    beside = {"keep": keep, "seed": 1, "attack": {"radii": [0.1], "rows": 2}, "transfer": {}}
    with pytest.raises((UsageError, RuntimeError), match=how):
        worker.main(tmp_path / "one.npz", beside, ["data", "--save-dir", str(tmp_path / "one")])
    assert (tmp_path / "one").exists() == keep and not (tmp_path / "one.npz").exists()


@pytest.mark.slow
def test_workers_end_with_a_study_that_is_killed(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, write_data(tmp_path / "data"), PLAN.replace("epochs: 2", "epochs: 100000"))
    process = subprocess.Popen(
        [sys.executable, "-m", "smart_fairseq.study", str(plan), "--jobs", "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    logs = [tmp_path / "work" / "logs" / f"letters-{method}-seed1.log" for method in ("plain", "smart")]
    while not all(log.is_file() and "train_inner" in log.read_text() for log in logs):
        time.sleep(0.2)
        assert process.poll() is None
    process.kill()
    process.wait()
    own = str(tmp_path).encode()
    deadline = time.monotonic() + 30
    while any(own in _command(path) for path in Path("/proc").iterdir() if path.name.isdigit()):
        time.sleep(0.2)
        assert time.monotonic() < deadline


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_metrics_are_computed_anew_from_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studying, "WORKER", (sys.executable, str(write_fake(tmp_path))))
    plan = write_plan(tmp_path, write_data(tmp_path / "data"))
    assert main([str(plan)]) == 0
    path = tmp_path / "out" / "runs.jsonl"
    before = read_lines(path)
    write_lines(path, [{**line, "metrics": {"accuracy": 0.0}} for line in before])
    assert main([str(plan), "--rescore"]) == 0
    assert read_lines(path) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:60] + b"\xff" * 20 + content[80:],  # of what is packed the first bytes
        lambda content: b"no file of arrays",
    ],
    ids=["empty", "cut short", "changed", "another's"],
)
def test_damaged_logits_are_named(damage: Any, tmp_path: Path, study_data: Path) -> None:
    study = studying.Study(read_plan(write_plan(tmp_path, study_data)))
    path = study.logits("a key")
    path.parent.mkdir(parents=True)
    np.savez_compressed(path, logits=np.ones((22, 2)), labels=np.arange(22) % 2)
    asked = study.plan.runs()[0]
    assert study.metrics(asked, "a key")["accuracy"] == 50
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match=r"a key\.npz: the logits of letters-plain-seed1 cannot be read; remove its"):
        study.metrics(asked, "a key")


# Plans


def test_the_plan_of_the_documents_is_one(tmp_path: Path) -> None:
    """Two learning rates, two radii for smart: 2 + 4 runs for each of 3 seeds; the first seed's come first."""
    text = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    (tmp_path / "movie.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    plan = read_plan(tmp_path / "movie.yaml", files=False)
    runs = plan.runs()
    assert [asked.seed for asked in runs] == [1] * 6 + [2] * 6 + [3] * 6
    assert runs[2].name == "movie-smart-lr=5e-05-smart-epsilon=0.01-seed1"
    assert runs[0].updates == 4 * 63  # 1000 rows in batches of 16
    assert plan.work == Path(".cache/study/movie")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seeds: [1, 2]", "seeds: [1, 2]\nseed: 3", "the plan: unknown key 'seed'; known are out, work"),
        ("rows: 12", "row: 12", "tasks.letters: unknown key 'row'"),
        ("rows: 12", "rows: 120", "tasks.letters: rows is '120'; it must be at most 24"),
        ("rows: 12", "rows: 12, evaluate: 1", "tasks.letters: evaluate is '1'; it must be a whole number from 2"),
        ("rows: 12", "rows: many", "tasks.letters: rows is 'many'; it must be a whole number"),
        ("rows: 12", "rows: 12, flip: 2", "flip is '2.0'; it must be a share"),
        ("rows: 12", "rows: 12, metrics: [pearson]", "metrics is \"['pearson']\"; it must be a list of accuracy"),
        ("{data}, rows", "{data}/nowhere, rows", "nowhere: holds no preprocess.json"),
        ("seeds: [1, 2]", "seeds: [1, 1]", "seeds is '[1, 1]'"),
        ("seeds: [1, 2]", "seeds: 2", "seeds is '2'"),
        ("seeds: [1, 2]", "seeds: [1, 2]\nseeds: [3]", "plan.yaml:13: is not a plan in YAML: found duplicate key"),
        ("seeds: [1, 2]", "seeds: [1, 2", "is not a plan in YAML"),
        ("seeds: [1, 2]", "seeds: [1]\ngrid: {{lr: 1}}", "grid: lr is '1'; it must be a list"),
        ("seeds: [1, 2]", "seeds: [1]\ngrid: {{lr: [1, 1]}}", "it must be different values"),
        ("seeds: [1, 2]", "seeds: [1]\ngrid: {{lr: [1], methods: [smooth]}}", "grid: methods is \"['smooth']\""),
        ("seeds: [1, 2]", "seeds: [1]\ngrid: {{lr: [1], tasks: [numbers]}}", "must be a list of letters"),
        ("seeds: [1, 2]", "seeds: [1]\ngrid: [{{lr: [1]}}, {{lr: [2], methods: [plain]}}]", "in one block"),
        ("lr: 1e-3", "lr: [1e-3]", "train: lr is '[0.001]'; it must be one value"),
        ("lr: 1e-3", "seed: 1", "train: seed cannot be set; list seeds:"),
        ("epochs: 2", "warmup: 0", "epochs is 'not set'"),
        ("epochs: 2", "epoch: 2", "train: epoch cannot be set; say epochs:"),
        ("epochs: 2", "epochs: 0", "letters, plain: epochs is '0.0'"),
        ("epochs: 2", "epochs: 2, warmup: 1", "warmup is '1.0'"),
        ("epochs: 2", "epochs: 2, learning-rate: 1", "fairseq-train says: unrecognized arguments: --learning-rate 1"),
        ("smart-weight: 0", "from: x.pt", "methods.smart: from is 'x.pt'; it must be an existing checkpoint"),
        ("lr: 1e-3", "lr: 1e-4x", "letters, plain: 1e-4x is not a value that fairseq-train reads"),
        ("smart-weight: 0", "smart-wait: 0", "letters, smart: fairseq-train says: unrecognized"),
        ("smart-weight: 0", "smart-weight: -1", "letters, smart: --smart-weight is -1"),
        ("smart-weight: 0", "lr-scheduler: cosinus", "invalid choice: 'cosinus'"),
        ("criterion: smart", "criterionn: smart", "smart: criterion is 'not set'; it must be one of fairseq-train's, "
         "as in criterion: ...; smart sets criterionn, optimizer"),
        ("arch: roberta", "arch: robert", "invalid choice: 'robert'"),
        ("encoder:\n  flags: {{{model}}}", "encoder: nowhere", "encoder is 'nowhere'; it must be a folder"),
        ("  flags:", "  checkpoint: x.pt\n  flags:", "encoder: checkpoint is 'x.pt'"),
    ],
)  # fmt: skip
def test_bad_plans_are_refused_before_any_run(
    old: str, new: str, expected: str, tmp_path: Path, study_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PLAN.replace("{model}", MODEL) if old.startswith("arch") else PLAN
    assert old in text
    plan = write_plan(tmp_path, study_data, text.replace(old, new))
    line, of_the_data = error_line("study", main, [plan], capsys), new.startswith("{data}/nowhere")
    assert expected in line and (of_the_data or line.startswith(f"study: error: {plan}:"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "work").exists()


def test_data_of_another_encoder_are_refused(tmp_path: Path, study_data: Path) -> None:
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "import.json").write_text(json.dumps({"flags": TINY_MODEL}))
    text = PLAN.replace("encoder:\n  flags: {{{model}}}", f"encoder: {encoder}")
    words = (study_data / "input0" / "dict.txt").read_bytes()
    for found in (words, words + b"more 1\n"):
        (encoder / "dict.txt").write_bytes(found)
        plan = write_plan(tmp_path, study_data, text)
        if found == words:
            read_plan(plan)
        else:
            with pytest.raises(UsageError, match=r"plan.yaml: tasks.letters: .* has another dictionary than the enc"):
                read_plan(plan)


def test_a_method_begins_with_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    """With a learning rate of nearly nothing it answers as that checkpoint does; what is in the file is in the key."""
    data = write_data(tmp_path / "data")
    train(command(data, max_update=4, save_dir=tmp_path / "first"))
    start = tmp_path / "first" / "checkpoint_last.pt"
    text = PLAN.replace("smart-weight: 0", f"lr: 1e-12, from: {start}").replace("seeds: [1, 2]", "seeds: [1]")
    assert main([str(write_plan(tmp_path, data, without_plain(text))), "--jobs", "1"]) == 0
    plan = write_plan(tmp_path, data, text)
    study = studying.Study(read_plan(plan))
    own, other = study.plan.runs()
    assert own.start is None and other.start == start
    expected = Model(start, study.folder(other)).predict("valid", 4096).logits
    with np.load(study.logits(study.key(other))) as stored:
        np.testing.assert_allclose(stored["logits"], expected, atol=1e-5)
    before = study.key(own), study.key(other)
    start.write_bytes(start.read_bytes() + b"more")
    again = studying.Study(read_plan(plan))
    assert again.key(own) == before[0] and again.key(other) != before[1]


def test_two_studies_do_not_share_a_folder(tmp_path: Path, study_data: Path) -> None:
    study = studying.Study(read_plan(write_plan(tmp_path, study_data)))
    with studying.alone(tmp_path / "work" / "lock"), pytest.raises(UsageError, match="another study runs"):
        study.go(1)


def test_a_run_takes_one_gpu_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fairseq's default, which it reads where there are four, would share a run out, and enlarge its batches."""
    from fairseq import options

    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert options.get_training_parser().get_default("distributed_world_size") == 4
    plan = read_plan(write_plan(tmp_path, write_data(tmp_path / "data")))
    asked = plan.runs()[0]
    line = plan.command(asked, asked.task.source.folder)
    parsed = options.parse_args_and_arch(options.get_training_parser(), input_args=line)
    assert parsed.distributed_world_size == 1 and not parsed.cpu
