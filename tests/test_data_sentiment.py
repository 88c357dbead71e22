"""Sentences with people's ratings: fetched as data alone, read, split by hash, written beside what the raters said."""

import hashlib
import io
import os
import re
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from data_samples import ROOT, Sentence, make_bert_bpe, prepare, with_ratings, write
from toolkit import error_line

from smart_fairseq.commands import download, ratings
from smart_fairseq.commands.preprocess import glue_main
from smart_fairseq.data.readers import read_task
from smart_fairseq.data.sentiment import shares, split_of
from smart_fairseq.data.tasks import SENTIMENT, TASKS
from smart_fairseq.errors import UsageError
from smart_fairseq.package_index import fetch_file

REAL_ARCHIVE = os.environ.get("SMART_VADER_ARCHIVE", "")
MOVIE = TASKS["movie"].splits["train"][0]


def many(count: int = 60) -> list[Sentence]:
    return [(str(n), f"sentence number {n}", [3, 2, 0] if n % 3 else [-3, 0, -1]) for n in range(1, count + 1)]


def everything(folder: Path, name: str = "movie", **more: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """All rows of a task by id, with their split, and the counts of what was left out."""
    rows, reports = read_task(TASKS[name], folder, **more)
    left_out: dict[str, int] = {}
    for report in reports.values():
        for reason, number in report.left_out.items():
            left_out[reason] = left_out.get(reason, 0) + number
    return {row.id: (split, row) for split, found in rows.items() for row in found}, left_out


# --- reading ---------------------------------------------------------------------------------------


def test_sign_of_the_mean_and_the_mean(tmp_path: Path) -> None:
    """(4 + 3 + 1) / 4 = 2 is positive and 6 of 0 to 8; 1 / 2 and -1 / 2 still count; 1 / 3 does not."""
    rows = [("a", "so good", [4, 3, 1, 0]), ("b", "fair", [1, 0]), ("c", "poor", [-1, 0]), ("d", "well", [1, 0, 0])]
    folder = with_ratings(tmp_path, many() + rows)
    found, left_out = everything(folder)
    assert {name: found[name][1].label for name in "abc"} == {"a": "positive", "b": "positive", "c": "negative"}
    assert left_out == {"mean between -0.5 and 0.5": 1} and "d" not in found
    scores, left_out = everything(folder, "movie-score")
    assert left_out == {} and len(scores) == 64
    assert [float(scores[name][1].label) for name in "abcd"] == pytest.approx([6, 4.5, 3.5, 4 + 1 / 3], abs=1e-6)
    assert scores["a"][1].votes == ("4", "3", "1", "0")


def test_entities_and_white_space(tmp_path: Path) -> None:
    rows = [("a", " A.T.&amp;T. &lt;3 caf\u00e9 ", [2]), ("b", "Lord &amp;amp; Taylor", [2])]
    found, _ = everything(with_ratings(tmp_path, many() + rows))
    assert found["a"][1].texts == ("A.T.&T. <3 caf\u00e9",) and found["b"][1].texts == ("Lord & Taylor",)


def test_the_same_sentence_is_kept_once_and_not_with_two_labels(tmp_path: Path) -> None:
    rows = [("a", "Great film", [3]), ("b", "great  FILM ", [2]), ("c", "mixed", [3]), ("d", "Mixed", [-3])]
    rows += [("e", "Half", [0]), ("f", "half", [2]), ("g", "half", [2]), ("h", "twice", [1, 2]), ("i", "twice", [2, 1])]
    folder = with_ratings(tmp_path, many() + rows)
    found, left_out = everything(folder)
    assert set("abcdefghi") & set(found) == {"a", "h"}
    assert left_out == {"the same sentence again": 2, "the same sentence with another label": 5}
    scores, left_out = everything(folder, "movie-score")
    assert set("abcdefghi") & set(scores) == {"h"}  # a mean of its own is another label
    assert left_out == {"the same sentence again": 1, "the same sentence with another label": 7}


def test_a_mean_that_is_not_that_of_the_ratings(tmp_path: Path) -> None:
    folder = with_ratings(tmp_path, many(), id7="1.25")
    for name in ("movie", "movie-score"):
        found, left_out = everything(folder, name)
        assert left_out == {"the mean beside the text is not that of the ratings": 1} and "7" not in found


def test_split_is_the_hash_of_the_words(tmp_path: Path) -> None:
    """Written out: the first 32 bits of SHA-256, their last decimal digit; 8 validates, 9 tests."""
    found, _ = everything(with_ratings(tmp_path, many(200)))
    for split, row in found.values():
        tenth = int.from_bytes(hashlib.sha256(row.texts[0].encode()).digest()[:4], "big") % 10
        assert split == {8: "valid", 9: "test"}.get(tenth, "train")
    counts = [sum(split == name for split, _ in found.values()) for name in ("train", "valid", "test")]
    assert counts[0] > 140 and min(counts) > 5


def test_split_of_a_sentence_does_not_depend_on_the_others(tmp_path: Path) -> None:
    whole, _ = everything(with_ratings(tmp_path / "whole", many(100)))
    part, _ = everything(with_ratings(tmp_path / "part", many(100)[::-1][:50]))
    assert {name: whole[name][0] for name in part} == {name: split for name, (split, _) in part.items()}
    tweets, _ = everything(with_ratings(tmp_path / "tweets", many(100), "tweet"), "tweet")
    assert {name: split for name, (split, _) in tweets.items()} == {name: split for name, (split, _) in whole.items()}


def test_variants_of_a_sentence_and_a_document_stay_together(tmp_path: Path) -> None:
    texts = [f"variant {number}" for number in range(50)]
    for text in texts:
        assert len({split_of("x", "1", kind) for kind in (text, text.upper(), f"{text}!!!", f" {text} :)")}) == 1
    assert len({split_of("x", "1", text) for text in texts}) > 1
    assert len({split_of("x", "1", "!" * number) for number in range(1, 50)}) == 3  # there are no words in these
    rows = [(f"{n % 40}_{n}", f"sentence number {n}", [2]) for n in range(400)]
    found, _ = everything(with_ratings(tmp_path, rows, "product"), "product")
    by_document: dict[str, set[str]] = {}
    for name, (split, _) in found.items():
        by_document.setdefault(name.split("_")[0], set()).add(split)
    assert len(by_document) == 40 and all(len(splits) == 1 for splits in by_document.values())
    assert {split for splits in by_document.values() for split in splits} == {"train", "valid", "test"}


BROKEN = {
    "a rating that is too high": (
        MOVIE.ratings,
        "9\t2\t1\t[2, 5]",
        r"Ratings\.txt:9: '\[2, 5\]' is not a list of",
    ),
    "a rating that is no whole number": (
        MOVIE.ratings,
        "9\t2\t1\t[2.0]",
        r"Ratings\.txt:9: .* whole numbers from -4 to 4",
    ),
    "a rating that is code": (MOVIE.ratings, "9\t2\t1\t[print(1)]", r"Ratings\.txt:9: "),
    "no ratings": (MOVIE.ratings, "9\t2\t1\t[]", r"Ratings\.txt:9: "),
    "fewer columns of ratings": (MOVIE.ratings, "9\t2", r"Ratings\.txt:9: '2' is not a list"),
    "an id twice": (MOVIE.ratings, "8\t2\t1\t[2]", r"Ratings\.txt:9: id '8' was there already"),
    "an id without ratings": (MOVIE.files[0], "99\t2\tx", r"GroundTruth\.txt:9: id '99' has no ratings in movie"),
    "a mean that is none": (MOVIE.files[0], "9\tgood\tx", r"GroundTruth\.txt:9: mean 'good' is not a number from -4"),
    "a text missing": (MOVIE.files[0], "9\t2", r"GroundTruth\.txt:9: 2 tab-separated columns, and 3 are needed"),
    "an empty text": (MOVIE.files[0], "9\t2\t ", r"GroundTruth\.txt:9: the text is empty"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_lines_that_are_not_in_order(tmp_path: Path, kind: str) -> None:
    name, line, message = BROKEN[kind]
    path = with_ratings(tmp_path, many()) / "vader_sentiment" / name
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[8] = line
    write(path, *lines)
    with pytest.raises(UsageError, match=message) as caught:
        read_task(TASKS["movie"], tmp_path)
    assert "--skip-bad-rows" in str(caught.value)
    found, left_out = everything(tmp_path, skip_bad_rows=True)
    assert set(left_out) == {"not in order (--skip-bad-rows)"} and len(found) + sum(left_out.values()) == 60


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    path = with_ratings(tmp_path, many()) / "vader_sentiment" / MOVIE.files[0]
    path.write_bytes(path.read_bytes().replace(b"number 5\r", b"caf\xe9\r"))
    with pytest.raises(UsageError, match=r"GroundTruth\.txt:5: byte 0xe9 at position .* is not UTF-8"):
        read_task(TASKS["movie"], tmp_path)


def test_a_missing_file_of_ratings_is_named(tmp_path: Path) -> None:
    (with_ratings(tmp_path, many()) / "vader_sentiment" / MOVIE.ratings).unlink()
    with pytest.raises(UsageError, match=f"holds no files of movie; expected .*{MOVIE.ratings}"):
        read_task(TASKS["movie"], tmp_path)


# --- the data folder -------------------------------------------------------------------------------


def test_shares_by_hand() -> None:
    assert shares([-1, 2, 0, 4]) == (0.375, 0.625)  # 1 1/2 and 2 1/2 of four
    assert shares([0]) == (0.5, 0.5) and shares([-4, -1]) == (1, 0)


@pytest.mark.parametrize("name", ["movie", "movie-score"])
def test_what_the_raters_said_lies_beside_the_rows(tmp_path: Path, name: str) -> None:
    rows = many(100)
    bpe = make_bert_bpe(tmp_path / "bpe")
    data = prepare(name, with_ratings(tmp_path, rows), bpe, tmp_path / "bin", "--workers", "1")
    given = {identity: votes for identity, _, votes in rows}
    for split in ("train", "valid", "test"):
        header, *lines = (data / "annotators" / f"{split}.tsv").read_text().splitlines()
        assert header == "id\tnegative\tpositive\traters\tmean\tratings"
        ids = [line.split("\t")[0] for line in (data / "ids" / f"{split}.tsv").read_text().splitlines()[1:]]
        assert [line.split("\t")[0] for line in lines] == ids
        for identity, negative, positive, raters, mean, votes in (line.split("\t") for line in lines):
            assert votes == " ".join(map(str, given[identity])) and raters == "3"
            sixths = 5 if given[identity] == [3, 2, 0] else 1
            assert float(positive) == pytest.approx(sixths / 6, abs=1e-6)
            assert float(negative) + float(positive) == pytest.approx(1, abs=2e-6)
            assert float(mean) == pytest.approx(5 / 3 if sixths == 5 else -4 / 3, abs=1e-6)
    if name == "movie":
        assert (data / "label" / "dict.txt").read_text().split()[::2][:2] == ["negative", "positive"]
    else:
        labels = (data / "label" / "test.label").read_text().split()
        assert set(labels) == {"0.708333", "0.333333"}  # (5 / 3 + 4) / 8 and (-4 / 3 + 4) / 8


def test_subsets_have_the_ratings_of_their_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bpe, folder = make_bert_bpe(tmp_path / "bpe"), with_ratings(tmp_path, [*many(100), ("d", "middle", [0])])
    data = prepare("movie", folder, bpe, tmp_path / "bin", "--workers", "1", "--subsample", "0.1,1")
    said = capsys.readouterr().out
    assert "1 left out (mean between -0.5 and 0.5)" in said and "--num-classes 2" in said
    small = (data / "0.1" / "annotators" / "train.tsv").read_text().splitlines()
    assert small[0] in (data / "1" / "annotators" / "train.tsv").read_text() and len(small) < 12
    assert set(small) <= set((data / "1" / "annotators" / "train.tsv").read_text().splitlines())


def test_no_annotators_where_rows_have_no_ratings(tmp_path: Path) -> None:
    write(tmp_path / "SST-2" / "train.tsv", "sentence\tlabel", "good\t1", "bad\t0")
    data = prepare("SST-2", tmp_path, make_bert_bpe(tmp_path / "bpe"), tmp_path / "bin", "--workers", "1")
    assert not (data / "annotators").exists()


def test_nothing_is_written_for_a_bad_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = with_ratings(tmp_path, many()) / "vader_sentiment" / MOVIE.ratings
    write(path, "1\t2\t1\t[9]")
    flags = ["--task", "movie", "--data-dir", str(tmp_path), "--bpe-dir", str(make_bert_bpe(tmp_path / "bpe"))]
    assert glue_main([*flags, "--out", str(tmp_path / "bin")]) == 2
    assert "Ratings.txt:1: '[9]' is not a list" in capsys.readouterr().err and not (tmp_path / "bin").exists()


# --- fetching --------------------------------------------------------------------------------------


def packed(files: dict[str, bytes | None]) -> bytes:
    """A tar.gz; None stands for a link to /etc/passwd."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content or b"")
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(member, io.BytesIO(content or b""))
    return buffer.getvalue()


def inner_files() -> dict[str, bytes | None]:
    return {f"hutto_ICWSM_2014/{name}": f"content of {name}".encode() for name in ratings.FILES}


def outer_files(inner: bytes) -> dict[str, bytes | None]:
    return {
        "vaderSentiment-2.5/setup.py": b"raise SystemExit(1)",
        "vaderSentiment-2.5/PKG-INFO": b"Metadata-Version: 1.1\nName: vaderSentiment\nVersion: 2.5\n",
        ratings.LICENSE: b"MIT",
        ratings.INNER: inner,
    }


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have a folder on this machine stand for the package index, with an archive in it whose SHA-256 is expected."""

    def offer(content: bytes, pinned: bool = True) -> Path:
        index = tmp_path / "index"
        index.mkdir()
        (index / "vaderSentiment-2.5.tar.gz").write_bytes(content)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(index))
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        if pinned:
            monkeypatch.setattr(ratings, "SHA256", hashlib.sha256(content).hexdigest())
        return index / "vaderSentiment-2.5.tar.gz"

    return offer


def test_one_download_for_all_four(offer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through pip itself. The archive's setup.py would leave a trace; names that lead elsewhere lead nowhere."""
    trace = tmp_path / "executed"
    names = ("../outside.txt", "/tmp/outside.txt", "hutto_ICWSM_2014/vaderSentiment.py")
    inner = inner_files() | dict.fromkeys(names, b"x")
    files = outer_files(packed(inner))
    files["vaderSentiment-2.5/setup.py"] = f"open({str(trace)!r}, 'w').close()\nraise SystemExit(1)\n".encode()
    archive = offer(packed(files))
    out = tmp_path / "data" / "glue"
    assert download.main([str(out), "--tasks", ",".join(SENTIMENT)]) == 0
    said = capsys.readouterr().out
    assert said.count("fetching") == 1 and said.count("already there") == 3
    assert not trace.exists()
    assert {path.name for path in out.iterdir()} == {"vader_sentiment"}
    folder = out / "vader_sentiment"
    assert {path.name for path in folder.iterdir()} == {*ratings.FILES, "LICENSE.txt"}
    for name in ratings.FILES:
        assert (folder / name).read_text() == f"content of {name}"
    archive.unlink()  # a second run needs no index
    assert download.main([str(out), "--tasks", "tweet"]) == 0
    assert "tweet: already there" in capsys.readouterr().out


def test_files_of_others_in_the_folder_stay(offer: Any, tmp_path: Path) -> None:
    offer(packed(outer_files(packed(inner_files()))))
    write(tmp_path / "vader_sentiment" / "notes.txt", "mine")
    assert download.main([str(tmp_path), "--tasks", "movie"]) == 0
    assert (tmp_path / "vader_sentiment" / "notes.txt").read_text() == "mine\n"
    assert len(list((tmp_path / "vader_sentiment").iterdir())) == 10


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    out = tmp_path / "data"
    line = error_line("download", download.main, [out, "--tasks", "movie"], capsys)
    assert not out.exists()
    return line


def test_an_archive_that_is_another(offer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    offer(packed(outer_files(packed(inner_files()))), pinned=False)
    assert "is not the file whose SHA-256 stands in smart_fairseq/commands/ratings.py; nothing was kept" in refused(
        tmp_path, capsys
    )


def test_an_index_without_it(offer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    offer(b"").unlink()
    line = refused(tmp_path, capsys)
    assert "could not be fetched from the Python package index (ERROR: No matching distribution" in line
    assert "connect to the network and run download again" in line


def archives() -> dict[str, tuple[bytes, str]]:
    whole, first = outer_files(packed(inner_files())), f"hutto_ICWSM_2014/{ratings.FILES[0]}"
    return {
        "no inner archive": (packed({**whole, ratings.INNER: None}), f"holds no file {ratings.INNER}"),
        "no licence": (packed({k: v for k, v in whole.items() if k != ratings.LICENSE}), "holds no file vader"),
        "a file missing": (
            packed(outer_files(packed({k: v for k, v in inner_files().items() if k != first}))),
            f"holds no file {first}",
        ),
        "a link": (packed(outer_files(packed({**inner_files(), first: None}))), f"holds no file {first}"),
        "an inner archive cut short": (packed(outer_files(packed(inner_files())[:-60])), "is not a complete archive"),
        "an inner archive that is none": (packed(outer_files(b"no archive")), "is not a complete archive"),
        "cut short": (packed(whole)[:300], "is not a complete archive"),
        "no archive": (b"no archive", "is not a complete archive"),
    }


@pytest.mark.parametrize("kind", archives())
def test_archives_that_are_not_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    content, message = archives()[kind]
    archive = tmp_path / "archive.tar.gz"
    archive.write_bytes(content)
    with pytest.raises(UsageError, match=r"SHA-256 is .*, and b960c9.* is expected"):
        ratings.unpack(archive, tmp_path / "out")
    monkeypatch.setattr(ratings, "SHA256", hashlib.sha256(content).hexdigest())
    with pytest.raises(UsageError, match=message):
        ratings.unpack(archive, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["archive.tar.gz"]


def test_wheels_alone_or_source_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def called(command: list[str], **more: Any) -> Any:
        asked.append((command, more["env"], Path(command[command.index("--requirement") + 1]).read_text()))
        (Path(command[command.index("--dest") + 1]) / "file").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", called)
    monkeypatch.setenv("PYTHONPATH", "before")
    for wheel in (True, False):
        fetch_file("name==1.0 --hash=sha256:00", tmp_path, wheel, "it", "here", "try again")
    (first, plain, pin), (second, changed, _) = asked
    assert "--require-hashes" in first and "--no-deps" in first and pin == "name==1.0 --hash=sha256:00\n"
    assert first[first.index("--only-binary") + 1] == ":all:" and "--no-binary" not in first
    assert second[second.index("--no-binary") + 1] == ":all:" and "--only-binary" not in second
    assert plain["PYTHONPATH"] == "before" and changed["PYTHONPATH"].endswith(f"{os.pathsep}before")


# --- the real archive ------------------------------------------------------------------------------

COUNTS = {"movie": 10605, "product": 3708, "news": 5190, "tweet": 4200}


@pytest.mark.skipif(not REAL_ARCHIVE, reason="SMART_VADER_ARCHIVE names no vaderSentiment-2.5.tar.gz")
def test_the_real_archive(tmp_path: Path) -> None:
    readme = (ROOT / "examples" / "glue" / "README.md").read_text(encoding="utf-8")
    ratings.unpack(Path(REAL_ARCHIVE), tmp_path / "vader_sentiment")
    for name, count in COUNTS.items():
        assert sum(TASKS[name].rows.values()) == count
        line = re.search(rf"^\| {name} \|.*$", readme, re.MULTILINE)[0]  # type: ignore[index]
        for task in (TASKS[name], TASKS[f"{name}-score"]):
            rows, reports = read_task(task, tmp_path)
            assert f"| {', '.join(f'{len(found):,}' for found in rows.values())} |" in line
            for split, found in rows.items():
                assert len(found) + sum(reports[split].left_out.values()) == task.rows[split]
            keys = [[" ".join(row.texts[0].casefold().split()) for row in found] for found in rows.values()]
            assert len({key for part in keys for key in part}) == sum(map(len, keys))
            if name in ("product", "news"):
                documents = [{row.id.split("_")[0] for row in found} for found in rows.values()]
                assert len(set.union(*documents)) == sum(map(len, documents))
