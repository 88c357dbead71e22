"""Numbers of a study, against values worked out by hand: scores of logits, differences with intervals, tables."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toolkit import ROOT

from smart_fairseq.errors import UsageError
from smart_fairseq.study import document, scores
from smart_fairseq.study.arms import arms_of, difference, half_width
from smart_fairseq.study.lines import read_lines, write_lines
from smart_fairseq.study.plan import read_plan

PLAN = """
out: {folder}/out
train: {{epochs: 1}}
tasks:
  movie: {{data: /nowhere}}
methods:
  plain: {{criterion: sentence_prediction, optimizer: adam}}
  smooth: {{criterion: smart_sentence_prediction, optimizer: adam}}
seeds: [1, 2, 3]
grid:
  - lr: [1, 2]
  - {{methods: [smooth], smart-epsilon: [0.1, 0.2]}}
"""
# by (method, lr, epsilon): accuracies of seeds 1, 2, 3
ACCURACIES = {
    ("plain", 1, None): (70, 72, 77),
    ("plain", 2, None): (60, 60, 60),
    ("smooth", 1, 0.1): (71, 74, 80),
    ("smooth", 2, 0.1): (60, 61, 62),
}


def logits_of(*probabilities: float) -> np.ndarray:
    """Of two classes, from the probability of class 1."""
    p = np.array(probabilities)
    return np.log(np.stack([1 - p, p], axis=1))


BEGIN, END = "<!-- study:movie {} begin -->", "<!-- study:movie end -->"


# Scores


def test_measures_by_hand() -> None:
    """Probabilities of the true class 0.95, 0.95, 0.05, 0.62 and 0.42; the calibration error in percent.

    Bins of 1/15: 0.95 is in the 15th (two of three right), 0.62 in the 10th, 0.58 in the 9th (wrong).
    """
    logits, labels = logits_of(0.95, 0.95, 0.05, 0.62, 0.42), np.array([1, 1, 1, 1, 1])
    found = scores.all_scores(logits, labels, ["accuracy"], ["a", "b"], seed=1)
    true = [0.95, 0.95, 0.05, 0.62, 0.42]
    assert found["cross_entropy"] == pytest.approx(-sum(map(math.log, true)) / 5)
    assert found["brier"] == pytest.approx(sum(2 * (1 - p) ** 2 for p in true) / 5)
    assert found["calibration_error"] == pytest.approx(100 * (3 * abs(0.95 - 2 / 3) + 0.38 + 0.58) / 5)


def test_scaled_numbers_are_of_the_half_that_was_not_fitted_on() -> None:
    draw = np.random.default_rng(1)
    labels = draw.integers(0, 3, 400)
    logits = 3 * (draw.normal(size=(400, 3)) + np.eye(3)[labels])
    found = scores.all_scores(logits, labels, ["accuracy"], ["a", "b", "c"], seed=5)
    order = np.random.default_rng(5).permutation(400)
    half = order[200:]
    assert found["cross_entropy_half"] == pytest.approx(scores.measures(logits[half], labels[half])["cross_entropy"])
    scaled = logits[half] / found["temperature"]
    assert found["calibration_error_scaled"] == pytest.approx(
        scores.measures(scaled, labels[half])["calibration_error"]
    )
    assert found["cross_entropy_scaled"] < found["cross_entropy_half"]
    assert found["accuracy"] == pytest.approx(100 * (logits.argmax(1) == labels).mean())


def test_f1_is_of_the_label_with_the_name_1_and_regression_has_its_own() -> None:
    """Predicted 1 1 0, gold 1 0 1 in names, where class 0 is called "1": F1 = 2 / (2 + 2)."""
    logits = np.array([[1.0, 0], [1, 0], [0, 1]])
    found = scores.all_scores(np.repeat(logits, 4, 0), np.repeat([0, 1, 0], 4), ["f1"], ["1", "0"], seed=1)
    assert found["f1"] == pytest.approx(50)
    found = scores.all_scores(np.array([[1.0], [2], [4]]), np.array([1.0, 2, 3]), ["pearson"], [], seed=1)
    assert found["squared_error"] == pytest.approx(1 / 3) and found["pearson"] == pytest.approx(98.198, abs=1e-3)


def test_a_regression_is_also_judged_behind_a_straight_line_that_the_other_half_fits() -> None:
    """Outputs that are half as wide as the targets and 3 too high: the line finds 2 and -6, and the noise is left."""
    draw = np.random.default_rng(2)
    labels = draw.normal(size=4000)
    noise = 0.1 * draw.normal(size=4000)
    found = scores.all_scores((labels / 2 + 3 + noise)[:, None], labels, ["pearson"], [], seed=5)
    half = np.random.default_rng(5).permutation(4000)[2000:]
    assert found["mean_error"] == pytest.approx((3 - labels / 2 + noise).mean())
    assert found["squared_error_half"] == pytest.approx(((3 - labels / 2 + noise)[half] ** 2).mean())
    shrunk = 1 / 4 / (1 / 4 + 0.01)  # the noise in what the line is drawn through makes it less steep
    assert found["slope"] == pytest.approx(2 * shrunk, rel=0.02)
    assert found["squared_error_scaled"] == pytest.approx(1 - shrunk, rel=0.1)
    flat = scores.all_scores(np.full((4, 1), 2.0), np.array([0.0, 1, 2, 3]), ["pearson"], [], seed=5)
    assert flat["slope"] == 0


# Differences


def test_paired_difference_and_its_interval() -> None:
    """Gains 1, 2, 3: mean 2, deviation 1; t with 2 degrees is 4.3027, over sqrt(3): 2.4841. Seed 4 has no pair."""
    found = difference({1: 11.0, 2: 22.0, 3: 33.0, 4: 0.0}, {1: 10.0, 2: 20.0, 3: 30.0})
    assert found is not None and (found.mean, found.pairs) == (2.0, 3)
    assert found.half == pytest.approx(2.4841, abs=1e-4)
    for few in ({1: 11.0}, {1: 10.5, 2: 21.5}):
        found = difference(few, {1: 10.0, 2: 20.0})
        assert found is not None and found.mean == 1 and found.half is None
    assert difference({1: 1.0}, {2: 1.0}) is None
    assert half_width([1.0, 2.0]) == pytest.approx(12.7062 * math.sqrt(0.5) / math.sqrt(2), abs=1e-4)


# The report


def made_line(asked: Any, accuracy: float) -> dict[str, Any]:
    smooth = asked.method == "smooth"
    return {
        "key": asked.name,
        **asked.settings(),
        "metrics": {"accuracy": float(accuracy), "cross_entropy": 1 - accuracy / 100},
        "terms": {"task_loss": 0.5, **({"smart_loss": 0.1 * asked.seed} if smooth else {})},
        "rows": {"train": 9, "valid": 20},
        "updates": 3,
        "seconds_per_update": 3.0,
        "cpu_seconds_per_update": 2.0 if smooth else 1.0,
        **{"commit": "abc", "torch": "2", "date": "2026-01-01"},
    }


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    """A plan of 18 runs, 12 of which have lines; another plan's line is among them."""
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN.format(folder=tmp_path))
    plan = read_plan(path, files=False)
    lines = []
    for asked in plan.runs():
        arm = (asked.method, asked.variant["lr"], asked.variant.get("smart-epsilon"))
        if arm in ACCURACIES:
            lines.append(made_line(asked, ACCURACIES[arm][asked.seed - 1]))
    other = {**lines[0], "key": "other", "flags": {}, "metrics": {"accuracy": 0.0}}
    write_lines(plan.out / "runs.jsonl", [*lines, other])
    return plan


def test_each_arm_is_compared_with_the_first_method_at_its_own_grid_values(plan: Any) -> None:
    """Gains at lr 1: 1, 2, 3; at lr 2: 0, 1, 2."""
    assert len(plan.runs()) == 18
    arms = {arm.name: arm for arm in arms_of(plan)["movie"]}
    assert list(arms) == ["plain lr=1", "plain lr=2", "smooth lr=1 smart-epsilon=0.1", "smooth lr=2 smart-epsilon=0.1"]
    for name, gain in (("smooth lr=1 smart-epsilon=0.1", 2.0), ("smooth lr=2 smart-epsilon=0.1", 1.0)):
        assert arms[name].difference("accuracy").mean == gain
        assert arms[name].cost() == 2.0
    shares = arms["smooth lr=1 smart-epsilon=0.1"].values("smart_loss/task_loss")
    assert shares == pytest.approx({1: 0.2, 2: 0.4, 3: 0.6})
    assert arms["plain lr=1"].values("smart_loss/task_loss") == {}
    assert arms["plain lr=1"].difference("accuracy") is None


@pytest.mark.parametrize("of", ["machine", "host"])
def test_costs_of_other_machines_are_not_compared(of: str, plan: Any) -> None:
    """Two of one kind have the same "machine", and differ in "host"."""
    path = plan.out / "runs.jsonl"
    names = {"plain": "one", "smooth": "another"}
    write_lines(path, [{**line, "machine": "x86_64", of: names[line["method"]]} for line in read_lines(path)])
    arm = arms_of(plan)["movie"][2]
    assert math.isnan(arm.cost()) and arm.difference("accuracy").mean == 2
    document.write_report(plan)
    lines = (plan.out / "report.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith(f"| {arm.name} | 3")]
    assert row.endswith("|  |")


def test_costs_with_older_lines_are_compared_by_the_kind_of_machine(plan: Any) -> None:
    """Seeds 1 and 2 of plain were run before lines had a host: 2.0 of 1.0 s; seed 3's was run elsewhere, in 8.0 s."""
    path = plan.out / "runs.jsonl"
    hosts = {("plain", 3): {"host": "elsewhere", "cpu_seconds_per_update": 8.0}}
    hosts |= {("smooth", seed): {"host": "here"} for seed in (1, 2, 3)}
    lines = [{**line, **hosts.get((line["method"], line["seed"]), {})} for line in read_lines(path)]
    write_lines(path, lines)
    assert arms_of(plan)["movie"][2].cost() == 2.0


def test_tables(plan: Any) -> None:
    """plain at lr 1: mean 73, deviation sqrt(13) = 3.61; smooth 75, sqrt(21) = 4.58; interval 2 ± 2.4841."""
    document.write_report(plan)
    text = (plan.out / "report.md").read_text()
    assert "12 of 18 runs" in text and "commit abc, torch 2, 2026-01-01" in text
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in text.splitlines() if line.count(" | ") == 5}
    assert rows["| plain lr=1"][:2] == ["3", "73.00 ± 3.61"]
    smooth = rows["| smooth lr=1 smart-epsilon=0.1"]
    assert smooth[1] == "75.00 (+2.00 [-0.48, +4.48])"
    assert smooth[2].endswith(" (-0.0200 [-0.0448, +0.0048])") and smooth[-2:] == ["0.4", "2.00 |"]
    table = [line.split(",") for line in (plan.out / "report.csv").read_text().splitlines()]
    assert all(len(row) == 12 for row in table)
    (row,) = (row for row in table if row[1:3] == ["smooth lr=1 smart-epsilon=0.1", "accuracy"])
    assert row[3:6] == ["3", "74.0", "75.0"] and row[7:10] == ["plain lr=1", "3", "2.0"]
    assert [float(value) for value in row[10:]] == pytest.approx([2 - 2.4841, 2 + 2.4841], abs=1e-4)


def test_a_seed_without_a_finite_number_shows(plan: Any) -> None:
    """Seed 2 of plain at lr 1 has no accuracy, of smooth no share: smooth gains 1 and 3 over the others, mean 2."""
    lines = read_lines(plan.out / "runs.jsonl")
    for line in lines:
        if (line["method"], line["variant"], line["seed"]) == ("plain", {"lr": 1}, 2):
            line["metrics"]["accuracy"] = math.nan
        if line["method"] == "smooth" and line["seed"] == 2:
            line["terms"]["smart_loss"] = math.nan
    write_lines(plan.out / "runs.jsonl", lines)
    document.write_report(plan)
    text = (plan.out / "report.md").read_text()
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in text.splitlines() if line.count(" | ") == 5}
    assert rows["| plain lr=1"][:2] == ["3", "-"] and rows["| plain lr=2"][:2] == ["3", "60.00 ± 0.00"]
    assert rows["| smooth lr=1 smart-epsilon=0.1"][1] == "75.00 (+2.00)"
    assert rows["| smooth lr=1 smart-epsilon=0.1"][-2] == "-"
    assert "| accuracy | plain lr=1 | - | - |  |" in text
    table = [line.split(",") for line in (plan.out / "report.csv").read_text().splitlines()]
    assert ["movie", "plain lr=1", "accuracy", "3", "nan", "nan", "nan"] in [row[:7] for row in table]


def test_the_same_lines_give_the_same_report(plan: Any) -> None:
    first = {path: path.read_bytes() for path in document.write_report(plan)}
    assert {plan.out / "movie.svg", plan.out / "movie-cost.svg"} <= set(first)
    assert {path: path.read_bytes() for path in document.write_report(plan)} == first


@pytest.mark.parametrize("page", ["README.md", "docs/study.md"])
def test_the_documents_tables_are_those_of_the_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What --into writes is what is there."""
    monkeypatch.chdir(ROOT)
    text, copy, written = Path(page).read_text(), tmp_path / "page.md", []
    copy.write_text(text)
    for path in sorted(Path("benchmarks/studies").glob("*.yaml")):
        plan = read_plan(path, files=False)
        if any(f"<!-- study:{task.name} " in text for task in plan.tasks):
            written += document.put_into(plan, copy)
    tables = re.findall(r"^<!-- study:([a-z][\w-]*) end -->$", text, re.MULTILINE)
    assert set(written) == set(tables) != set() and copy.read_text() == text


def test_a_table_goes_between_its_marks(plan: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- study:movie begin -->\nold\n<!-- study:movie end -->\nafter\n")
    for _ in range(2):
        assert document.put_into(plan, page) == ["movie"]
        lines = page.read_text().splitlines()
        assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
        assert sum(line.startswith("| smooth") for line in lines) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nothing", "has no marks"),
        ("caf\udce9", "--into: is not UTF-8 text; convert it"),
        ("<!-- study:movie begin -->", r"page\.md:1: --into: this mark .* no pair; .* begin --> and then"),
        ("a\n<!-- study:movie end -->\n<!-- study:movie begin -->", r"page\.md:2: .* one of no pair"),
        ("<!-- study:movie begin -->\n<!-- study:movie begin -->\n<!-- study:movie end -->", r"md:1: .* of no pair"),
        (f"{BEGIN.format('columns')}\n{END}", "--into: 'columns' in the mark; it may have columns=A,B rows=METHOD"),
        (f"{BEGIN.format('colums=cost')}\n{END}", "--into: 'colums=cost' in the mark; it may have columns=A,B"),
        (f"{BEGIN.format('columns=cost, rows=plain')}\n{END}", "--into: columns has ''; known are seeds, accuracy"),
        (f"{BEGIN.format('columns=price')}\n{END}", "--into: columns has 'price'; known are seeds, accuracy, "),
        (f"{BEGIN.format('rows=smart')}\n{END}", "--into: rows has 'smart'; known are plain, smooth"),
        (f"{BEGIN.format('against=smart')}\n{END}", "--into: against is 'smart'; known are plain, smooth"),
    ],
)
def test_marks_that_are_not_right(text: str, expected: str, plan: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, errors="surrogateescape")
    with pytest.raises(UsageError, match=expected):
        document.put_into(plan, page)
    assert page.read_text(errors="surrogateescape") == text


def test_a_mark_chooses_columns_rows_and_whom_they_are_compared_with(plan: Any, tmp_path: Path) -> None:
    """Two tables of one task; plain's gains over smooth at lr 1 are -1, -2, -3, by hand."""
    page = tmp_path / "page.md"
    marks = [
        BEGIN.format("columns=cost,accuracy,smart_loss/task_loss rows=smooth,plain"),
        BEGIN.format("against=smooth rows=plain columns=accuracy"),
        BEGIN.format("columns=seeds"),
    ]
    page.write_text("\n".join(part for mark in marks for part in ("text", mark, "old", END)) + "\nend\n")
    for _ in range(2):
        assert document.put_into(plan, page) == ["movie"]
        text = page.read_text()
        first, second, third = (part.partition(END)[0].strip().splitlines() for part in text.split(" begin -->")[1:])
        assert first[0] == "| method | cost | accuracy | `smart_loss/task_loss` |"
        assert first[2] == "| smooth lr=1 smart-epsilon=0.1 | 2.00 | 75.00 (+2.00 [-0.48, +4.48]) | 0.4 |"
        assert [row.split(" ")[1] for row in first[2:6]] == ["smooth", "smooth", "plain", "plain"]
        assert second[:2] == ["| method | accuracy |", "| --- | --- |"] and len(second) == 6
        assert second[2] == "| plain lr=1 | 73.00 (-2.00 [-4.48, +0.48]) |"
        assert second[-1].endswith("2026-01-01. Differences to smooth.") and "Differences" not in first[-1]
        assert third[2] == "| plain lr=1 | 3 |" and len(third) == 8
        assert text.endswith("\nend\n") and text.count("text\n") == 3 and "old" not in text


def test_a_mark_chooses_the_share_of_an_adversarys_rise(plan: Any, tmp_path: Path) -> None:
    """A fifth of the task loss; the report itself does not have it."""
    lines = read_lines(plan.out / "runs.jsonl")
    for line in lines:
        line["terms"]["pgd_rise"] = 0.1
    write_lines(plan.out / "runs.jsonl", lines)
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN.format('columns=pgd_rise/task_loss')}\n{END}")
    document.put_into(plan, page)
    assert "| method | `pgd_rise/task_loss` |" in page.read_text() and "| plain lr=1 | 0.2 |" in page.read_text()
    assert "pgd_rise" not in document.write_report(plan)[0].read_text()


def test_marks_of_other_studies_and_words_about_marks_stay(plan: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    around = "`<!-- study:movie begin -->` and\n<!-- study:cola begin -->\nkept\n<!-- study:cola end -->\n"
    page.write_text(f"{around}<!-- study:movie begin -->\n{END}")
    document.put_into(plan, page)
    assert page.read_text().startswith(around) and "| smooth" in page.read_text()


def test_a_report_against_another_method(plan: Any) -> None:
    """In files of its own; smooth has one arm at plain's learning rates, with which plain is compared."""
    document.write_report(plan)
    before = {path.name: path.read_bytes() for path in plan.out.iterdir()}
    written = document.write_report(plan, "smooth")
    names = {"report-against-smooth.md", "report-against-smooth.csv"}
    assert names | {"movie-against-smooth.svg", "movie-against-smooth-cost.svg"} == {path.name for path in written}
    assert all((plan.out / name).read_bytes() == content for name, content in before.items())
    text = written[0].read_text()
    assert "differences to smooth over the same seeds" in text
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in text.splitlines() if line.count(" | ") == 5}
    assert rows["| plain lr=1"][1] == "73.00 (-2.00 [-4.48, +0.48])" and rows["| plain lr=1"][-1] == "0.50 |"
    assert rows["| smooth lr=1 smart-epsilon=0.1"][1] == "75.00 ± 4.58"
    with pytest.raises(UsageError, match=r"--against is 'smart'; it must be a method of .*: plain, smooth"):
        document.write_report(plan, "smart")


def test_of_several_arms_that_fit_none_is_chosen(plan: Any) -> None:
    lines = read_lines(plan.out / "runs.jsonl")
    for asked in plan.runs():
        if asked.variant.get("smart-epsilon") == 0.2:
            lines.append(made_line(asked, 50))
    write_lines(plan.out / "runs.jsonl", lines)
    arms = {arm.name: arm for arm in arms_of(plan, "smooth")["movie"]}
    assert arms["plain lr=1"].baseline is None
    assert arms_of(plan)["movie"][-1].difference("accuracy").mean == -10


def test_columns_of_an_attack(plan: Any, tmp_path: Path) -> None:
    """In the table where some lines have them; what is no attack only among all metrics."""
    lines = read_lines(plan.out / "runs.jsonl")
    for line in lines:
        if line["method"] == "smooth":
            more = {"accuracy_attack_0%": 80.0, "accuracy_attack_3%": 20.0 + line["seed"], "accuracy_random_3%": 79.0}
            line["metrics"] |= more
    write_lines(plan.out / "runs.jsonl", lines)
    text = document.write_report(plan)[0].read_text()
    assert "| accuracy attack 3% |" in text and "worst point" in text
    assert "accuracy random" not in text and "| accuracy_random_3% | smooth lr=1" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| smooth lr=1 smart-epsilon=0.1 | 3 |"))
    (plain,) = (line for line in text.splitlines() if line.startswith("| plain lr=1 | 3 |"))
    assert " | 22.00 ± 1.00 | " in row and " |  | " in plain


def test_no_report_of_no_runs(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN.format(folder=tmp_path))
    with pytest.raises(UsageError, match="holds no run of this plan"):
        document.write_report(read_plan(tmp_path / "plan.yaml", files=False))
