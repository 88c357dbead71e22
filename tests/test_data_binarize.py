"""The folders that preprocess writes are those of fairseq's own route, byte for byte."""

import random

import numpy as np
import pytest
from data_samples import (
    REAL,
    STSB,
    assert_same_folder,
    cut,
    fairseq_route,
    make_gpt2_bpe,
    make_pairs,
    needs_real_files,
    prepare,
    sentence,
    write,
)

from smart_fairseq.data.binarize import label_dictionary, read_indexed, regression_text
from smart_fairseq.data.tasks import TASKS


@pytest.mark.parametrize("workers", ["1", "2"])
def test_pairs_equal_fairseqs_route(tmp_path, workers):
    bpe = make_gpt2_bpe(tmp_path / "bpe")
    # more rows than a unit of work, so that two workers have something to share
    data = make_pairs(tmp_path / "glue" / "RTE", ("entailment", "not_entailment"), rows=1200)
    ours = prepare("RTE", tmp_path / "glue", bpe, tmp_path / "RTE-bin", "--workers", workers)
    files = {"train": "train.tsv", "valid": "dev.tsv", "test": "test.tsv"}
    texts = {split: cut(data / name, (2, 3)) for split, name in files.items()}
    labels = {split: cut(data / files[split], (4,))[0] for split in ("train", "valid")}
    assert_same_folder(ours, fairseq_route(texts, labels, bpe, tmp_path / "fairseq"))


def test_single_sentences_without_header_equal_fairseqs_route(tmp_path):
    bpe = make_gpt2_bpe(tmp_path / "bpe")
    generator = random.Random(3)
    folder = tmp_path / "glue" / "CoLA"
    for split in ("train", "dev"):
        write(folder / f"{split}.tsv", *(f"gj04\t{number % 3 % 2}\t\t{sentence(generator)}" for number in range(20)))
    write(folder / "test.tsv", "index\tsentence", *(f"{number}\t{sentence(generator)}" for number in range(9)))
    ours = prepare("CoLA", tmp_path / "glue", bpe, tmp_path / "CoLA-bin")
    texts = {"train": cut(folder / "train.tsv", (4,), False), "valid": cut(folder / "dev.tsv", (4,), False)}
    texts["test"] = cut(folder / "test.tsv", (2,))
    labels = {"train": cut(folder / "train.tsv", (2,), False)[0], "valid": cut(folder / "dev.tsv", (2,), False)[0]}
    assert_same_folder(ours, fairseq_route(texts, labels, bpe, tmp_path / "fairseq"))


def test_regression_equals_fairseqs_route(tmp_path):
    bpe = make_gpt2_bpe(tmp_path / "bpe")
    generator = random.Random(4)
    folder = tmp_path / "glue" / "STS-B"
    header = "\t".join(STSB)
    scores = ["0", "0.067", "0.40", "1", "2.5", "3.800", "4.2857", "5.000", "3.3333333", "0.0001"]
    for split in ("train", "dev", "test"):
        rows = [
            f"{number}\tg\tf\ty\t{number}\tnone\tnone\t{sentence(generator)}\t{sentence(generator)}"
            + ("" if split == "test" else f"\t{score}")
            for number, score in enumerate(scores)
        ]
        write(folder / f"{split}.tsv", header + ("" if split == "test" else "\tscore"), *rows)
    ours = prepare("STS-B", tmp_path / "glue", bpe, tmp_path / "STS-B-bin")
    files = {"train": "train.tsv", "valid": "dev.tsv", "test": "test.tsv"}
    texts = {split: cut(folder / name, (8, 9)) for split, name in files.items()}
    labels = {split: cut(folder / files[split], (10,))[0] for split in ("train", "valid")}
    assert_same_folder(ours, fairseq_route(texts, labels, bpe, tmp_path / "fairseq", regression=True))


@needs_real_files
@pytest.mark.parametrize("task, columns, label", [("RTE", (2, 3), 4), ("STS-B", (8, 9), 10), ("CoLA", (4,), 2)])
def test_real_files_equal_fairseqs_route(tmp_path, task, columns, label):
    ours = prepare(task, REAL / "glue_data", REAL / "gpt2_bpe", tmp_path / "ours", "--workers", "2")
    folder, header = REAL / "glue_data" / task, task != "CoLA"
    texts = {"train": cut(folder / "train.tsv", columns, header), "valid": cut(folder / "dev.tsv", columns, header)}
    if (folder / "test.tsv").exists():
        texts["test"] = cut(folder / "test.tsv", (2,) if task == "CoLA" else columns)
    labels = {
        "train": cut(folder / "train.tsv", (label,), header)[0],
        "valid": cut(folder / "dev.tsv", (label,), header)[0],
    }
    route = fairseq_route(texts, labels, REAL / "gpt2_bpe", tmp_path / "fairseq", regression=task == "STS-B")
    assert_same_folder(ours, route)


@needs_real_files
def test_real_mrpc_equals_fairseqs_route(tmp_path):
    """From Microsoft's files, against the TSVs that GLUE's download script makes of them."""
    source = REAL / "glue_data" / "MRPC"
    folder = tmp_path / "glue" / "MRPC"
    folder.mkdir(parents=True)
    for name in ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt"):
        (folder / name).symlink_to(source / name)
    rows = [
        line.strip().split("\t")
        for line in (source / "msr_paraphrase_train.txt").read_text(encoding="utf-8-sig").splitlines()[1:]
    ]
    dev = {(row[1], row[2]) for row in random.Random(0).sample(rows, 408)}
    write(folder / "dev_ids.tsv", *("\t".join(pair) for pair in dev))
    ours = prepare("MRPC", tmp_path / "glue", REAL / "gpt2_bpe", tmp_path / "ours", "--workers", "2")
    parts = {"train": [row for row in rows if (row[1], row[2]) not in dev]}
    parts["valid"] = [row for row in rows if (row[1], row[2]) in dev]
    assert (len(parts["train"]), len(parts["valid"])) == (3668, 408)
    test = (source / "msr_paraphrase_test.txt").read_text(encoding="utf-8-sig").splitlines()[1:]
    parts["test"] = [line.strip().split("\t") for line in test]
    texts = {split: [[row[3] for row in part], [row[4] for row in part]] for split, part in parts.items()}
    labels = {split: [row[0] for row in parts[split]] for split in ("train", "valid")}
    assert_same_folder(ours, fairseq_route(texts, labels, REAL / "gpt2_bpe", tmp_path / "fairseq"))


def test_large_dictionary_takes_four_bytes_like_fairseqs(tmp_path):
    bpe = make_gpt2_bpe(tmp_path / "bpe")
    with open(bpe / "dict.txt", "a") as dictionary:
        dictionary.writelines(f"more{number} 0\n" for number in range(66000))
    make_pairs(tmp_path / "RTE", ("entailment", "not_entailment"))
    ours = prepare("RTE", tmp_path / "RTE", bpe, tmp_path / "RTE-bin")
    columns = {"train": cut(tmp_path / "RTE" / "train.tsv", (2, 3))}
    route = fairseq_route(columns, {"train": ["x"]}, bpe, tmp_path / "fairseq")
    for name in ("input0/train.bin", "input1/train.idx", "input0/dict.txt"):
        assert (ours / name).read_bytes() == (route / name).read_bytes()


def test_label_dictionary_orders():
    """Recipe tasks by frequency then name; the others keep the table's order, which roberta.large.mnli shares."""
    from collections import Counter

    assert label_dictionary(TASKS["MRPC"], Counter({"1": 5, "0": 2}))[:2] == [("1", 5), ("0", 2)]
    mnli = label_dictionary(TASKS["MNLI"], Counter(entailment=2, neutral=2, contradiction=3))
    assert [label for label, _ in mnli] == ["contradiction", "entailment", "neutral", "madeupword0000"]
    snli = label_dictionary(TASKS["SNLI"], Counter(entailment=9, neutral=2, contradiction=3))
    assert [label for label, _ in snli[:3]] == ["contradiction", "neutral", "entailment"]
    # a class that the training part lacks still gets an id
    assert label_dictionary(TASKS["RTE"], Counter(entailment=1))[:2] == [("entailment", 1), ("not_entailment", 0)]
    assert all((4 + len(label_dictionary(TASKS[name], Counter()))) % 8 == 0 for name in TASKS if TASKS[name].labels)


@pytest.mark.parametrize(
    "score, text", [("5.000", "1"), ("0", "0"), ("3.8", "0.76"), ("0.067", "0.0134"), ("2", "0.4")]
)
def test_regression_text(score, text):
    assert regression_text(score, 5.0) == text


def test_read_indexed_gives_back_the_rows(tmp_path):
    bpe = make_gpt2_bpe(tmp_path / "bpe")
    make_pairs(tmp_path / "RTE", ("entailment", "not_entailment"))
    ours = prepare("RTE", tmp_path / "RTE", bpe, tmp_path / "RTE-bin")
    from fairseq.data.indexed_dataset import MMapIndexedDataset

    fairseqs = MMapIndexedDataset(str(ours / "input1" / "valid"))
    rows = read_indexed(ours / "input1" / "valid")
    assert len(rows) == len(fairseqs) == 15
    for ours_row, fairseqs_row in zip(rows, fairseqs):
        assert np.array_equal(ours_row, fairseqs_row.numpy())
