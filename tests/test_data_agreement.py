"""The analysis by annotators' agreement, with numbers worked out by hand."""

import json
import logging
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from data_samples import REAL, needs_real_files, write
from toolkit import error_line

from smart_fairseq.commands import agreement
from smart_fairseq.commands.agreement import GROUPS, compare, group_of
from smart_fairseq.data.readers import Row
from smart_fairseq.data.tasks import NLI_LABELS

C, N, E = NLI_LABELS
HEADER = "index\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label"
VOTES = [[E] * 5, [N, N, N, N, C], [E, E, E, N, N], [C, C, C, E, N], [E, E, N, N, C]]
GOLD = [E, N, E, C, E]


def make_mnli(folder):
    rows = ("\t".join([str(n), "a", "b", *votes, gold]) for n, (votes, gold) in enumerate(zip(VOTES, GOLD)))
    write(folder / "MNLI" / "dev_matched.tsv", HEADER, *rows)
    return folder


def make_file(path, probabilities, labels=NLI_LABELS):
    header = "\t".join(["index", "prediction", *(f"probability of {label}" for label in labels)])
    lines = (f"{n}\tx\t" + "\t".join(map(str, row)) for n, row in enumerate(probabilities))
    return write(path, header, *lines)


UNIFORM = [[1 / 3, 1 / 3, 1 / 3]] * 5


def test_groups():
    assert [group_of(votes) for votes in VOTES] == [*GROUPS, "2/2/1"]
    assert group_of([E, E, N, N]) == "2/2/0"


def test_numbers_by_hand():
    """Against a model that says (c, n, e) = (0.2, 0.3, 0.5) to everything.

    5/0/0, all entailment: cross entropy -log 0.5, annotators' entropy 0, so the divergence is the same; right.
    4/1/0, neutral and contradiction: -(0.8 log 0.3 + 0.2 log 0.2), entropy -(0.8 log 0.8 + 0.2 log 0.2); wrong.
    """
    rows = [Row(str(n), ("a", "b"), gold, tuple(votes)) for n, (votes, gold) in enumerate(zip(VOTES, GOLD))]
    found = compare(NLI_LABELS, rows, np.array([[0.2, 0.3, 0.5]] * 5))
    assert list(found) == ["all", *GROUPS]
    assert [found[group].rows for group in found] == [5, 1, 1, 1, 1]  # two against two against one is in no group
    assert found["5/0/0"].accuracy == 100 and found["4/1/0"].accuracy == 0 and found["all"].accuracy == 60
    assert found["5/0/0"].cross_entropy == pytest.approx(-math.log(0.5))
    assert found["5/0/0"].divergence == pytest.approx(-math.log(0.5))
    cross = -(0.8 * math.log(0.3) + 0.2 * math.log(0.2))
    assert found["4/1/0"].cross_entropy == pytest.approx(cross)
    assert found["4/1/0"].divergence == pytest.approx(cross + 0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    five = [*(found[group].cross_entropy for group in GROUPS), -(0.4 * math.log(0.5 * 0.3) + 0.2 * math.log(0.2))]
    assert found["all"].cross_entropy == pytest.approx(sum(five) / 5)


def test_intervals_are_those_of_the_rows():
    """Of 100 rows half are right: the mean's standard deviation is 5 %, and 1.96 of these are 9.8 %."""
    rows = [Row(str(n), ("a", "b"), (E, N)[n % 2], (E,) * 5) for n in range(100)]
    found = compare(NLI_LABELS, rows, np.array([[0.2, 0.3, 0.5]] * 100))["5/0/0"]
    low, high = found.intervals["accuracy"]
    assert found.accuracy == 50 and 39 < low < 42 and 58 < high < 61
    assert found.intervals["cross_entropy"] == pytest.approx([-math.log(0.5)] * 2)


def test_rows_that_nobody_labelled_are_in_no_mean(tmp_path, capsys):
    data = make_mnli(tmp_path / "glue")
    with open(data / "MNLI" / "dev_matched.tsv", "a") as file:
        file.write("\t".join(["5", "a", "b", "", "", "", "", "", E]) + "\n")
    file = make_file(tmp_path / "a.tsv", [*UNIFORM, UNIFORM[0]])
    assert agreement.main(["--data-dir", str(data), "--predictions", str(file)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("MNLI valid, 5 rows; 1 that nobody labelled are left out")
    assert re.search(r"^a +all +5 ", said, re.MULTILINE)


def test_a_model_that_is_the_annotators_has_no_divergence():
    rows = [Row(str(n), ("a", "b"), gold, tuple(votes)) for n, (votes, gold) in enumerate(zip(VOTES, GOLD))]
    exact = np.array([[votes.count(label) / 5 for label in NLI_LABELS] for votes in VOTES])
    assert all(abs(group.divergence) < 1e-12 for group in compare(NLI_LABELS, rows, exact).values())


def test_command(tmp_path, capsys):
    data = make_mnli(tmp_path / "glue")
    # the order of the classes in the file counts, not the table's
    shuffled = make_file(tmp_path / "b.tsv", [[0.5, 0.2, 0.3]] * 5, labels=(E, C, N))
    plain = make_file(tmp_path / "a.tsv", [[0.2, 0.3, 0.5]] * 5)
    out = tmp_path / "numbers.json"
    flags = ["--data-dir", str(data), "--predictions", f"ours={plain}", str(shuffled), "--json", str(out)]
    assert agreement.main(flags) == 0
    said = capsys.readouterr().out
    assert said.startswith("MNLI valid, 5 rows\n") and "in all, and in no group: 1 rows with votes 2/2/1" in said
    assert re.search(r"^ours +4/1/0 +1 +0\.00 +1\.2851", said, re.MULTILINE)
    assert re.search(r"^paper: SMART +3/2/0 +67\.4 +0\.66$", said, re.MULTILINE)
    numbers = json.loads(out.read_text())
    assert list(numbers["ours"]) == ["all", *GROUPS]
    for group, found in numbers["ours"].items():
        other = numbers["b"][group]
        for metric, interval in found.pop("intervals").items():
            assert interval == pytest.approx(other["intervals"][metric]) and interval[0] <= found[metric] <= interval[1]
        assert found == pytest.approx({name: other[name] for name in found})


def test_a_path_may_have_the_sign_of_a_name(tmp_path):
    file = tmp_path / "lr=1" / "a.tsv"
    assert agreement._named([f"b={file}"]) == {"b": file}
    file.parent.mkdir()
    file.touch()
    assert agreement._named([str(file), f"b={file}"]) == {"a": file, "b": file}


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    data, file = make_mnli(tmp_path / "glue"), make_file(tmp_path / "a.tsv", UNIFORM)
    picture = tmp_path / "figures" / "agreement.png"
    flags = ["--data-dir", str(data), "--predictions", str(file), "--picture", str(picture)]
    assert agreement.main(flags) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_matplotlib_has_no_say(tmp_path, monkeypatch):
    """It tells of every font that it looks at, where something else made the log talkative."""
    pytest.importorskip("matplotlib")
    chatty = logging.getLogger("matplotlib.font_manager")
    monkeypatch.setattr(logging.getLogger(), "level", logging.DEBUG)
    logging.getLogger("matplotlib").setLevel(logging.NOTSET)
    assert chatty.isEnabledFor(logging.DEBUG)
    data, file = make_mnli(tmp_path / "glue"), make_file(tmp_path / "a.tsv", UNIFORM)
    flags = ["--data-dir", str(data), "--predictions", str(file), "--picture", str(tmp_path / "a.png")]
    assert agreement.main(flags) == 0
    assert not chatty.isEnabledFor(logging.INFO)


def test_what_the_picture_shows(tmp_path, monkeypatch):
    """Task and part, the groups' sizes, three metrics with values and intervals, the paper's two beside."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(agreement, "save", lambda figure, path: figures.append(figure))
    data, file = make_mnli(tmp_path / "glue"), make_file(tmp_path / "a.tsv", UNIFORM)
    flags = ["--data-dir", str(data), "--predictions", f"ours={file}", "--picture", str(tmp_path / "a.png")]
    assert agreement.main(flags) == 0
    (figure,) = figures
    assert figure.get_suptitle().startswith("MNLI valid, 5 rows")
    assert [axis.get_title().split()[0] for axis in figure.axes] == ["accuracy", "cross", "divergence"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()][:2] == ["all\n5 rows", "5/0/0\n1 rows"]
    assert figure.axes[0].get_yticks()[-1] == 100
    bars = [[container.get_label() for container in axis.containers] for axis in figure.axes]
    bars = [[name for name in names if not name.startswith("_")] for names in bars]
    assert bars == [["ours", *agreement.PAPER["valid"]], ["ours"], ["ours", *agreement.PAPER["valid"]]]
    assert {"97.2", "90.6", "100.0"} <= {text.get_text() for text in figure.axes[0].texts}
    assert any(type(container).__name__ == "ErrorbarContainer" for container in figure.axes[1].containers)
    pyplot.close(figure)


def test_picture_on_a_full_disk(tmp_path, capsys, monkeypatch):
    def full(_, path, **__):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(figure.Figure, "savefig", full)
    data, file = make_mnli(tmp_path / "glue"), make_file(tmp_path / "a.tsv", UNIFORM)
    picture = write(tmp_path / "figures" / "agreement.png", "old")
    assert "No space left" in refused(capsys, data, "--predictions", str(file), "--picture", str(picture))
    assert picture.read_text() == "old\n" and list(picture.parent.iterdir()) == [picture]


def test_picture_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    data, file = make_mnli(tmp_path / "glue"), make_file(tmp_path / "a.tsv", UNIFORM)
    said = refused(capsys, data, "--predictions", str(file), "--picture", str(tmp_path / "x.png"))
    assert said.startswith("agreement: error: --picture needs matplotlib")


def refused(capsys, data, *flags):
    return error_line("agreement", agreement.main, ["--data-dir", data, *flags], capsys)


ROW = "{}\tx\t0.2\t0.3\t0.5"
HOSTILE = {  # the file's lines after the header, and what must be said
    "not a number": (["0\tx\tnan\t0\t1"], "p.tsv:2: 3 probabilities with the sum 1"),
    "infinite": (["0\tx\tinf\t-inf\t1"], "p.tsv:2: 3 probabilities with the sum 1"),
    "negative": (["0\tx\t1.5\t-1\t0.5"], "p.tsv:2: 3 probabilities with the sum 1"),
    "underscores": (["0\tx\t0_0.2\t0.3\t0.5"], "p.tsv:2: 3 probabilities with the sum 1"),
    "words": (["0\tx\ta\tb\tc"], "p.tsv:2: 3 probabilities with the sum 1"),
    "a column short": (["0\tx\t0.5\t0.5"], "p.tsv:2: 3 probabilities with the sum 1"),
    "a blank line": ([""], "p.tsv:2: 3 probabilities with the sum 1"),
    "an id twice": ([ROW.format(0), ROW.format(0)], "p.tsv:3: id '0' was there already"),
    "other ids": ([ROW.format(f"x{n}") for n in range(5)], "p.tsv: holds 5 rows, .*; 5 are missing"),
    "a row more": ([ROW.format(n) for n in range(6)], "p.tsv: holds 6 rows, and the official file 5"),
    "the header alone": ([], "p.tsv: holds 0 rows, and the official file 5"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_files_of_probabilities_that_are_not_in_order(tmp_path, capsys, kind):
    lines, message = HOSTILE[kind]
    header = "\t".join(["index", "prediction", *(f"probability of {label}" for label in NLI_LABELS)])
    data, file = make_mnli(tmp_path / "glue"), write(tmp_path / "p.tsv", header, *lines)
    assert re.search(message, refused(capsys, data, "--predictions", str(file), "--json", str(tmp_path / "out")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["glue", "p.tsv"]


def test_a_picture_of_no_known_kind(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    data, file = make_mnli(tmp_path / "glue"), make_file(tmp_path / "a.tsv", UNIFORM)
    line = refused(capsys, data, "--predictions", str(file), "--picture", str(tmp_path / "x.xyz"))
    assert "x.xyz: no picture ends in .xyz; allowed: " in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tsv", "glue"]


def test_broken_input(tmp_path, capsys):
    data = make_mnli(tmp_path / "glue")
    good = make_file(tmp_path / "a.tsv", UNIFORM)
    bare = write(tmp_path / "bare.tsv", "index\tprediction", "0\tneutral")
    assert "bare.tsv:1: holds no probabilities" in refused(capsys, data, "--predictions", str(bare))
    short = make_file(tmp_path / "short.tsv", UNIFORM[:3])
    line = refused(capsys, data, "--predictions", str(short))
    assert "short.tsv: holds 3 rows, and the official file 5; 2 are missing, the first for id '3'" in line
    wrong = make_file(tmp_path / "wrong.tsv", [[0.5, 0.5, 0.5]])
    assert "wrong.tsv:2: 3 probabilities with the sum 1" in refused(capsys, data, "--predictions", str(wrong))
    again = make_file(tmp_path / "again.tsv", [[0.25] * 4], labels=(*NLI_LABELS, N))
    assert "again.tsv:1: has the classes" in refused(capsys, data, "--predictions", str(again))
    two = make_file(tmp_path / "two.tsv", [[0.5, 0.5]], labels=("0", "1"))
    assert "two.tsv:1: has the classes 0, 1, and MNLI has" in refused(capsys, data, "--predictions", str(two))
    twice = ["--predictions", f"x={good}", f"x={good}"]
    assert "names 'x' twice" in refused(capsys, data, *twice)
    assert "--split is 'dev'" in refused(capsys, data, "--predictions", str(good), "--split", "dev")
    line = refused(capsys, data, "--predictions", str(good), "--split", "valid1")
    assert "--data-dir holds no valid1 of MNLI" in line
    gone = refused(capsys, tmp_path / "gone", "--predictions", str(good))
    assert "gone: --data-dir: no such folder" in gone
    rows = "\t".join(["0", "a", "b", "perhaps", E, E, E, E, E])
    write(data / "MNLI" / "dev_matched.tsv", HEADER, rows)
    one = make_file(tmp_path / "one.tsv", UNIFORM[:1])
    assert "dev_matched.tsv:2: annotator's label 'perhaps'" in refused(capsys, data, "--predictions", str(one))


@needs_real_files
def test_real_snli_annotations(tmp_path, capsys):
    rows = agreement.annotated_rows(agreement.TASKS["SNLI"], REAL, "valid")
    groups = [group_of(row.votes) for row in rows]
    assert sum(group in GROUPS for group in groups) > 0.95 * len(rows)
