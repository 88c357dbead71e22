"""The door to the commands: python -m smart_fairseq.commands."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from data_samples import ROOT, make_gpt2_bpe, make_pairs, write

from smart_fairseq.commands.__main__ import COMMANDS, PROGRAM, main
from smart_fairseq.commands.run import run


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


def test_signs_that_the_terminal_lacks_are_escapes(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "latin-1"))
    assert run("it", lambda: print("caf\xe9 \u732b \udce9")) == 0
    assert written.getvalue() == b"caf\xe9 \\u732b \\udce9\n"


@pytest.mark.parametrize("name, given", [*zip(COMMANDS, COMMANDS), ("import-hf", "import_hf")])
def test_each_has_its_help(name, given, capsys):
    with pytest.raises(SystemExit) as end:
        main([given, "--help"])
    assert end.value.code == 0
    usage = " ".join(capsys.readouterr().out.split())
    assert usage.startswith(f"usage: {PROGRAM} {name} [-h]")


def as_a_program(*argv):
    """The program's run, and the modules that it imports."""
    run = subprocess.run([sys.executable, "-X", "importtime", *argv], capture_output=True, text=True, cwd=ROOT)
    imports = re.compile(r"^import time:.*\| +([\w. -]+)\n", re.MULTILINE)
    return run.returncode, run.stdout + imports.sub("", run.stderr), set(imports.findall(run.stderr))


EXAMPLES = ROOT / "examples"
LIGHT_PREDICT = ["--checkpoint", "x", "--data-dir", "nowhere", "--out", "x"]
LIGHT_EVALUATE = ["--checkpoint", "x", "--data-dir", "nowhere"]
LIGHT = {  # arguments to the exit status and what they give
    (): (0, "usage: "),
    ("--help",): (0, "usage: "),
    ("nothing",): (2, f"{PROGRAM}: error: "),
    **{(name, "--help"): (0, "usage: ") for name in COMMANDS},
    **{(name, "--no-such-option"): (2, "usage: ") for name in COMMANDS},
    ("preprocess", "--task", "RTE", "--data-dir", "nowhere"): (2, "preprocess: error: nowhere: "),
    ("predict", *LIGHT_PREDICT): (2, "predict: error: nowhere: "),
    ("evaluate", *LIGHT_EVALUATE): (2, "evaluate: error: nowhere: "),
    ("agreement", "--predictions", "x", "--data-dir", "nowhere"): (2, "agreement: error: nowhere: "),
    ("export", "nowhere", "x"): (2, "export: error: nowhere: "),
    ("import-hf", "nowhere", "x"): (2, "import_hf: error: nowhere: "),
}


@pytest.mark.parametrize("argv", LIGHT, ids=" ".join)
def test_help_and_errors_load_nothing_heavy(argv):
    status, said, loaded = as_a_program("-m", "smart_fairseq.commands", *argv)
    assert not {"torch", "fairseq"} & loaded and "smart_fairseq.commands" in loaded
    assert (status, said[: len(LIGHT[argv][1])]) == LIGHT[argv]
    assert "INFO" not in said and "tensorboardX" not in said
    assert LIGHT[argv][1].count("error") == 0 or said.count("\n") == 1


@pytest.mark.parametrize("program", ["export", "import_hf", "study"])
def test_programs_of_their_own_load_nothing_heavy_either(program):
    status, said, loaded = as_a_program("-m", f"smart_fairseq.{program}", "--help")
    assert status == 0 and said.startswith("usage: ") and not {"torch", "fairseq"} & loaded
    more = [] if program == "study" else ["x"]
    status, said, loaded = as_a_program("-m", f"smart_fairseq.{program}", "nowhere", *more)
    assert status == 2 and said.startswith(f"{program}: error: nowhere: ") and said.count("\n") == 1
    assert not {"torch", "fairseq"} & loaded


SCRIPTS = {  # in examples, to a mistake
    "glue/download.py": ["--tasks", "RTF", "nowhere"],
    "anli/download.py": ["--tasks", "RTF", "nowhere"],
    "glue/preprocess.py": ["--task", "RTE", "--data-dir", "nowhere"],
    "anli/preprocess.py": ["--data-dir", "nowhere"],
    **{f"{name}/predict.py": LIGHT_PREDICT for name in ("glue", "anli")},
    **{f"{name}/evaluate.py": LIGHT_EVALUATE for name in ("glue", "anli")},
    "glue/agreement.py": ["--predictions", "x", "--data-dir", "nowhere"],
}


def test_the_scripts_are_all_here():
    there = {f"{path.parent.name}/{path.name}" for name in ("glue", "anli") for path in EXAMPLES.glob(f"{name}/*.py")}
    assert there == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_load_nothing_heavy_either(script):
    name = Path(script).stem
    status, said, loaded = as_a_program(str(EXAMPLES / script), "--help")
    assert status == 0 and said.startswith(f"usage: {name}.py [-h]") and not {"torch", "fairseq"} & loaded
    status, said, loaded = as_a_program(str(EXAMPLES / script), *SCRIPTS[script])
    assert (status, said.count("\n")) == (2, 1) and said.startswith(f"{name}: error: "), said
    assert not {"torch", "fairseq"} & loaded


def test_fairseq_says_nothing_while_it_loads(monkeypatch):
    """Whatever the level of the log; afterwards it may speak as before."""
    chatty, heard = logging.getLogger("fairseq.tasks.text_to_speech"), []
    monkeypatch.setattr(logging.getLogger(), "level", logging.INFO)
    monkeypatch.setattr(chatty, "level", logging.NOTSET)
    monkeypatch.setattr(chatty, "_cache", {})
    assert run("name", lambda argv: heard.append(chatty.isEnabledFor(logging.INFO)), []) == 0
    chatty._cache.clear()
    assert heard == [False] and chatty.isEnabledFor(logging.INFO)


@pytest.mark.slow
def test_pytest_itself_ends_without_a_remark_of_fairseqs():
    """Its own process, beside those that run the tests, loads conftest.py."""
    command = [sys.executable, "-m", "pytest", "-n", "1", "-p", "no:cacheprovider", "tests/test_noise.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "INFO" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import smart_fairseq",
        pytest.param("import smart_fairseq.data.readers", marks=pytest.mark.slow),
        # what a process that multiprocessing starts does first, within a command
        "sys.argv = ['-c']; import pickle; pickle.loads(b'csmart_fairseq.data.pool\\nCHUNK\\n.')",
        pytest.param(
            "from fairseq import utils; utils.import_user_module(argparse.Namespace(user_dir='smart_fairseq'))",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_everything_else_registers(code):
    names = "CRITERION_REGISTRY as c; from fairseq.optim import OPTIMIZER_REGISTRY as o"
    registered = f"from fairseq.criterions import {names}; from fairseq.models import MODEL_REGISTRY as m"
    check = "assert 'smart_sentence_prediction' in c and 'mbpp' in o and 'smart_bert' in m"
    program = f"import argparse, sys; {code}; {registered}; {check}; assert 'smart_fairseq.patches' in sys.modules"
    subprocess.run([sys.executable, "-c", program, "smart_fairseq.commands"], cwd=ROOT, check=True)


def test_preprocess_and_its_errors(tmp_path, capsys):
    make_pairs(tmp_path / "RTE", ("entailment", "not_entailment"))
    flags = ["--data-dir", str(tmp_path), "--bpe-dir", str(make_gpt2_bpe(tmp_path / "bpe")), "--workers", "1"]
    assert main(["preprocess", "--task", "RTE", *flags, "--out", str(tmp_path / "bin")]) == 0
    assert json.loads((tmp_path / "bin" / "preprocess.json").read_text())["task"] == "RTE"
    capsys.readouterr()
    assert main(["preprocess", "--task", "RTF", *flags]) == 2
    assert capsys.readouterr().err.startswith("preprocess: error: --task is 'RTF'")


def test_a_reader_of_the_output_may_go(tmp_path):
    """As ``head`` does when it has its lines: the work is done all the same, and nothing is said."""
    make_pairs(tmp_path / "RTE", ("entailment", "not_entailment"))
    flags = ["--data-dir", str(tmp_path), "--bpe-dir", str(make_gpt2_bpe(tmp_path / "bpe")), "--workers", "1"]
    program = [sys.executable, "-m", "smart_fairseq.commands", "preprocess", "--task", "RTE", *flags]
    read, output = os.pipe()
    os.close(read)
    with open(output, "wb") as nobody:
        done = subprocess.run(
            [*program, "--out", str(tmp_path / "bin")], stdout=nobody, stderr=subprocess.PIPE, cwd=ROOT
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads((tmp_path / "bin" / "preprocess.json").read_text())["rows"]["test"] == 15


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
