"""The door to the commands: python -m smart_fairseq.commands."""

import json
import re
import subprocess
import sys

import pytest
from data_samples import ROOT, make_gpt2_bpe, make_pairs, write

from smart_fairseq.commands.__main__ import COMMANDS, PROGRAM, main

OWN = [name for name in COMMANDS if name not in ("export", "import-hf")]


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_lists_the_commands(argv, capsys):
    assert main(argv) == 0
    listed = re.findall(r"^  (\S+) +\S.*$", capsys.readouterr().out, re.MULTILINE)
    assert listed == ["download", "preprocess", "predict", "evaluate", "agreement", "export", "import-hf"]


def test_unknown_name(capsys):
    assert main(["prepare", "--task", "RTE"]) == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1
    assert "'prepare'" in error and all(name in error for name in COMMANDS)


@pytest.mark.parametrize("name", [*COMMANDS, "import_hf"])
def test_each_has_its_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    usage = " ".join(capsys.readouterr().out.split())
    assert name not in OWN or usage.startswith(f"usage: {PROGRAM} {name} [-h]")


def test_command_on_the_command_line():
    """Alone it imports no command; an unknown name is one line and status 2."""
    code = "import sys; from smart_fairseq.commands.__main__ import main; main([]); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    loaded = [name for name in out.split() if name.startswith("smart_fairseq.commands.")]
    assert loaded == ["smart_fairseq.commands.__main__"]
    command = [sys.executable, "-m", "smart_fairseq.commands", "nothing"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = [line for line in run.stderr.splitlines() if not line.startswith("INFO:")]
    assert run.returncode == 2 and len(lines) == 1 and lines[0].startswith(f"{PROGRAM}: error: "), run.stderr


def test_preprocess_and_its_errors(tmp_path, capsys):
    make_pairs(tmp_path / "RTE", ("entailment", "not_entailment"))
    flags = ["--data-dir", str(tmp_path), "--bpe-dir", str(make_gpt2_bpe(tmp_path / "bpe")), "--workers", "1"]
    assert main(["preprocess", "--task", "RTE", *flags, "--out", str(tmp_path / "bin")]) == 0
    assert json.loads((tmp_path / "bin" / "preprocess.json").read_text())["task"] == "RTE"
    capsys.readouterr()
    assert main(["preprocess", "--task", "RTF", *flags]) == 2
    assert capsys.readouterr().err.startswith("preprocess: error: --task is 'RTF'")


@pytest.mark.parametrize("task", [["--task", "ANLI"], ["--task=anli"]])
def test_preprocess_joins_anlis_rounds(task, tmp_path):
    row = {"context": "a dog", "hypothesis": "the cat", "label": "e"}
    for split in ("train", "dev", "test"):
        rows = [json.dumps({"uid": f"{split}-{number}", **row}) for number in range(3)]
        write(tmp_path / "anli_v1.0" / "R1" / f"{split}.jsonl", *rows)
    flags = ["--data-dir", str(tmp_path), "--bpe-dir", str(make_gpt2_bpe(tmp_path / "bpe")), "--workers", "1"]
    out = tmp_path / "bin"
    assert main(["preprocess", "--rounds", "R1", *task, *flags, "--out", str(out)]) == 0
    assert json.loads((out / "preprocess.json").read_text())["task"] == "ANLI"
