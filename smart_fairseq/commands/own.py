"""preprocess for a task of one's own: a CSV, TSV or JSONL file for each split to a data folder."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..data.binarize import FILLER
from ..data.bpe import SPECIAL_SYMBOLS
from ..data.lines import Report, Row, as_number, located, shown
from ..data.readers import check_unique, columns_of, labels_of, read_source
from ..data.tasks import CORRELATIONS, TASKS, Source, Task
from ..errors import UsageError, refuse, require
from .preprocess import Data, add_shared_options, check_shared_options, process, set_aside
from .run import run

SPLITS = ("train", "valid", "test")
FORMS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl"}
FEW_CLASSES, MOST_CLASSES = 10, 100  # however few the rows; however many


def form_of(flag: str, path: Path) -> str:
    """By the file's ending, .gz behind it or not. Raises `UsageError` for another one, or if there is no such file."""
    name = Path(path.name.removesuffix(".gz"))
    require(name.suffix in FORMS, flag, shown(str(path)), f"a file that ends in {', '.join(FORMS)}, or in .gz after it")
    if not path.is_file():
        raise located(path, f"{flag}: no such file")
    return FORMS[name.suffix]


def _spelt(flag: str, column: str, path: Path, named: Sequence[str]) -> str:
    """The column as the file spells it, which may differ in case. Raises `UsageError` where there is none."""
    found = [name for name in named if name == column] or [name for name in named if name.lower() == column.lower()]
    require(bool(found), flag, shown(column), f"a column of {path}, which has {', '.join(named)}")
    return found[0]


def _sources(options: argparse.Namespace, files: dict[str, Path]) -> dict[str, Source]:
    """Of each split; the label's column may be left out of ``--test``, and the ids' of all."""
    texts = tuple(text.strip() for text in options.text.split(","))
    right = len(texts) in (1, 2) and all(texts) and len(set(texts)) == len(texts)
    require(right, "--text", shown(options.text), "a column, or the two columns of a pair, as in premise,hypothesis")
    found = {}
    for split, path in files.items():
        form = form_of(f"--{split}", path)
        named = columns_of(form, path)
        columns = tuple(_spelt("--text", text, path, named) for text in texts)
        label, identity = None, None if options.id is None else _spelt("--id", options.id, path, named)
        if split != "test" or options.label.lower() in map(str.lower, named):
            label = _spelt("--label", options.label, path, named)
        else:
            print(f"{split}: no column {options.label}, so its rows have no labels")
        hidden = ("",) if split == "test" else ()
        found[split] = Source((path.name,), columns, label, identity, form, hidden_labels=hidden, numbers=True)
    return found


def _classes(options: argparse.Namespace, sources: dict[str, Source], files: dict[str, Path]) -> tuple[str, ...]:
    """The labels in the order of their numbers: as given, or those of the training part by name or number."""
    if options.labels is not None:
        named = [label.strip() for label in options.labels.split(",")]
        right = all(named) and len(set(named)) == len(named) > 1
        require(right, "--labels", shown(options.labels), "a list of two or more classes, each once")
        return tuple(named)
    if "train" not in sources:
        raise UsageError(
            "--train is not given; without it name the model's classes by --labels, or its largest score by --scores"
        )
    found = labels_of(sources["train"], files["train"], options.skip_bad_rows)
    where = f"--label {options.label}"
    rows, numbers = found.total(), all(as_number(label) == as_number(label) for label in found)
    if len(found) > min(MOST_CLASSES, max(FEW_CLASSES, rows / 2)):
        advice = "for a regression on numbers from 0 to MAX give --scores MAX" if numbers else "name another column"
        refuse(files["train"], f"{where}: {len(found)} different labels in {rows} rows", advice)
    if len(found) < 2:
        one = f"all rows have {shown(next(iter(found)))}" if found else "no row has a label"
        refuse(files["train"], f"{where}: {one}", "two classes are needed")
    same = _alike(found, as_number) if numbers else None
    if same:
        refuse(files["train"], f"{where}: {' and '.join(same)} are one number", "write it in one way")
    if numbers and len(found) > FEW_CLASSES and not all(as_number(label).is_integer() for label in found):
        advice = "for a regression on numbers from 0 to MAX give --scores MAX, for classes name them by --labels"
        refuse(files["train"], f"{where}: {len(found)} different numbers with fractions", advice)
    if numbers and len(found) > 2:
        print("labels are numbers, and each is a class; --scores MAX makes a regression of them")
    same = _alike(found, str.lower)
    if same:
        print(f"warning: {' and '.join(map(shown, same))} are two classes, which differ in case alone")
    return tuple(sorted(found, key=as_number if numbers else str))


def _alike(labels: Iterable[str], key: Callable[[str], object]) -> tuple[str, str] | None:
    """Two labels of which the ``key`` is the same, if there are any."""
    seen: dict[object, str] = {}
    return next(((seen[key(x)], x) for x in sorted(labels) if seen.setdefault(key(x), x) != x), None)


def _check_names(path: Path, labels: Iterable[str]) -> None:
    """Raise `UsageError` for a class that a dictionary or a table cannot hold."""
    for label in labels:
        kept = label in SPECIAL_SYMBOLS or label.startswith(FILLER)  # by fairseq's dictionaries for themselves
        if kept or not label.isprintable() or "," in label:
            what = "holds a comma, a tab or a line break, or is a symbol of fairseq's own"
            refuse(path, f"the class {shown(label)} {what}", "rename it")


def own_task(options: argparse.Namespace, sources: dict[str, Source], files: dict[str, Path]) -> Task:
    """The task that the options describe; raises `UsageError`."""
    name = options.task
    plain = name.replace("-", "").replace("_", "").isalnum()
    require(plain, "--task", shown(name), "a name of letters, digits, - and _")
    taken = {known.lower() for known in (*TASKS, "ANLI", "all")}
    require(name.lower() not in taken, "--task", shown(name), "another name: that one is an official task's")
    texts = len(next(iter(sources.values())).texts)
    splits = {split: (source,) for split, source in sources.items()}
    if options.scores is None:
        labels = _classes(options, sources, files)
        _check_names(next(iter(files.values())), labels)
        return Task(name, (), splits, texts, labels, fairseq_recipe=False)
    most = as_number(options.scores)
    require(0 < most < float("inf"), "--scores", shown(options.scores), "the largest label, above 0; the smallest is 0")
    if options.labels is not None:
        raise UsageError("--labels is given with --scores, whose labels are numbers; leave one out")
    return Task(name, (), splits, texts, divisor=most, metrics=CORRELATIONS)


def _own(argv: Sequence[str] | None, prog: str) -> None:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="From files of your own to fairseq's data folder: .csv and .tsv with a header, or .jsonl.",
    )
    add = parser.add_argument
    add("--task", required=True, metavar="NAME", help="a name for it, which stands in the data folder")
    for split, purpose in zip(SPLITS, ("train on", "choose the checkpoint by", "predict; labels may be missing")):
        add(f"--{split}", metavar="FILE", help=f"rows to {purpose}")
    add("--text", required=True, metavar="COLUMN[,COLUMN]", help="of the text, or of the two texts of a pair")
    add("--label", default="label", metavar="COLUMN", help="of the class or the score (%(default)s)")
    add("--id", metavar="COLUMN", help="names rows in predictions; default: their position from 0")
    add("--labels", metavar="A,B", help="the classes in their order; default: those of --train, by name or size")
    add("--scores", metavar="MAX", help="labels are numbers from 0 to MAX: a regression")
    add("--out", metavar="FOLDER", help="the folder to write (NAME-bin)")
    add_shared_options(parser, official=False)
    options = parser.parse_args(argv)
    if not options.bpe_dir:
        raise UsageError(
            "--bpe-dir is not given; it names the folder of the encoder's dictionary and byte pairs, which import-hf "
            "wrote, or RoBERTa's (download --tasks gpt2_bpe)"
        )
    if not (options.train or options.valid or options.test):
        raise UsageError("no file is given; name one or more by --train, --valid and --test")
    files = {split: Path(path) for split in SPLITS if (path := getattr(options, split))}
    bpe = check_shared_options(options)
    sources = _sources(options, files)
    task = own_task(options, sources, files)
    rows: dict[str, list[Row]] = {}
    reports: dict[str, Report] = {}
    for split, source in sources.items():
        rows[split], reports[split] = read_source(task, source, files[split].parent, options.skip_bad_rows)
        if split != "train":
            check_unique(rows[split])
    if not task.regression:
        print(f"{task.name}: classes {', '.join(f'{number} {label}' for number, label in enumerate(task.labels))}")
    target = Path(options.out or f"{task.name}-bin")
    data = set_aside(Data(task, rows, reports), options)
    known = {row.texts for row in data.rows.get("train", ())}
    for split in SPLITS[1:]:
        there = sum(row.texts in known for row in data.rows.get(split, ()))
        if there:
            print(f"warning: {there} of {len(data.rows[split])} rows of {split} are in train too")
    process(data, target, bpe, options)


def main(argv: Sequence[str] | None = None, prog: str = "preprocess.py") -> int:
    """The command; its exit status."""
    return run("preprocess", _own, argv, prog)
