"""The report of a machine with a GPU, tried on the CPU: a part that fails takes nothing else with it."""

import sys
from pathlib import Path
from typing import Any

import pytest
from data_samples import make_glue, make_gpt2_bpe
from toolkit import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_report
from gpu_report import Part, Report, Updates, read_tests, take

TINY = ["--device", "cpu", "--model", "tiny", "--batch", "2", "--length", "8", "--rounds", "1"]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_part_that_fails_takes_nothing_else_with_it(tmp_path: Path) -> None:
    """By its status, by a signal, by the clock with all that it started, and by printing something else."""
    mark = tmp_path / "late"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    hanging = f"import subprocess, sys; print('hangs', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    long_ago, last = "print('\\n'.join(f'line {i}' for i in range(99)))", "import sys; sys.exit(3)"

    def refuse(output: str) -> str:
        raise ValueError("not what was expected")

    parts = [
        Part("first", "machine", python("print('one')"), lambda output: f"read {output}"),
        Part("by status", "tests", python(f"{long_ago}; {last}"), lambda output: "never", needed=True),
        Part("left out", "tests", python("print('two')"), lambda output: "never"),
        Part("by a signal", "update", python("import os; os.kill(os.getpid(), 11)"), lambda output: "never"),
        Part("by the clock", "update", python(hanging), lambda output: "never"),
        Part("by its words", "update", python("print('three')"), refuse),
        Part("partly", "update", python("print('four'); raise SystemExit(1)"), lambda output: output, partly=True),
        Part("last", "training", python(f"print('five', {str(tmp_path)!r})"), lambda output: output),
    ]
    out = tmp_path / "report.md"
    report = Report(out, {str(tmp_path): "HERE"})
    take(parts, report, limit=2, env={})
    text = out.read_text()
    for seen in ("read one", "four", "five HERE", "## RTE"):
        assert seen in text
    headings = [line for line in text.splitlines() if line.startswith("### ")]
    assert headings == [
        f"### {name}" for name in ("by status", "by a signal", "by the clock", "by its words", "partly")
    ]
    for seen in (
        "ended with status 3",
        "ended with status -11",
        "was ended after 2 s",
        "hangs",
        "not what was expected",
    ):
        assert text.count(seen) == 1
    assert "line 98" in text and "line 60" not in text  # the last lines
    assert "never" not in text and "two" not in text and str(tmp_path) not in text
    assert not mark.exists()


def test_what_pytest_prints() -> None:
    """Alone and side by side, and what it had said when the clock ended it."""
    alone = "tests/test_a.py::test_b[x] FAILED [ 50%]\ntests/test_a.py::test_b[y z] PASSED [ 75%]\n"
    assert "| 1 | 1 | 0 | 2.5 |" in read_tests(
        f"{alone}FAILED tests/test_a.py::test_b[x]\n1 failed, 1 passed in 2.5s\n"
    )
    side_by_side = "[gw1] [ 10%] ERROR tests/test_c.py::test_d[f, g] \n[gw0] [ 30%] SKIPPED tests/test_c.py::test_e \n"
    read = read_tests(f"{side_by_side}[gw0] [ 40%] PASS")
    assert "| 0 | 1 | 1 | cut off |" in read and read.endswith("\n\n- tests/test_c.py::test_d[f, g]")
    with pytest.raises(ValueError):
        read_tests("ERROR: file or directory not found: tests/no_such.py\n")


def test_the_table_of_updates() -> None:
    """A heading for the first row alone; over plain, where plain is known; counts of a GPU where they are there."""
    updates = Updates()

    def read(variant: str, seconds: float, **more: Any) -> list[str]:
        row = {"variant": variant, "seconds": seconds, "activations_gib": 1.0, **more}
        return updates.read(f"fairseq says\n{gpu_report.json.dumps({'rows': [row]})}").splitlines()

    heading, rule, plain = read("plain", 0.5, peak_gib=8.125, synchronisations=24, launches=5000)
    assert heading == "|  | seconds | GiB | GiB of activations | waits | launches | seconds, plain = 1 |"
    assert rule.count("---") == 7 and plain == "| plain | 0.5 | 8.12 | 1 | 24 | 5000 | 1.00 |"
    assert read("MBPP alone", 0.6) == ["| MBPP alone | 0.6 |  | 1 |  |  | 1.20 |"]


@pytest.mark.slow
def test_an_update_and_the_machine(tmp_path: Path) -> None:
    """By the very processes of the report."""
    out = tmp_path / "report.md"
    arguments = [*TINY, "--out", str(out), "--variants", "plain", "--tests", "tests/no_such_test.py"]
    assert gpu_report.main(arguments) == 1
    text = out.read_text()
    assert "| hardware | CPU" in text and "| torch | 2" in text
    assert "| plain | " in text and "Skipped: no --glue." in text
    assert [line for line in text.splitlines() if line.startswith("### ")] == ["### tests"]
    assert "no_such_test.py" in text and str(ROOT) not in text


@pytest.mark.slow
def test_the_whole_report(tmp_path: Path) -> None:
    glue = make_glue(tmp_path / "glue")
    make_gpt2_bpe(glue / "gpt2_bpe")
    out = tmp_path / "report.md"
    arguments = [*TINY, "--out", str(out), "--tests", "tests/test_noise.py", "--glue", str(glue), "--updates", "12"]
    assert gpu_report.main(arguments) == 0
    text = out.read_text()
    assert text.endswith("## What failed\n\nNothing.\n")
    for variant in gpu_report.VARIANTS:
        assert f"\n| {variant} | 0." in text
    assert "12 updates of 2 rows by SMART + MBPP, bf16, from random weights." in text
    numbers = {line.split("`")[1]: line.split(" | ")[1:] for line in text.splitlines() if line.startswith("| `")}
    assert [cell.strip(" |") for cell in numbers["num_updates"]] == ["2", "12"]
    assert {"task_loss", "smart_loss", "bregman_loss", "valid_accuracy"} <= numbers.keys()
    assert str(tmp_path) not in text


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_report.main([])
    assert "torch finds no CUDA device; --device cpu --model tiny" in capsys.readouterr().err
