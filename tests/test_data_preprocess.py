"""The command as users call it: several tasks, subsets, shortening, ANLI's mixtures, replacement of folders."""

import gzip
import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_samples import ROOT, make_anli, make_bert_bpe, make_gpt2_bpe, make_pairs, write
from hf_samples import write_hf
from processes import FORKS, join
from toolkit import error_line, saving, train

from smart_fairseq.commands.preprocess import anli_main, glue_main
from smart_fairseq.data import binarize
from smart_fairseq.data.binarize import read_indexed, read_manifest
from smart_fairseq.data.draw import nested_order, subset
from smart_fairseq.data.readers import Row
from smart_fairseq.import_hf import import_hf

RTE = ("entailment", "not_entailment")


@pytest.fixture
def bpe(tmp_path):
    return make_gpt2_bpe(tmp_path / "bpe")


@pytest.fixture
def rte(tmp_path, bpe):
    """RTE's files, and the flags that make RTE-bin of them."""
    make_pairs(tmp_path / "RTE", RTE)
    return ["--task", "RTE", "--data-dir", str(tmp_path), "--bpe-dir", str(bpe), "--out", str(tmp_path / "RTE-bin")]


def ids(folder, split):
    return [line.split("\t")[0] for line in (folder / "ids" / f"{split}.tsv").read_text().splitlines()[1:]]


def test_all_does_what_is_there_and_says_what_it_skipped(tmp_path, bpe, capsys):
    make_pairs(tmp_path / "glue" / "RTE", RTE)
    make_pairs(tmp_path / "glue" / "WNLI", ("0", "1"))
    flags = ["--data-dir", str(tmp_path / "glue"), "--bpe-dir", str(bpe), "--out", str(tmp_path / "out")]
    assert glue_main(["--task", "all", *flags]) == 0
    said = capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["RTE-bin", "WNLI-bin"]
    assert "skipped" in said and "CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, AX, SNLI, SciTail" in said
    assert "--num-classes 2 --init-token 0 --separator-token 2" in said
    # a list writes into the same kind of folder
    assert glue_main(["--task", "wnli,RTE", *flags]) == 0


def test_bert_folders_need_no_separator(tmp_path, rte, capsys):
    assert glue_main([*rte, "--bpe-dir", str(make_bert_bpe(tmp_path / "bert"))]) == 0
    assert "--separator-token" not in capsys.readouterr().out


def test_fairseq_loads_the_folder(tmp_path, rte):
    """Through its own task: tokens in RoBERTa's form, labels by their place in label/dict.txt."""
    from fairseq.data import Dictionary
    from fairseq.tasks.sentence_prediction import SentencePredictionConfig, SentencePredictionTask

    out = tmp_path / "RTE-bin"
    assert glue_main(rte) == 0
    config = SentencePredictionConfig(data=str(out), num_classes=2, init_token=0, separator_token=2, no_shuffle=True)
    config.regression_target, config.classification_head_name, config.seed = False, "head", 1
    task = SentencePredictionTask.setup_task(config)
    for split, rows in read_manifest(out)["rows"].items():
        dataset = task.load_dataset(split)
        assert len(dataset) == rows
        first, second = (read_indexed(out / name / split)[3].tolist() for name in ("input0", "input1"))
        assert dataset[3]["net_input.src_tokens"].tolist() == [0, *first, 2, *second]
        if split != "test":
            labels = Dictionary.load(str(out / "label" / "dict.txt"))
            label = (tmp_path / "RTE" / {"valid": "dev.tsv"}.get(split, "train.tsv")).read_bytes().split(b"\n")[4]
            assert labels[dataset[3]["target"].item() + labels.nspecial] == label.split(b"\t")[-1].decode()


# Shortening -------------------------------------------------------------------------------------------------------


def test_max_tokens_shortens_the_longer_text(tmp_path, bpe, capsys):
    header = "index\tsentence1\tsentence2\tlabel"
    long, short = "ab " * 40, "cd"
    rows = [f"0\t{long}\t{short}\tentailment", f"1\t{short}\t{long}\tentailment", f"2\t{long}\t{long}\tentailment"]
    write(tmp_path / "RTE" / "train.tsv", header, *rows, f"3\t{short}\t{short}\tentailment")
    flags = ["--data-dir", str(tmp_path), "--bpe-dir", str(bpe), "--out"]
    assert glue_main(["--task", "RTE", *flags, str(tmp_path / "whole")]) == 0
    assert glue_main(["--task", "RTE", *flags, str(tmp_path / "cut"), "--max-tokens", "20"]) == 0
    assert "3 rows shortened to --max-tokens" in capsys.readouterr().out
    whole = [read_indexed(tmp_path / "whole" / name / "train") for name in ("input0", "input1")]
    shortened = [read_indexed(tmp_path / "cut" / name / "train") for name in ("input0", "input1")]
    # <s> and a second </s> are added in training, so 18 remain for the two texts and their ends
    assert [len(first) + len(second) for first, second in zip(*shortened)] == [18, 18, 18, 6]
    assert [len(part[2]) for part in shortened] == [9, 9]
    for before, after in zip(whole, shortened):
        for long_row, row in zip(before, after):
            assert row[-1] == 2 and np.array_equal(row[:-1], long_row[: len(row) - 1])


# Subsets ----------------------------------------------------------------------------------------------------------


def test_subsets_are_nested_and_balanced():
    labels = ["a"] * 50 + ["b"] * 30 + ["c"] * 20
    rows = [Row(str(number), ("t",), label) for number, label in enumerate(labels)]
    order = nested_order(rows, seed=7)
    assert sorted(order) == list(range(100))
    parts = [subset(rows, fraction, order) for fraction in (0.001, 0.03, 0.3, 0.6, 0.9, 1)]
    for smaller, larger in itertools.pairwise(parts):
        assert set(smaller) < set(larger)
    assert [Counter(row.label for row in part) for part in parts[1:4]] == [
        {"a": 1, "b": 1, "c": 1},
        {"a": 10, "b": 10, "c": 10},
        {"a": 20, "b": 20, "c": 20},
    ]
    assert Counter(row.label for row in parts[4]) == {"a": 40, "b": 30, "c": 20}  # the small classes are used up
    assert len(parts[0]) == 1 and parts[5] == rows
    assert nested_order(rows, seed=7) == order != nested_order(rows, seed=8)


def test_subsample_writes_a_folder_for_each_fraction(tmp_path, bpe):
    make_pairs(tmp_path / "RTE", RTE, rows=40)
    out = tmp_path / "out"
    flags = ["--task", "RTE", "--data-dir", str(tmp_path), "--bpe-dir", str(bpe), "--out"]
    assert glue_main([*flags, str(out), "--subsample", "0.05,0.5,1", "--seed", "3"]) == 0
    assert glue_main([*flags, str(tmp_path / "whole")]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["0.05", "0.5", "1"]
    chosen = {name: set(ids(out / name, "train")) for name in ("0.05", "0.5", "1")}
    assert chosen["0.05"] < chosen["0.5"] < chosen["1"] and len(chosen["0.05"]) == 2
    # the recorded lines are the rows that were written
    source = (tmp_path / "RTE" / "train.tsv").read_text(encoding="utf-8").split("\n")
    recorded = [line.split("\t") for line in (out / "0.5" / "ids" / "train.tsv").read_text().splitlines()[1:]]
    whole = read_indexed(tmp_path / "whole" / "input0" / "train")
    for row, (identity, file, line) in zip(read_indexed(out / "0.5" / "input0" / "train"), recorded):
        assert file == "RTE/train.tsv" and source[int(line) - 1].startswith(f"{identity}\t")
        assert np.array_equal(row, whole[int(identity)])
    for name in chosen:
        # classes have the same ids everywhere, and what is not sampled is whole
        assert (out / name / "label" / "dict.txt").read_bytes() == (tmp_path / "whole/label/dict.txt").read_bytes()
        assert (out / name / "input1" / "valid.bin").read_bytes() == (tmp_path / "whole/input1/valid.bin").read_bytes()
    assert read_manifest(out / "0.5")["subsample"] == 0.5


# ANLI -------------------------------------------------------------------------------------------------------------


def test_anli_rounds_with_others(tmp_path, bpe, capsys):
    data, out = make_anli(tmp_path / "data"), tmp_path / "ANLI-bin"
    flags = ["--data-dir", str(data), "--bpe-dir", str(bpe), "--out", str(out)]
    assert anli_main([*flags, "--with", "SNLI,fever", "--weights", "R1=2"]) == 0
    assert "read SNLI train: 2 rows; 1 left out" in capsys.readouterr().out
    manifest = read_manifest(out)
    assert manifest["rows"] == {"train": 8 + 5 + 6 + 2 + 1, "valid": 9, "test": 12}
    assert manifest["parts"]["train"] == [["R1", 8], ["R2", 5], ["R3", 6], ["SNLI", 2], ["FEVER", 1]]
    assert manifest["parts"]["test"] == [["R1", 3], ["R2", 4], ["R3", 5]]
    assert manifest["labels"] == ["contradiction", "neutral", "entailment"]
    assert ids(out, "train")[-3:] == ["s0", "s2", "f0"] and ids(out, "test")[3] == "R2test0"
    (train,) = data.rglob("snli_1.0_train.jsonl")
    train.rename(train.with_name("snli_1.0_dev.jsonl"))
    line = error_line("preprocess", anli_main, [*flags, "--with", "SNLI"], capsys)
    assert line.endswith("holds no training rows of SNLI, which --with names; leave it out")
    assert anli_main([*flags, "--rounds", "R2"]) == 0
    assert read_manifest(out)["parts"]["valid"] == [["R2", 3]]


@pytest.mark.parametrize("draw, folder", [("--subsample", "0.5"), ("--hold-out", "")])
def test_drawn_rows_of_anli_make_a_folder_that_can_be_read(draw, folder, tmp_path, bpe):
    """The rounds no longer follow each other in it; in what was not drawn they do."""
    data, out = make_anli(tmp_path / "data"), tmp_path / "ANLI-bin"
    for name in ("R1", "R2", "R3") if draw == "--hold-out" else ():
        (data / "anli_v1.0" / name / "dev.jsonl").unlink()
    assert anli_main(["--data-dir", str(data), "--bpe-dir", str(bpe), "--out", str(out), draw, "0.5"]) == 0
    manifest = read_manifest(out / folder)
    assert "train" not in manifest["parts"] and manifest["parts"]["test"] == [["R1", 3], ["R2", 4], ["R3", 5]]


# Replacement ------------------------------------------------------------------------------------------------------


def test_a_new_run_replaces_the_folder_and_a_failed_one_leaves_it(tmp_path, rte, capsys):
    out = tmp_path / "RTE-bin"
    assert glue_main(rte) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    write(tmp_path / "RTE" / "dev.tsv", "index\tsentence1\tsentence2\tlabel", "0\ta\tb\tno")
    assert "dev.tsv:2: label 'no'" in error_line("preprocess", glue_main, rte, capsys)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    write(tmp_path / "RTE" / "dev.tsv", "index\tsentence1\tsentence2\tlabel", "0\ta\tb\tentailment")
    assert glue_main(rte) == 0
    assert read_manifest(out)["rows"]["valid"] == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def preprocess_and_sleep(flags, pipe):
    """The command, which says so and sleeps when it has written the valid split."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it and hands that on
    write_split = binarize.Folder.write

    def slow(self, split, *rest):
        write_split(self, split, *rest)
        if split == "valid":
            pipe.send("written")
            time.sleep(60)

    binarize.Folder.write = slow
    sys.exit(glue_main(flags))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_killed_leaves_the_old_folder(tmp_path, rte, number):
    out = tmp_path / "RTE-bin"
    assert glue_main(rte) == 0
    before = (out / "preprocess.json").stat().st_mtime_ns
    ours, theirs = FORKS.Pipe()
    run = FORKS.Process(target=preprocess_and_sleep, args=(rte, theirs))
    run.start()
    assert ours.recv() == "written"
    os.kill(run.pid, number)
    assert join([run], timeout=30)[0] not in (0, None)
    assert (out / "preprocess.json").stat().st_mtime_ns == before
    hidden = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    # only a kill that no program can notice leaves something, hidden, and the next run removes it
    assert len(hidden) == (number == signal.SIGKILL)
    time.sleep(0.1)
    assert glue_main(rte) == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_old_folder_that_a_killed_run_had_moved_aside_comes_back(tmp_path, rte):
    out = tmp_path / "RTE-bin"
    assert glue_main(rte) == 0
    number = max(int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()) + 10**6
    out.rename(tmp_path / f".RTE-bin.old-{number}")
    write(tmp_path / "RTE" / "dev.tsv", "index\tsentence1\tsentence2\tlabel", "0\ta\tb\tno")
    assert glue_main(rte) == 2  # before anything is looked for beside the folder
    (tmp_path / "RTE" / "dev.tsv").unlink()
    bad = make_bert_bpe(tmp_path / "bad")
    write(bad / "dict.txt", "nothing 1")
    assert glue_main([*rte, "--bpe-dir", str(bad)]) == 2
    assert read_manifest(out)["rows"]["train"] == 30


def test_behind_a_link(tmp_path, rte):
    (tmp_path / "other").mkdir()
    (tmp_path / "RTE-bin").symlink_to(tmp_path / "other")
    assert glue_main(rte) == 0 and glue_main(rte) == 0
    assert (tmp_path / "RTE-bin").is_symlink() and read_manifest(tmp_path / "other")["task"] == "RTE"


def test_example_scripts_run_from_anywhere(tmp_path):
    for name in ("glue", "anli"):
        script = ROOT / "examples" / name / "preprocess.py"
        run = subprocess.run(
            [sys.executable, str(script), "--help"], cwd=tmp_path, capture_output=True, text=True, env={**os.environ}
        )
        assert run.returncode == 0 and "--subsample" in run.stdout, run.stderr


@pytest.mark.parametrize("splits", [["train", "dev"], ["train"]])
def test_the_command_that_is_printed_trains_with_smart(splits, tmp_path, capsys):
    """On the encoder that lies beside the BPE; an update. Without rows to validate on it does not."""
    import_hf(write_hf(tmp_path / "hf", "bert"), tmp_path / "encoder")
    for split in splits:
        rows = (f"{number}\tthe cat a\tdog {'abcd'[number % 4]} c\t{RTE[number % 2]}" for number in range(16))
        write(tmp_path / "RTE" / f"{split}.tsv", "index\tsentence1\tsentence2\tlabel", *rows)
    flags = ["--data-dir", str(tmp_path), "--bpe-dir", str(tmp_path / "encoder"), "--out", str(tmp_path / "a bin")]
    assert glue_main(["--task", "RTE", *flags]) == 0
    program, *line = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert program == "fairseq-train" and line[line.index("--max-update") + 1] == "6"
    assert ("--disable-validation" in line) == ("--best-checkpoint-metric" not in line) == (len(splits) == 1)
    more = ["--max-update", "1", "--cpu", *saving(None), "--num-workers", "0"]
    (update,) = train([*line, *more, "--log-format", "json", "--log-interval", "1"])["train_inner"]
    assert update["smart_loss"] > 0 and update["bregman_loss"] > 0


def test_what_the_reader_of_the_data_must_know(tmp_path, bpe, capsys):
    """Empty texts are counted, one class warns, and of two forms of a file it is said which was read."""
    header = "index\tsentence1\tsentence2\tlabel"
    write(tmp_path / "RTE" / "train.tsv", header, "0\ta\tb\tentailment", "1\t \tb\tentailment")
    write(tmp_path / "RTE" / "dev.tsv", header, "0\ta\t\tentailment")
    (tmp_path / "RTE" / "train.tsv.gz").write_bytes(gzip.compress(b"nothing"))
    flags = ["--data-dir", str(tmp_path), "--bpe-dir", str(bpe), "--out", str(tmp_path / "bin"), "--workers", "1"]
    assert glue_main(["--task", "RTE", *flags]) == 0
    train_line, dev_line = capsys.readouterr().out.splitlines()[1:3]
    assert "read train.tsv and not train.tsv.gz, which is beside it" in train_line
    assert "warning: every label is entailment" in train_line and "1 rows with an empty text" in train_line
    assert "warning" not in dev_line and "1 rows with an empty text" in dev_line
