"""Readers: every form in which a task is distributed, and the oddities of real files."""

import gzip
import json

import pytest
from data_samples import REAL, STSB, needs_real_files, write

from smart_fairseq.data.readers import find_sources, read_lines, read_task
from smart_fairseq.data.tasks import ANLI, GLUE, NLI_LABELS, TASKS
from smart_fairseq.errors import UsageError


def read(name, folder, **more):
    rows, reports = read_task(TASKS[name], folder, **more)
    assert reports.keys() == rows.keys()
    return rows, reports


def essence(rows):
    return [(row.id, *row.texts, row.label) for row in rows]


def columns(path, header, *rows, **more):
    return write(path, "\t".join(header), *("\t".join(row) for row in rows), **more)


# Lines ------------------------------------------------------------------------------------------------------------


def test_lines_end_at_line_feeds_only(tmp_path):
    path = tmp_path / "f"
    path.write_bytes("\ufeffa\u2028b\r\nc\rd\x0be\x85f\n\n last".encode())
    assert list(read_lines(path)) == [(1, "a\u2028b"), (2, "c\rd\x0be\x85f"), (3, ""), (4, " last")]


def test_gzip_is_read(tmp_path):
    (tmp_path / "RTE").mkdir()
    with gzip.open(tmp_path / "RTE" / "test.tsv.gz", "wt") as file:
        file.write("index\tsentence1\tsentence2\n0\ta\tb\n")
    assert essence(read("RTE", tmp_path)[0]["test"]) == [("0", "a", "b", None)]


def test_quotes_are_text_and_carriage_returns_inside_are_space(tmp_path):
    header = ("index", "question", "sentence", "label")
    path = tmp_path / "QNLI" / "train.tsv"
    columns(path, header, ("0", '"Who', 'said "hi', "entailment"), ("1", "a\rb", '""', "not_entailment"))
    assert essence(read("QNLI", tmp_path)[0]["train"]) == [
        ("0", '"Who', 'said "hi', "entailment"),
        ("1", "a b", '""', "not_entailment"),
    ]


# Forms ------------------------------------------------------------------------------------------------------------


def test_cola_glue_and_release(tmp_path):
    write(tmp_path / "CoLA" / "train.tsv", "gj04\t1\t\tOne.", "gj04\t0\t*\tTwo .")
    assert essence(read("CoLA", tmp_path)[0]["train"]) == [("0", "One.", "1"), ("1", "Two .", "0")]
    raw = tmp_path / "cola_public" / "raw"
    write(raw / "in_domain_train.tsv", "gj04\t1\t\tOne.")
    write(raw / "in_domain_dev.tsv", "gj04\t1\t\tTwo.")
    write(raw / "out_of_domain_dev.tsv", "clc95\t0\t*\tThree.")
    rows, _ = read("CoLA", tmp_path / "cola_public")
    assert essence(rows["valid"]) == [("0", "Two.", "1"), ("1", "Three.", "0")]


def test_sst2(tmp_path):
    columns(tmp_path / "SST-2" / "train.tsv", ("sentence", "label"), ("fine ", "1"))
    columns(tmp_path / "SST-2" / "test.tsv", ("index", "sentence"), ("0", "bad"))
    rows, _ = read("SST-2", tmp_path / "SST-2")
    assert essence(rows["train"]) == [("0", "fine ", "1")]
    assert essence(rows["test"]) == [("0", "bad", None)]


MRPC = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")


def test_mrpc_tsv_with_mark(tmp_path):
    columns(tmp_path / "MRPC" / "train.tsv", MRPC, ("1", "7", "8", "a", "b"), mark=True)
    columns(tmp_path / "MRPC" / "test.tsv", ("index", *MRPC[1:]), ("0", "7", "8", "a", "b"))
    rows, _ = read("MRPC", tmp_path)
    assert essence(rows["train"]) == [("0", "a", "b", "1")]
    assert essence(rows["test"]) == [("0", "a", "b", None)]


def test_mrpc_release_with_and_without_dev_ids(tmp_path):
    rows = (("1", "1", "2", "a", "b"), ("0", "3", "4", "c", "d"), ("1", "5", "6", "e", "f"))
    columns(tmp_path / "MRPC" / "msr_paraphrase_train.txt", MRPC, *rows, mark=True, end="\r\n")
    columns(tmp_path / "MRPC" / "msr_paraphrase_test.txt", MRPC, *rows, mark=True, end="\r\n")
    without, _ = read("MRPC", tmp_path)
    assert {split: len(part) for split, part in without.items()} == {"train": 3, "test": 3}
    # the answers of the test part are in this release, and stay unread
    assert [row.label for row in without["test"]] == [None] * 3
    write(tmp_path / "MRPC" / "dev_ids.tsv", "3\t4", "9\t9")
    given, _ = read("MRPC", tmp_path)
    assert [row.texts for row in given["train"]] == [("a", "b"), ("e", "f")]
    assert [row.texts for row in given["valid"]] == [("c", "d")]


def test_stsb_glue_and_benchmark(tmp_path):
    columns(tmp_path / "STS-B" / "dev.tsv", (*STSB, "score"), ("0", "g", "f", "y", "0", "n", "n", "a", "b", "4.750"))
    assert essence(read("STS-B", tmp_path)[0]["valid"]) == [("0", "a", "b", "4.750")]
    # the benchmark has no header, and some rows name their sources
    folder = tmp_path / "stsbenchmark"
    write(folder / "sts-train.csv", "g\tf\ty\t1\t2.5\ta\tb", "g\tf\ty\t2\t0.000\tc\td\thttp://x\thttp://y")
    assert essence(read("STS-B", folder)[0]["train"]) == [("0", "a", "b", "2.5"), ("1", "c", "d", "0.000")]


def test_qqp_leaves_out_rows_of_other_lengths_and_counts_them(tmp_path):
    header = ("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
    path = tmp_path / "QQP" / "train.tsv"
    columns(path, header, ("5", "1", "2", "a", "b", "0"), ("6", "1", "2", "a"), ("7", "1", "2", "a", "b", "c", "1"))
    rows, reports = read("QQP", tmp_path)
    assert essence(rows["train"]) == [("5", "a", "b", "0")]
    assert dict(reports["train"].left_out) == {"fewer than 6 columns": 1, "more than 6 columns": 1}


GLUE_MNLI = (
    "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
    "sentence1 sentence2"
).split()


def mnli_row(number, label, votes=()):
    return (str(number), "p", f"{number}e", "slate", *"xxxx", f"one {number}", f"two {number}", *votes, label)


def test_mnli_glue(tmp_path):
    folder = tmp_path / "MNLI"
    columns(folder / "train.tsv", (*GLUE_MNLI, "label1", "gold_label"), mnli_row(0, "neutral", ("neutral",)))
    votes = ("neutral", "entailment", "neutral", "neutral", "neutral")
    names = (*GLUE_MNLI, "label1", "label2", "label3", "label4", "label5", "gold_label")
    for split in ("matched", "mismatched"):
        columns(folder / f"dev_{split}.tsv", names, mnli_row(0, "neutral", votes), mnli_row(1, "-", votes))
        columns(folder / f"test_{split}.tsv", GLUE_MNLI, mnli_row(0, "")[:-1])
    rows, reports = read("MNLI", tmp_path)
    assert list(rows) == ["train", "valid", "valid1", "test", "test1"]
    assert essence(rows["valid1"]) == [("0", "one 0", "two 0", "neutral")]
    assert rows["valid"][0].votes == votes
    assert list(reports["valid"].left_out.values()) == [1]
    assert rows["test1"][0].label is None


def snli_entry(number, label, **more):
    return json.dumps(
        {"gold_label": label, "pairID": f"p{number}", "sentence1": "a\u2028b", "sentence2": "c", **more},
        ensure_ascii=False,
    )


def test_nli_releases(tmp_path):
    votes = ["neutral", "entailment", "", "", ""]
    for folder, file in (("multinli_1.0", "multinli_1.0_dev_matched.jsonl"), ("snli_1.0", "snli_1.0_dev.jsonl")):
        write(tmp_path / folder / file, snli_entry(1, "neutral", annotator_labels=votes), snli_entry(2, "-"))
    for name in ("MNLI", "SNLI"):
        rows, reports = read(name, tmp_path)
        assert essence(rows["valid"]) == [("p1", "a\u2028b", "c", "neutral")]
        assert rows["valid"][0].votes == ("neutral", "entailment")
        assert sum(reports["valid"].left_out.values()) == 1


def test_snli_tables(tmp_path):
    header = ("gold_label", "sentence1", "sentence2", "pairID", "label1", "label2", "label3", "label4", "label5")
    row = ("neutral", "a", "b", "p1", "neutral", "entailment", "", "", "")
    columns(tmp_path / "SNLI" / "snli_1.0_test.txt", header, row)
    rows, _ = read("SNLI", tmp_path)
    assert essence(rows["test"]) == [("p1", "a", "b", "neutral")]
    assert rows["test"][0].votes == ("neutral", "entailment")


def test_scitail_forms(tmp_path):
    write(tmp_path / "SciTail" / "scitail_1.0_train.tsv", 'a "\tb\tentails', "c\td\tneutral")
    assert essence(read("SciTail", tmp_path)[0]["train"]) == [("0", 'a "', "b", "entails"), ("1", "c", "d", "neutral")]
    release = tmp_path / "SciTailV1.1"
    write(release / "snli_format" / "scitail_1.0_dev.txt", snli_entry(1, "entailment"))
    assert essence(read("SciTail", release)[0]["valid"]) == [("p1", "a\u2028b", "c", "entails")]


def test_anli(tmp_path):
    entry = {"uid": "u1", "context": "a", "hypothesis": "b", "label": "e", "reason": ""}
    folder = tmp_path / "anli_v1.0" / "R2"
    write(folder / "dev.jsonl", json.dumps(entry))
    write(folder / "test.jsonl", json.dumps({**entry, "label": ""}), json.dumps({**entry, "uid": "u2", "label": None}))
    rows, _ = read("ANLI-R2", tmp_path)
    assert essence(rows["valid"]) == [("u1", "a", "b", "entailment")]
    assert [row.label for row in rows["test"]] == [None, None]


def test_fever(tmp_path):
    entry = {"cid": "1", "fid": "f1", "query": "claim", "context": "evidence", "label": "REFUTES"}
    write(tmp_path / "nli_fever" / "dev_fitems.jsonl", json.dumps(entry))
    write(tmp_path / "nli_fever" / "test_fitems.jsonl", json.dumps({**entry, "label": "hidden"}))
    rows, _ = read("FEVER", tmp_path)
    assert essence(rows["valid"]) == [("f1", "evidence", "claim", "contradiction")]
    assert rows["test"][0].label is None


@pytest.mark.parametrize("place", ["AX/AX.tsv", "AX.tsv", "MNLI/diagnostic.tsv", "diagnostic/diagnostic.tsv"])
def test_diagnostic_set_in_its_places(tmp_path, place):
    columns(tmp_path / place, ("index", "sentence1", "sentence2"), ("0", "a", "b"))
    assert essence(read("AX", tmp_path)[0]["test"]) == [("0", "a", "b", None)]


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path):
    header = ("index", "sentence1", "sentence2", "label")
    path = tmp_path / "RTE" / "train.tsv"
    columns(path, header, ("0", "a", "b", "entailment"), ("1", "a", "b", "maybe"), ("2", "a"))
    with pytest.raises(UsageError, match=r"train.tsv:3: label 'maybe' is not one of RTE's: entailment, not_entailment"):
        read("RTE", tmp_path)
    rows, reports = read("RTE", tmp_path, skip_bad_rows=True)
    assert len(rows["train"]) == 1
    assert sum(reports["train"].left_out.values()) == 2
    columns(path, header, ("1", "a", "b", "maybe"), ("2", "a"))
    with pytest.raises(UsageError, match=r"holds no rows but 2 that were left out; the first: .*tsv:2: label 'maybe'"):
        read("RTE", tmp_path, skip_bad_rows=True)


def test_ids_and_votes_are_read_where_they_are(tmp_path):
    header = ("sentence1", "sentence2", "gold_label")
    columns(
        tmp_path / "MNLI" / "dev_matched.tsv", header, ("a", "b", "neutral"), ("c", "d", "-"), ("e", "f", "neutral")
    )
    rows, _ = read("MNLI", tmp_path)
    assert essence(rows["valid"]) == [("0", "a", "b", "neutral"), ("1", "e", "f", "neutral")]
    assert rows["valid"][0].votes == ()


# The table ---------------------------------------------------------------------------------------------------------


def test_table_is_consistent():
    for task in TASKS.values():
        assert task.num_classes == (1 if task.ranking else len(task.labels) or 1)
        assert set(task.submission) <= {split for split in task.splits if split.startswith("test")}
        for sources in task.splits.values():
            # alignment makes three texts of a pronoun's two (WSC has them in its spans)
            assert task.candidates or all(len(source.texts) == task.texts for source in sources)
            assert all(set(source.label_words.values()) <= set(task.labels) for source in sources)
    assert {name for task in GLUE for name in TASKS[task].submission.values()} == {
        *("CoLA.tsv", "SST-2.tsv", "MRPC.tsv", "STS-B.tsv", "QQP.tsv", "MNLI-m.tsv", "MNLI-mm.tsv"),
        *("QNLI.tsv", "RTE.tsv", "WNLI.tsv", "AX.tsv"),
    }
    assert all(TASKS[name].labels == NLI_LABELS for name in (*ANLI, "MNLI", "SNLI", "FEVER", "AX"))


# Real files --------------------------------------------------------------------------------------------------------


@needs_real_files
@pytest.mark.parametrize(
    "task, counts",
    [
        ("RTE", {"train": 2490, "valid": 277, "test": 3000}),
        ("MRPC", {"train": 4076, "test": 1725}),  # no dev_ids.tsv in this copy
        ("CoLA", {"train": 8551, "valid": 1043, "test": 1063}),
        ("STS-B", {"train": 5749, "valid": 1500}),
        ("WNLI", {"train": 634, "valid": 71, "test": 146}),  # one row fewer than the 635 usually quoted
    ],
)
def test_real_row_counts(task, counts):
    rows, reports = read(task, REAL / "glue_data")
    assert {split: len(part) for split, part in rows.items()} == counts
    assert not any(report.left_out for report in reports.values())


@needs_real_files
def test_real_nli_files():
    for name in ("ANLI-R1", "ANLI-R2"):
        assert len(read(name, REAL)[0]["valid"]) == 1000
    rows, reports = read("SNLI", REAL)
    assert len(rows["valid"]) == 1273
    assert sum(reports["valid"].left_out.values()) == 16
    assert {len(row.votes) for row in rows["valid"]} <= {1, 4, 5}


@needs_real_files
def test_real_samples_of_each_form():
    for name in ("MNLI", "QNLI", "QQP", "SST-2", "SNLI", "SciTail", "MRPC", "STS-B"):
        rows, reports = read(name, REAL / "format_samples")
        assert set(rows) == set(TASKS[name].splits), name
        for split, part in rows.items():
            assert not reports[split].left_out
            assert all(all(text.strip() for text in row.texts) for row in part)
            labelled = split in ("train", "valid", "valid1") or name in ("SNLI", "SciTail")
            assert all((row.label is not None) == labelled for row in part), (name, split)
    assert find_sources(TASKS["RTE"], REAL / "format_samples") == {}
