"""`preprocess --task NAME --train FILE`: files of one's own to a data folder, through training to predictions."""

import csv
import gzip
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from data_samples import make_bert_bpe, make_gpt2_bpe, make_pairs
from toolkit import USER_DIR, error_line, saving, train

from smart_fairseq.commands import evaluate, predict
from smart_fairseq.commands.preprocess import main
from smart_fairseq.data.binarize import read_classes, read_indexed, read_manifest
from smart_fairseq.data.folders import read_ids

KINDS = ("praise", "complaint", "neither")


def rows_of(number: int) -> list[dict[str, str]]:
    return [
        {"key": f"r{place}", "first": f"a b, {place}", "second": f'"c" {place}', "kind": KINDS[place % 3]}
        for place in range(number)
    ]


def write(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    """By the file's ending, as other programs write it."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    with open(path, "w", newline="") as file:
        quoting = csv.QUOTE_MINIMAL if path.suffix == ".csv" else csv.QUOTE_NONE
        delimiter, quote = ("," if path.suffix == ".csv" else "\t"), '"' if path.suffix == ".csv" else None
        table = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, quoting=quoting, quotechar=quote)
        table.writeheader()
        table.writerows(rows)
    return path


@pytest.fixture
def bpe(tmp_path: Path) -> list[str]:
    return ["--bpe-dir", str(make_gpt2_bpe(tmp_path / "bpe"))]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl"])
def test_the_forms_hold_the_same(
    ending: str, tmp_path: Path, bpe: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Commas and quotes are text in all of them; classes by name, ids as they are named."""
    folders = []
    for form in (ending, ".jsonl"):
        file = write(tmp_path / f"train{form}", rows_of(12))
        out = tmp_path / f"out{form}"
        flags = [
            "--train",
            str(file),
            "--text",
            "first,second",
            "--label",
            "Kind",
            "--id",
            "KEY",
        ]
        assert main(["--task", "mine", *flags, *bpe, "--out", str(out)]) == 0
        folders.append(out)
    said = capsys.readouterr().out
    assert "mine: classes 0 complaint, 1 neither, 2 praise" in said
    assert "--num-classes 3 --init-token 0 --separator-token 2" in said and "--disable-validation" in said
    for place in range(2):
        one, other = ([row.tolist() for row in read_indexed(folder / f"input{place}" / "train")] for folder in folders)
        assert one == other and len(one) == 12
    assert read_classes(folders[0] / "label" / "train") == [
        {"praise": 2, "complaint": 0, "neither": 1}[KINDS[n % 3]] for n in range(12)
    ]
    assert (folders[0] / "ids" / "train.tsv").read_text().splitlines()[3].startswith("r2\t")
    manifest = read_manifest(folders[0])
    assert (manifest["task"], manifest["labels"]) == ("mine", ["complaint", "neither", "praise"])


def test_numbers_sort_as_numbers_and_scores_are_a_regression(
    tmp_path: Path, bpe: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "n.jsonl"
    path.write_text("".join(json.dumps({"text": f"a {n}", "label": n, "id": n}) + "\n" for n in (10, 9.0, 2, 9.5)))
    flags = ["--task", "mine", "--train", str(path), "--text", "text", *bpe, "--out", str(tmp_path / "out")]
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert "classes 0 2, 1 9, 2 9.5, 3 10" in said
    assert "labels are numbers, and each is a class; --scores MAX makes a regression of them" in said
    assert "nothing to validate on: the result is checkpoint_last.pt; --hold-out 0.1 sets" in said
    assert main([*flags, "--scores", "10"]) == 0
    assert "--regression-target --report-pearson-and-spearman" in capsys.readouterr().out
    assert (tmp_path / "out" / "label" / "train.label").read_text().split() == ["1", "0.9", "0.2", "0.95"]
    assert "score '10' is not a number from 0 to 9" in error_line("preprocess", main, [*flags, "--scores", "9"], capsys)


def test_rows_to_predict_may_lack_labels(tmp_path: Path, bpe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Some of them, all, or the column, which is said: it might be misspelled."""
    flags = ["--task", "mine", "--text", "text", "--labels", "x,y", *bpe, "--out", str(tmp_path / "out")]
    for text, labelled in (("a,x\nb,\n", False), ("a,\nb,\n", False), ("a,x\nb,y\n", True)):
        (tmp_path / "t.csv").write_text(f"text,label\n{text}")
        assert main([*flags, "--test", str(tmp_path / "t.csv")]) == 0
        assert (tmp_path / "out" / "label" / "test.bin").is_file() is labelled
    assert main([*flags, "--test", str(tmp_path / "t.csv"), "--label", "Klass"]) == 0
    assert "test: no column Klass, so its rows have no labels" in capsys.readouterr().out


def test_a_text_may_begin_like_an_archive_and_be_as_long_as_a_book(tmp_path: Path, bpe: list[str]) -> None:
    """PK is the name of a column; Python's csv module takes 131,072 characters, if nobody tells it otherwise."""
    (tmp_path / "t.csv").write_text("PK,text,label\n1," + "a " * 70_000 + ",x\n2,b,y\n")
    flags = ["--task", "mine", "--text", "text", "--label", "label", *bpe, "--max-tokens", "32"]
    assert main([*flags, "--train", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out")]) == 0
    assert read_classes(tmp_path / "out" / "label" / "train") in ({0: 0, 1: 1}, [0, 1])


def test_the_named_file_is_read_and_not_the_one_beside_it(
    tmp_path: Path, bpe: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Compressed or not; of two classes that differ in case alone it is said that they do."""
    (tmp_path / "t.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"text,label\na,No\nb,no\nc,no\n"))
    flags = ["--task", "mine", "--text", "text", *bpe, "--out", str(tmp_path / "out")]
    (tmp_path / "new.csv").write_text("text\na\n")
    for name, rows in (("t.csv", 2), ("t.csv.gz", 3)):
        assert main([*flags, "--train", str(tmp_path / name), "--test", str(tmp_path / "new.csv")]) == 0
        out = capsys.readouterr().out
        assert f"mine train: {rows} rows" in out
        assert "warning: 1 of 1 rows of test are in train too" in out
        assert ("'No' and 'no' are two classes, which differ in case alone" in out) == (rows == 3)
    (tmp_path / "t.csv").unlink()
    assert "t.csv: --train: no such file" in error_line(
        "preprocess", main, [*flags, "--train", str(tmp_path / "t.csv")], capsys
    )


def test_fractions_are_written_again(tmp_path: Path, bpe: list[str]) -> None:
    file = write(tmp_path / "t.csv", rows_of(12))
    flags = ["--task", "mine", "--train", str(file), "--text", "first", "--label", "kind", *bpe]
    for more in (["--subsample", "0.5,1"], ["--subsample", "0.25"], []):
        assert main([*flags, "--out", str(tmp_path / "out"), *more]) == 0
    assert (tmp_path / "out" / "preprocess.json").is_file()


def test_a_share_is_held_out_class_by_class(tmp_path: Path, bpe: list[str]) -> None:
    """A fifth of 10 and of 5; no row in both, the same at every call, others with another seed."""
    rows = [{"text": f"a {n}", "label": "yes" if n % 3 else "no"} for n in range(15)]
    flags = ["--task", "mine", "--train", str(write(tmp_path / "t.csv", rows)), "--text", "text", *bpe]
    held = []
    for seed in ("1", "1", "2"):
        out = tmp_path / "out"
        assert main([*flags, "--hold-out", "0.2", "--seed", seed, "--out", str(out)]) == 0
        assert Counter(read_classes(out / "label" / "valid")) == {0: 1, 1: 2}
        lines = [
            [line.split("\t")[2] for line in (out / "ids" / f"{part}.tsv").read_text().splitlines()[1:]]
            for part in ("train", "valid")
        ]
        assert sorted(lines[0] + lines[1], key=int) == [str(n + 2) for n in range(15)]
        held.append(lines[1])
    assert held[0] == held[1] != held[2]


def test_an_official_task_without_a_valid_part_takes_a_share(
    tmp_path: Path, bpe: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    make_pairs(tmp_path / "RTE", ("entailment", "not_entailment"))
    (tmp_path / "RTE" / "dev.tsv").unlink()
    flags = ["--task", "RTE", "--data-dir", str(tmp_path), *bpe, "--out", str(tmp_path / "out")]
    assert main([*flags, "--hold-out", "0.2"]) == 0
    said = capsys.readouterr().out
    assert "--best-checkpoint-metric accuracy" in said and "official" not in said.partition("RTE test")[0]
    rows = read_manifest(tmp_path / "out")["rows"]
    assert rows["valid"] == round(0.2 * (rows["train"] + rows["valid"]))


def test_train_evaluate_and_predict_rows_without_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file to predict needs neither labels nor a training file beside it."""
    monkeypatch.chdir(tmp_path)
    bpe = ["--bpe-dir", str(make_bert_bpe(tmp_path / "bert"))]
    texts = ["--text", "first", "--label", "kind"]
    files = [
        "--train",
        str(write(tmp_path / "a.csv", rows_of(24))),
        "--valid",
        str(write(tmp_path / "b.csv", rows_of(9))),
    ]
    assert main(["--task", "mine", *files, *texts, *bpe]) == 0
    tiny = ["--arch", "roberta", "--encoder-layers", "1", "--encoder-embed-dim", "16", "--encoder-ffn-embed-dim", "16"]
    tiny += ["--encoder-attention-heads", "2", "--max-positions", "64", "--max-epoch", "1", "--cpu"]
    flags = ["--task", "sentence_prediction", "--num-classes", "3", "--init-token", "0", "--user-dir", USER_DIR]
    flags += ["--criterion", "smart_sentence_prediction", "--optimizer", "adam", "--lr", "1e-3", "--batch-size", "8"]
    train(["mine-bin", *flags, *tiny, *saving(tmp_path / "run"), "--num-workers", "0"])
    checkpoint = ["--checkpoint", str(tmp_path / "run" / "checkpoint_last.pt"), "--cpu"]
    capsys.readouterr()
    assert evaluate.main(["--data-dir", "mine-bin", *checkpoint]) == 0
    assert "accuracy" in capsys.readouterr().out
    new = write(tmp_path / "new.jsonl", [{"first": "a b", "key": f"n{n}"} for n in range(4)])
    assert (
        main(
            [
                "--task",
                "mine",
                "--test",
                str(new),
                *texts,
                "--id",
                "key",
                "--labels",
                "complaint,neither,praise",
                *bpe,
                "--out",
                "new-bin",
            ]
        )
        == 0
    )
    assert predict.main(["--data-dir", "new-bin", *checkpoint, "--out", "found", "--probabilities"]) == 0
    lines = (tmp_path / "found" / "mine.test.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction\tprobability of complaint\tprobability of neither\tprobability of praise"
    assert [line.split("\t")[0] for line in lines[1:]] == ["n0", "n1", "n2", "n3"]


@pytest.mark.parametrize("name", ["caf\udce9.csv", "a\tb\nc.csv"], ids=ascii)
def test_a_file_whose_name_no_table_can_hold(name: str, tmp_path: Path, bpe: list[str]) -> None:
    write(tmp_path / name, rows_of(6))
    flags = ["--train", str(tmp_path / name), "--text", "first", "--label", "kind"]
    assert main(["--task", "mine", *flags, *bpe, "--out", str(tmp_path / "o")]) == 0
    lines = (tmp_path / "o" / "ids" / "train.tsv").read_text().splitlines()
    assert len(lines) == 7 and all(line.count("\t") == 2 for line in lines)


def test_rows_that_lack_an_id_or_a_label(tmp_path: Path, bpe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An id that is null is none; labels of a part of the rows are left out, and that is said."""
    rows = [{"text": "a", "label": "x", "id": "r0"}, {"text": "b", "label": None, "id": None}, {"text": "c"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--test", str(tmp_path / "t.jsonl"), "--text", "text", "--id", "id", "--labels", "x,y"]
    assert main(["--task", "mine", *flags, *bpe, "--out", str(tmp_path / "o")]) == 0
    ids = (tmp_path / "o" / "ids" / "test.tsv").read_text().splitlines()[1:]
    assert [line.split("\t")[0] for line in ids] == ["r0", "1", "2"]
    assert "2 rows have no label, so none is written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--task", "RTE"], "--task is 'RTE'; it must be another name: that one is an official task's"),
        (["--task", "a b"], "--task is 'a b'; it must be a name of letters, digits, - and _"),
        (["--text", "words"], "--text is 'words'; it must be a column of {file}, which has key, first, second, kind"),
        (["--text", "first,first"], "--text is 'first,first'; it must be a column, or the two columns of a pair"),
        (["--label", "sort"], "--label is 'sort'; it must be a column of {file}"),
        (["--id", "number"], "--id is 'number'; it must be a column of {file}"),
        (["--label", "key"], "{file}: --label key: 12 different labels in 12 rows; name another column"),
        (["--labels", "praise,complaint"], "{file}:4: label 'neither' is not one of mine's: praise, complaint"),
        (["--labels", "praise"], "--labels is 'praise'; it must be a list of two or more classes, each once"),
        (["--scores", "0"], "--scores is '0'; it must be the largest label, above 0"),
        (["--scores", "5", "--labels", "a,b"], "--labels is given with --scores, whose labels are numbers"),
        (["--hold-out", "1"], "--hold-out is '1'; it must be a share between 0 and 1"),
        (["--hold-out", "0.01"], "--hold-out 0.01 of 12 training rows leaves one of the two parts empty"),
        (["--hold-out", "0.5", "--valid", "{file}"], "--hold-out is given, and mine has a valid split of its own"),
        (["--train", "{file}.xlsx"], "it must be a file that ends in .csv, .tsv, .jsonl, or in .gz after it"),
        (["--train", "gone.csv"], "gone.csv: --train: no such file"),
        (["--bpe-dir", ""], "--bpe-dir is not given; it names the folder of the encoder's dictionary"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes(
    flags: list[str], said: str, tmp_path: Path, bpe: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "t.csv", rows_of(12))
    given = [
        "--task",
        "mine",
        "--train",
        str(file),
        "--text",
        "first",
        "--label",
        "kind",
        *bpe,
        "--out",
        str(tmp_path / "o"),
    ]
    line = error_line("preprocess", main, [*given, *(flag.format(file=file) for flag in flags)], capsys)
    assert said.format(file=file) in line and not (tmp_path / "o").exists()


def test_files_that_are_not_in_order(tmp_path: Path, bpe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.csv"
    flags = ["--task", "mine", "--train", str(path), "--text", "text", *bpe]
    for text, said in (
        ('text,label\n"a,x\n', f"{path}:2: no comma-separated row"),
        ("text,label\na,b,x\nc,y\n", f"{path}:2: 3 comma-separated columns, and 2 are needed"),
        ("text,label\na,x\nb,x\n", f"{path}: --label label: all rows have 'x'; two classes are needed"),
        ("text,label\na,\nb,\n", f"{path}: --label label: no row has a label; two classes are needed"),
        ("text,label\na,x\nb,y\nc,\n", f"{path}:4: label '' is not one of mine's: x, y"),
    ):
        path.write_text(text)
        assert said in error_line("preprocess", main, flags, capsys)
    path.write_text("text,label\na,b,x\nc,d,y\n")
    line = error_line("preprocess", main, [*flags, "--skip-bad-rows"], capsys)
    assert f"{path}: holds no rows but 2 that were left out; the first: {path}:2: 3 comma-separated columns" in line
    path.write_text("text,label\na,x\na,b,x\nc,y\n")
    main([*flags, "--skip-bad-rows", "--out", str(tmp_path / "o")])  # an id is the position in the file
    assert read_ids(tmp_path / "o", "train") == ["0", "2"]
    for name, text, said in (
        ("t.csv", "text;label\na;x\n", "t.csv:1: columns are separated by semicolons, and commas are needed"),
        ("t.jsonl", '[{"text": "a"}]', "t.jsonl:1: a JSON list; each line must be one object"),
        ("t.jsonl", '\n\n[{"text": "a"}]', "t.jsonl:3: a JSON list; each line must be one object"),
        ("t.jsonl", '{"text": "a", "label": "x, y"}\n{"text": "b", "label": "z"}', "the class 'x, y' holds a comma"),
        ("t.csv", 'text,label\na,"x\ny"\nb,z\n', "the class 'x\\ny' holds a comma, a tab or a line break"),
        (
            "t.csv",
            "text,label\na,x\nb,<unk>\n",
            "the class '<unk>' holds a comma, a tab or a line break, or is a symbol of fairseq's own",
        ),
        (
            "t.csv",
            "text,label\na,4\nb,4.0\nc,5\n",
            "t.csv: --label label: 4 and 4.0 are one number; write it in one way",
        ),
        (
            "t.csv",
            "text,label\n" + "".join(f"a,{n / 4}\nb,{n / 4}\n" for n in range(12)),
            "12 different numbers with fr",
        ),
    ):
        (tmp_path / name).write_text(text)
        given = ["--task", "mine", "--train", str(tmp_path / name), *flags[4:]]
        assert said in error_line("preprocess", main, given, capsys)
    assert "no file is given" in error_line("preprocess", main, ["--task", "mine", *flags[4:]], capsys)
    path.write_text("text,label\na,x\nb,y\n")
    assert "name the model's classes by --labels" in error_line(
        "preprocess", main, ["--task", "mine", "--test", str(path), *flags[4:]], capsys
    )
