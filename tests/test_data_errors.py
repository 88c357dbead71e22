"""Broken input: one clear line that names file and line, exit status 2, and nothing left behind."""

import gzip
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from data_samples import ROOT, STSB, make_bert_bpe, make_gpt2_bpe, make_pairs, make_sentencepiece, write
from toolkit import error_line

from smart_fairseq.commands.preprocess import anli_main, glue_main
from smart_fairseq.data import pool

HEADER = "index\tsentence1\tsentence2\tlabel"
GOOD = "0\ta\tb\tentailment"


@pytest.fixture
def place(tmp_path):
    make_gpt2_bpe(tmp_path / "bpe")
    make_pairs(tmp_path / "glue" / "RTE", ("entailment", "not_entailment"))
    return tmp_path


def refused(place: Path, capsys, *flags: str, main=glue_main, task="RTE") -> str:
    """Run with flags (later ones win); the one line it prints."""
    base = [] if main is anli_main else ["--task", task]
    base += ["--data-dir", str(place / "glue"), "--bpe-dir", str(place / "bpe"), "--out", str(place / "out")]
    before = sorted(path for path in place.rglob("*"))
    line = error_line("preprocess", main, [*base, *flags], capsys)
    assert sorted(path for path in place.rglob("*")) == before
    return line.replace(str(place) + "/", "")


def train(place: Path) -> Path:
    return place / "glue" / "RTE" / "train.tsv"


# The content of train.tsv, and what must be said about it
CONTENT = {
    "too few columns": ([HEADER, GOOD, "1\ta\tb"], r"train.tsv:3: 3 tab-separated columns, and 4 are needed"),
    "too many columns": ([HEADER, GOOD, "1\ta\tb\tentailment\tx"], r"train.tsv:3: 5 tab-separated columns, and 4"),
    "commas instead of tabs": (["index,sentence1,sentence2,label", "0,a,b,entailment"], r"train.tsv:1: the header has"),
    "header of another task": (["index\tquestion\tsentence\tlabel", GOOD], r"train.tsv:1: .*no column 'sentence1'"),
    "no header": ([GOOD, GOOD], r"train.tsv:1: the header has no column"),
    "no label column": (["index\tsentence1\tsentence2", "0\ta\tb"], r"train.tsv:1: .*no column 'label'"),
    "wrong label": ([HEADER, "0\ta\tb\tyes"], r"train.tsv:2: label 'yes' is not one of RTE's: entailment, not_ent"),
    "empty label": ([HEADER, "0\ta\tb\t"], r"train.tsv:2: label '' is not one of"),
    "label of another task": ([HEADER, GOOD, "1\ta\tb\tneutral"], r"train.tsv:3: label 'neutral'"),
    "a column twice": (
        [f"{HEADER}\tLabel", f"{GOOD}\t1"],
        r"train.tsv:1: the header has the column 'label' twice; rename",
    ),
    "header alone": ([HEADER], r"train.tsv: holds no rows"),
    "blank lines alone": ([HEADER, "", " "], r"train.tsv: holds no rows but 2 that were left out; the first: blank"),
    "web page": (["<!DOCTYPE html>", "<html>404</html>"], r"train.tsv: is a web page"),
    "Git LFS pointer": (["version https://git-lfs.github.com/spec/v1", "oid sha256:0"], r"train.tsv: is a Git LFS"),
}


@pytest.mark.parametrize("kind", CONTENT)
def test_content(place, capsys, kind):
    lines, message = CONTENT[kind]
    write(train(place), *lines)
    assert re.search(message, refused(place, capsys))


BYTES = {
    "empty file": (b"", r"train.tsv: is empty"),
    "white space alone": (b"\n \n", r"train.tsv: is empty"),
    "binary file": (b"index\tsentence1\n\x00\x01\x02", r"train.tsv:2: holds a zero byte: this is a binary file"),
    "latin-1 text": (
        f"{HEADER}\n0\tcaf\xe9\tb\tentailment\n".encode("latin-1"),
        r"train.tsv:2: byte 0xe9 at position 6",
    ),
    "UTF-16 text": (HEADER.encode("utf-16"), r"train.tsv: is UTF-16"),
    "zip instead of text": (b"PK\x03\x04\x14\x00", r"train.tsv: is an archive"),
    "gzip instead of text": (gzip.compress(b"x"), r"train.tsv: is an archive"),
}


@pytest.mark.parametrize("kind", BYTES)
def test_bytes(place, capsys, kind):
    content, message = BYTES[kind]
    train(place).write_bytes(content)
    assert re.search(message, refused(place, capsys))


def test_truncated_gzip(place, capsys):
    content = gzip.compress(f"{HEADER}\n{GOOD}\n".encode() * 50)
    train(place).unlink()
    (place / "glue" / "RTE" / "train.tsv.gz").write_bytes(content[:-9])
    assert re.search(r"train.tsv.gz: not a complete gzip file", refused(place, capsys))


def test_gzip_in_name_only(place, capsys):
    train(place).rename(train(place).with_suffix(".tsv.gz"))
    assert re.search(r"train.tsv.gz: not a complete gzip file", refused(place, capsys))


@pytest.mark.parametrize("part", ["dev", "test"])
def test_repeated_id_in_a_part_to_predict(place, capsys, part):
    """evaluate would refuse the file that predict writes for it."""
    label = ("\tlabel", "\tentailment") if part == "dev" else ("", "")
    lines = ["index\tsentence1\tsentence2" + label[0], f"0\ta\tb{label[1]}", f"0\tc\td{label[1]}"]
    write(place / "glue" / "RTE" / f"{part}.tsv", *lines)
    assert re.search(rf"{part}.tsv:3: id '0' was on line 2 already", refused(place, capsys))


def test_repeated_id_in_two_rounds(place, capsys):
    for name in ("R1", "R2"):
        for split in ("train", "dev"):
            write(place / "glue" / "anli_v1.0" / name / f"{split}.jsonl", json.dumps(ENTRY))
    assert "R2/dev.jsonl:1: id 'u' was" in refused(place, capsys, "--rounds", "R1,R2", main=anli_main)


@pytest.mark.parametrize("score", ["5.1", "-0.2", "nan", "inf", "four", ""])
def test_score_out_of_range(place, capsys, score):
    write(place / "glue" / "STS-B" / "train.tsv", "\t".join([*STSB, "score"]), f"0\tg\tf\ty\t0\tn\tn\ta\tb\t{score}")
    line = refused(place, capsys, task="STS-B")
    assert f"train.tsv:2: score {score!r} is not a number from 0 to 5" in line


def test_headerless_file_of_another_width(place, capsys):
    write(place / "glue" / "CoLA" / "train.tsv", "gj04\t1\tfine")
    assert re.search(r"train.tsv:1: 3 tab-separated columns, and 4 are needed", refused(place, capsys, task="CoLA"))


ENTRY = {"uid": "u", "context": "a", "hypothesis": "b", "label": "e", "reason": ""}
OBJECTS = {
    "not JSON": ("{uid: 1}", r"train.jsonl:2: not JSON"),
    "half a line": (json.dumps(ENTRY)[:20], r"train.jsonl:2: not JSON"),
    "a list": ("[1]", r"train.jsonl:2: a JSON list; each line must be one object"),
    "a missing key": (json.dumps({"uid": "u", "context": "a", "label": "e"}), r":2: key 'hypothesis' holds nothing"),
    "a number for text": (json.dumps({**ENTRY, "context": 3}), r"train.jsonl:2: key 'context' holds int"),
    "half of a surrogate pair": (json.dumps({**ENTRY, "context": "a \ud83d b"}), r"train.jsonl:2: not JSON \(.*surrog"),
    "half a pair in an id": (json.dumps({**ENTRY, "uid": "\udc80"}), r"train.jsonl:2: not JSON \(.*surrogates"),
    "a zero byte, escaped": (json.dumps({**ENTRY, "hypothesis": "a\0b"}), r"train.jsonl:2: holds a zero byte"),
    "a zero byte in an id": (json.dumps({**ENTRY, "uid": "u\0"}), r"train.jsonl:2: holds a zero byte"),
    "ten thousand brackets": ("[" * 10_000, r"train.jsonl:2: not JSON \("),
    "a number of 5,000 digits": ("1" * 5000, r"train.jsonl:2: not JSON \("),
    "null": ("null", r"train.jsonl:2: a JSON NoneType; each line must be one object"),
    "a text that is null": (json.dumps({**ENTRY, "context": None}), r":2: key 'context' holds NoneType"),
    "a label that is a list": (json.dumps({**ENTRY, "label": ["e"]}), r":2: key 'label' holds list, and a string"),
    "two objects in a line": (json.dumps(ENTRY) * 2, r"train.jsonl:2: not JSON"),
    "a wrong label": (
        json.dumps({**ENTRY, "label": "x"}),
        r"train.jsonl:2: label 'x' is not one of ANLI-R1's: e, n, c",
    ),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects(place, capsys, kind):
    line, message = OBJECTS[kind]
    write(place / "glue" / "anli_v1.0" / "R1" / "train.jsonl", json.dumps(ENTRY), line)
    assert re.search(message, refused(place, capsys, "--rounds", "R1", main=anli_main))


def test_votes_that_are_no_list(place, capsys):
    entry = {"gold_label": "neutral", "pairID": "p", "sentence1": "a", "sentence2": "b", "annotator_labels": "neutral"}
    write(place / "glue" / "snli_1.0" / "snli_1.0_dev.jsonl", json.dumps(entry))
    assert re.search(r":1: key 'annotator_labels' holds str, and a list", refused(place, capsys, task="SNLI"))


def test_dev_ids_of_another_kind(place, capsys):
    write(
        place / "glue" / "MRPC" / "msr_paraphrase_train.txt",
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "1\t1\t2\ta\tb",
    )
    write(place / "glue" / "MRPC" / "dev_ids.tsv", "1 2")
    assert re.search(r"dev_ids.tsv:1: 1 tab-separated columns, and 2", refused(place, capsys, task="MRPC"))


def test_file_that_cannot_be_read(place, capsys):
    train(place).unlink()
    train(place).symlink_to(train(place))  # a loop: as good as missing, the other splits go on
    (place / "glue" / "RTE" / "test.tsv").unlink()
    (place / "glue" / "RTE" / "dev.tsv").unlink()
    assert re.search(r"RTE: --data-dir holds no files of RTE; expected dev.tsv, test.tsv", refused(place, capsys))


# Flags ------------------------------------------------------------------------------------------------------------

FLAGS = {
    "unknown task": (["--task", "RTF"], r"--task is 'RTF'; it must be a list, each once, of CoLA, SST-2, .*, or all"),
    "task twice": (["--task", "RTE,rte"], r"--task is 'RTE,rte'; it must be a list, each once, of"),
    "task that is not there": (["--task", "QNLI"], r"QNLI: --data-dir holds no files of QNLI; expected dev.tsv"),
    "no such data folder": (["--data-dir", "nowhere"], r"nowhere: --data-dir: no such folder"),
    "no such BPE folder": (["--bpe-dir", "nowhere"], r"nowhere: --bpe-dir: no such folder"),
    "unknown BPE": (["--bpe", "gpt3"], r"--bpe is 'gpt3'; it must be one of gpt2, sentencepiece, bert"),
    "no workers": (["--workers", "0"], r"--workers is '0'; it must be a whole number from 1"),
    "workers in words": (["--workers", "two"], r"--workers is 'two'; it must be a whole number from 1"),
    "seed": (["--seed", "-1"], r"--seed is '-1'"),
    "too few tokens": (["--max-tokens", "5"], r"--max-tokens is 5; it must be at least 6"),
    "tokens in words": (["--max-tokens", "many"], r"--max-tokens is 'many'"),
    "fraction above 1": (["--subsample", "0.1,2"], r"--subsample is '0.1,2'; '2' must be above 0 and at most 1"),
    "fraction 0": (["--subsample", "0"], r"--subsample is '0'"),
    "fraction in words": (["--subsample", "half"], r"--subsample is 'half'"),
    "fraction twice": (["--subsample", "0.1,0.10"], r"each fraction must stand there once"),
    "another BPE's files": (["--bpe", "bert"], r"bpe/vocab.txt: is missing; --bpe bert needs vocab.txt, dict.txt"),
    "no sentencepiece model": (["--bpe", "sentencepiece"], r"needs exactly one file \*.model in --bpe-dir, found none"),
}


@pytest.mark.parametrize("kind", FLAGS)
def test_flags(place, capsys, kind):
    flags, message = FLAGS[kind]
    assert re.search(message, refused(place, capsys, *flags))


ANLI_FLAGS = {
    "unknown round": (["--rounds", "R4"], r"--rounds is 'R4'; it must be a list, each once, of R1, R2, R3"),
    "no round": (["--rounds", ","], r"--rounds is ','; it must be a list, each once, of R1"),
    "round twice": (["--rounds", "R1,r1"], r"each once"),
    "unknown companion": (["--with", "RTE"], r"--with is 'RTE'; it must be a list, each once, of MNLI, SNLI, FEVER"),
    "weight of a part not used": (
        ["--rounds", "R1", "--weights", "R2=3"],
        r"--weights is 'R2=3'; 'R2' must be one of R1",
    ),
    "weight 0": (["--weights", "R1=0"], r"--weights is '0'; it must be a whole number from 1"),
}


@pytest.mark.parametrize("kind", ANLI_FLAGS)
def test_anli_flags(place, capsys, kind):
    flags, message = ANLI_FLAGS[kind]
    assert re.search(message, refused(place, capsys, *flags, main=anli_main))


def test_subsets_without_a_training_part(place, capsys):
    train(place).unlink()
    assert re.search(r"--subsample needs the training part of RTE", refused(place, capsys, "--subsample", "0.1"))


# Encoder files ----------------------------------------------------------------------------------------------------

BPE_FILES = {
    "encoder.json missing": ("encoder.json", None, r"encoder.json: is missing; --bpe gpt2 needs"),
    "dict.txt missing": ("dict.txt", None, r"dict.txt: is missing"),
    "encoder.json is no JSON": ("encoder.json", "x", r"encoder.json:1: cannot be read as JSON"),
    "encoder.json is a list": ("encoder.json", "[1]", r"encoder.json: holds a list, and a JSON object"),
    "encoder.json of another BPE": ("encoder.json", '{"a": 1}', r"encoder.json: has no entry for 255 of the 256 bytes"),
    "vocab.bpe of another kind": ("vocab.bpe", "#version\n[UNK]\n", r"vocab.bpe:2: '\[UNK\]' is not a merge"),
    "vocab.bpe with other merges": ("vocab.bpe", "#version\nd o\n", r"encoder.json: has no entry for 'do'"),
    "dict.txt without counts": ("dict.txt", "262\n", r"dict.txt:1: '262' is not `symbol count`"),
    "dict.txt with a symbol twice": ("dict.txt", "1 1\n1 1\n", r"dict.txt:2: symbol '1' was there already"),
    "dict.txt of another BPE": ("dict.txt", "the 1\n", r"dict.txt: lacks \d+ of \d+ symbols .* another BPE"),
    "dict.txt empty": ("dict.txt", "", r"dict.txt: is empty"),
    "bpe.json that says bert": ("bpe.json", '{"bpe": "bert"}', r"bpe.json: says bert, and --bpe says gpt2"),
    "bpe.json that says nothing": ("bpe.json", "{}", r"bpe.json: it must be an object such as"),
    "bpe.json with a word for truth": ("bpe.json", '{"bpe": "gpt2", "lowercase": "no"}', r"lowercase is 'no'"),
}


@pytest.mark.parametrize("kind", BPE_FILES)
def test_bpe_files(place, capsys, kind):
    name, content, message = BPE_FILES[kind]
    if content is None:
        (place / "bpe" / name).unlink()
    else:
        (place / "bpe" / name).write_text(content)
    assert re.search(message, refused(place, capsys, "--bpe", "gpt2"))


def test_bert_vocabulary_of_another_kind(place, capsys):
    make_bert_bpe(place / "bert")
    write(place / "bert" / "vocab.txt", "the", "a")
    assert re.search(r"vocab.txt: has no \[UNK\]", refused(place, capsys, "--bpe-dir", str(place / "bert")))


def test_sentencepiece_model_of_another_kind(place, capsys):
    make_sentencepiece(place / "spm")
    (place / "spm" / "spm.model").write_bytes(b"nothing of the kind")
    line = refused(place, capsys, "--bpe-dir", str(place / "spm"), "--bpe", "sentencepiece")
    assert "spm.model: is not a sentencepiece model" in line


def die(*_):
    os._exit(9)


def test_worker_that_is_killed(place, capsys, monkeypatch):
    make_pairs(place / "glue" / "RTE", ("entailment", "not_entailment"), rows=1100)
    monkeypatch.setattr(pool, "_encode_chunk", die)
    assert "--workers is 2; one of them was killed" in refused(place, capsys, "--workers", "2")


# Where it is written ----------------------------------------------------------------------------------------------


def test_out_is_a_file(place, capsys):
    write(place / "taken", "x")
    assert re.search(r"taken: --out: a file is there", refused(place, capsys, "--out", str(place / "taken")))


def test_out_holds_other_things(place, capsys):
    line = refused(place, capsys, "--out", str(place / "glue"))
    assert re.search(r"glue: --out: this folder holds other things", line)


def test_folder_for_several_that_is_not_there_yet(place, capsys):
    write(train(place), "nothing of use")
    refused(place, capsys, "--task", "RTE,WNLI", "--out", str(place / "new" / "folder"))


def run_limited(place: Path, limit, *flags: str) -> str:
    """In a process of its own, as a user without rights would run it; the one line on standard error."""
    command = [sys.executable, str(ROOT / "examples" / "glue" / "preprocess.py"), "--task", "RTE"]
    command += ["--data-dir", str(place / "glue"), "--bpe-dir", str(place / "bpe"), *flags]
    run = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert run.returncode == 2, run.stderr
    lines = [line for line in run.stderr.splitlines() if not line.startswith("INFO:")]
    assert len(lines) == 1 and lines[0].startswith("preprocess: error: "), run.stderr
    return lines[0]


def test_full_disk(place):
    make_pairs(place / "glue" / "RTE", ("entailment", "not_entailment"), rows=800)
    before = sorted(place.iterdir())
    line = run_limited(
        place, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)), "--out", str(place / "out")
    )
    assert "out: cannot be written (File too large); nothing was kept" in line
    assert sorted(place.iterdir()) == before


def test_folder_that_is_not_writable(place):
    target = "/proc/1/out"  # not even root can make a folder there
    if not Path("/proc/1").is_dir():
        pytest.skip("no /proc")
    assert "/proc/1" in run_limited(place, None, "--out", target)
