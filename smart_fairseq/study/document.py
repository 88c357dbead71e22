"""A study's report from its lines, and its tables between marks of a document."""

import itertools
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ..data.lines import located, shown
from ..files import replace_file
from .arms import Arm, arms_of
from .lines import Line
from .pictures import draw, draw_against_cost
from .plan import Plan
from .tables import as_csv, columns_of, long_table, short_table

HELP = """Mean ± standard deviation over the seeds; differences to {baseline} over the same seeds, from three on
with their 95 % t interval. Cross entropy in nats; `_half` and `_scaled`: on the half of the rows that the temperature
was not fitted on, before and after scaling. A term's share is its mean over the last tenth of the updates, unweighted,
over the task loss. Cost: processor time of an update over {baseline}'s on the same machine."""
ATTACKS = """ `_attack_1%`: on some of the rows, the same for all methods, at the worst point that ten steps find
within 1 % of each example's embeddings (0 %: without); `_random_1%`: at a random corner of that ball."""
# a line of a document that begins or ends a table: task, options, which of the two
MARK = re.compile(r"^<!-- study:([\w-]+)((?: [^\n]*?)?) (begin|end) -->[ \t]*$", re.MULTILINE)
OPTIONS = ("columns", "rows", "against")


def write_report(plan: Plan, against: str | None = None) -> list[Path]:
    """report.md, report.csv and pictures for each task in the plan's ``out``; their paths. Raises without lines.

    against: the method that the others are compared with, and its name then in those of the files; None: the first.
    """
    tasks = {name: arms for name, arms in arms_of(plan, against).items() if arms}
    if not tasks:
        raise located(plan.out / "runs.jsonl", "holds no run of this plan; run the study first")
    baseline, suffix = against or next(iter(plan.methods)), f"-against-{against}" if against else ""
    wanted, there = len(plan.runs()), sum(len(arm.lines) for arms in tasks.values() for arm in arms)
    attacks = any("_attack_" in column for arms in tasks.values() for column in columns_of(arms))
    words = HELP.format(baseline=baseline) + (ATTACKS if attacks else "")
    parts = [f"# {plan.path.stem}", f"{there} of {wanted} runs. {words}"]
    written = [plan.out / f"report{suffix}.md", plan.out / f"report{suffix}.csv"]
    pictures = [
        ("", draw, f"Differences to {baseline}, with their 95 % intervals"),
        ("-cost", draw_against_cost, f"Differences to {baseline} against the cost of an update"),
    ]
    if find_spec("matplotlib") is None:
        print("no pictures: these need matplotlib; install it with pip install matplotlib")
        pictures = []
    for name, arms in tasks.items():
        parts += [f"## {name}", _made_with(_lines(arms)), short_table(arms)]
        for end, drawn, title in pictures:
            picture = plan.out / f"{name}{suffix}{end}.svg"
            if drawn(arms, picture):
                parts.append(f"![{title}]({picture.name})")
                written.append(picture)
        parts += [f"### {name}: every metric", long_table(arms)]
    replace_file(written[0], "\n\n".join(parts) + "\n")
    replace_file(written[1], as_csv(tasks))
    return written


def _lines(arms: Sequence[Arm]) -> list[Line]:
    return [line for arm in arms for line in arm.lines.values()]


def _made_with(lines: Sequence[Line]) -> str:
    """Rows, seeds, versions and commits in words."""

    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(str(line[name]) for line in lines))

    def rows(part: str) -> str:
        return ", ".join(map(str, sorted({line["rows"][part] for line in lines if part in line["rows"]})))

    draw = lines[0]["draw"]
    flip = f", {draw['flip']:.0%} of their labels flipped" if draw["flip"] else ""
    commits, torch = all_of("commit"), all_of("torch")
    transferred = dict.fromkeys(part for line in lines for part in line["rows"] if "_" in part)
    elsewhere = "".join(f", {rows(part)} {part.replace('_', ' ')}" for part in transferred)
    updates = ", ".join(map(str, sorted({line["updates"] for line in lines})))
    return (
        f"{rows('train')} training rows{flip}, {updates} updates, evaluated on {rows('valid')} rows{elsewhere}; "
        f"commit {commits or 'unknown'}, torch {torch}, {max(line['date'] for line in lines)}."
    )


# Marks --------------------------------------------------------------------------------------------------------------


def put_into(plan: Plan, document: Path, against: str | None = None) -> list[str]:
    """Put short tables between their marks in a document; the tasks that have some. Raises `UsageError`.

    The marks are lines of their own, `<!-- study:TASK begin -->` and `<!-- study:TASK end -->`. A begin mark may
    choose: `<!-- study:TASK columns=accuracy,cost rows=plain,smart against=smart begin -->`.
    """
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise located(document, f"--into: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise located(document, "--into: is not UTF-8 text; convert it") from None
    tasks = [name for name, arms in arms_of(plan).items() if arms]
    marks = [match for match in MARK.finditer(text) if match[1] in tasks]
    if not marks:
        names = ", ".join(task.name for task in plan.tasks)
        raise located(document, f"--into: has no marks <!-- study:TASK begin --> for a task with runs ({names})")
    pairs = list(itertools.zip_longest(marks[::2], marks[1::2]))
    for begin, end in pairs:
        if begin[3] != "begin" or end is None or (end[1], end[3]) != (begin[1], "end"):
            what = f"<!-- study:{begin[1]} begin --> and then <!-- study:{begin[1]} end --> are needed"
            raise located(document, f"--into: this mark of a table is one of no pair; {what}", _line_of(begin))
    for begin, end in reversed(pairs):  # from the end, so that the places before stay
        text = f"{text[: begin.end()]}\n{_marked(plan, document, begin, against)}\n{text[end.start() :]}"
    replace_file(document, text)
    return list(dict.fromkeys(begin[1] for begin, _ in pairs))


def _line_of(mark: re.Match[str]) -> int:
    return mark.string.count("\n", 0, mark.start()) + 1


def _options(document: Path, line: int, words: Sequence[str]) -> dict[str, str]:
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in OPTIONS or not value or name in found:
            allowed = "columns=A,B rows=METHOD,METHOD against=METHOD, each once and without spaces"
            raise located(document, f"--into: {shown(word)} in the mark; it may have {allowed}", line)
        found[name] = value
    return found


def _marked(plan: Plan, document: Path, begin: re.Match[str], against: str | None) -> str:
    """What stands between a begin mark and its end mark."""
    line = _line_of(begin)
    options = _options(document, line, begin[2].split())
    against = options.get("against", against)

    def chosen(option: str, known: Sequence[str]) -> list[str]:
        names = options[option].split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            what = f"--into: {option} has {shown(unknown[0])}; known are {', '.join(known)}"
            raise located(document, what, line)
        return names

    if against is not None and against not in plan.methods:
        raise located(document, f"--into: against is {shown(against)}; known are {', '.join(plan.methods)}", line)
    arms = arms_of(plan, against)[begin[1]]
    columns = chosen("columns", columns_of(arms)) if "columns" in options else None
    if "rows" in options:
        rows = chosen("rows", list(dict.fromkeys(arm.method for arm in arms)))
        arms = sorted((arm for arm in arms if arm.method in rows), key=lambda arm: rows.index(arm.method))
    words = f" Differences to {against}." if against else ""
    return "\n".join([short_table(arms, columns), "", _made_with(_lines(arms)) + words])
