"""The command preprocess: official files to data folders."""

import argparse
import contextlib
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..convert.config import BASE_WIDTH, SMALL_RATE
from ..data.binarize import Folder, complete_folder
from ..data.bpe import BpeFiles
from ..data.draw import held_out, nested_order, subset
from ..data.lines import Report, Row, as_number, located, shown
from ..data.pool import Pool
from ..data.ranking import in_words, sizes_of
from ..data.readers import check_unique, find_sources, read_task
from ..data.tasks import ANLI, ANLI_JOINED, GLUE, TASKS, Task
from ..data.winograd import NOUNS, add_noun_rows, pronouns_to_rank
from ..errors import UsageError, refuse, require
from ..progress import Progress
from .options import (
    add_encoder_options,
    chosen,
    encoder_files,
    existing,
    import_report,
    plugin_flags,
    whole_number,
)
from .run import run

EXTRA = ("SNLI", "SciTail")  # what `--task all` does beside GLUE
SPLIT_ORDER = ("train", "valid", "valid1", "test", "test1", NOUNS)


@dataclass
class Data:
    """The rows of one folder to be written."""

    task: Task
    rows: dict[str, list[Row]]
    reports: dict[str, Report] = field(default_factory=dict)
    parts: dict[str, list[tuple[str, int]]] = field(default_factory=dict)  # split to (data set, rows), in order


def fractions(text: str) -> list[float]:
    """Parse ``0.001,0.01,1``. Raises `UsageError` for anything that is not in (0, 1]."""
    values = []
    for part in text.split(","):
        value = as_number(part)
        if not 0.0 < value <= 1.0:
            raise UsageError(
                f"--subsample is {shown(text)}; {shown(part)} must be above 0 and at most 1, as in 0.001,0.01,1"
            )
        values.append(value)
    if len(set(values)) != len(values):
        raise UsageError(f"--subsample is {shown(text)}; each fraction must stand there once")
    return values


def task_flags(task: Task, bpe: str) -> list[str]:
    """fairseq's task for the data, and its flags."""
    if task.candidates:
        flags = ["smart_wnli"]
    elif task.ranking:
        flags = ["smart_multitask", "--init-token", "0"]
    else:
        flags = ["sentence_prediction", "--num-classes", str(task.num_classes), "--init-token", "0"]
    if bpe != "bert" and task.texts == 2:
        flags += ["--separator-token", "2"]
    if task.regression:
        flags.append("--regression-target")
    return ["--task", *flags]


def training_flags(task: Task, bpe: str, rows: Mapping[str, object], folder: Path) -> str:
    """The part of the fairseq-train command that follows from the data."""
    flags = [f"fairseq-train {shlex.quote(str(folder))}", *task_flags(task, bpe)]
    metric = f"{task.name}_{task.metrics[0]}" if task.ranking else task.metrics[0]
    if metric in ("mcc", "acc_and_f1", "pearson_and_spearman"):
        flags.append(f"--report-{metric.replace('_', '-')}")
    if "valid1" in rows:
        flags.append("--valid-subset valid,valid1")
    # fairseq's default of 8 silently leaves out the last batch, of the validation too, unless it has 8n rows
    flags.append("--required-batch-size-multiple 1")
    if rows and "valid" not in rows:
        flags.append("--disable-validation")
    else:
        flags.append(f"--best-checkpoint-metric {metric} --maximize-best-checkpoint-metric")
    return " ".join(flags)


# by BPE: where its published encoder is put, and its architecture; an imported one brings both
ENCODERS = {
    "gpt2": ("roberta.large/model.pt", "--arch roberta_large --max-positions 512"),
    "bert": ("BERT/model.pt", "--arch smart_bert --max-positions 512"),
    "sentencepiece": ("xlmr.large/model.pt", "--arch roberta_large --max-positions 512"),
}
EPOCHS, BATCH, RATE = 6, 16, "2e-5"  # Jiang et al. (2020), section 4.1


def smart_flags(bpe: BpeFiles, rows: int, save_dir: str, candidates: bool = False) -> str:
    """The rest of that command: SMART, on the encoder that lies beside the BPE or on the published one.

    candidates: these are ranked by its LM head.
    """
    (model, arch), rate = ENCODERS[bpe.kind], RATE
    with contextlib.suppress(ValueError, LookupError, TypeError):  # no import, or a damaged one
        report = import_report(bpe.folder)
        flags = report["flags"]
        arch, model = shlex.join(flags), str(bpe.folder / "model.pt")
        if int(flags[flags.index("--encoder-embed-dim") + 1]) < BASE_WIDTH:
            rate = SMALL_RATE
        if candidates and report["lm_head"] == "initialised":
            arch += " --wnli-new-lm-head"
    updates = EPOCHS * -(-rows // BATCH)
    return " ".join(
        [
            f"{shlex.join(plugin_flags())} --criterion smart_sentence_prediction --optimizer mbpp {arch}",
            f"--finetune-from-model {shlex.quote(model)} --batch-size {BATCH} --lr {rate} --clip-norm 1",
            # RoBERTa's, as in the recipes and in studies
            "--adam-betas '(0.9, 0.98)' --adam-eps 1e-6 --weight-decay 0.1",
            f"--lr-scheduler polynomial_decay --max-update {updates} --total-num-update {updates}",
            f"--warmup-updates {updates // 10} --log-interval {min(20, updates // EPOCHS)}",
            # a checkpoint takes four times the model's size; the best and the last one are kept
            f"--no-epoch-checkpoints --save-dir {shlex.quote(save_dir)}",
        ]
    )


def write_folder(data: Data, target: Path, pool: Pool, train: Sequence[Row] | None = None, **facts: object) -> None:
    """Write all splits into ``target``, an existing empty folder; ``train`` is a subset of the training part."""
    folder = Folder(target, data.task, pool)
    folder.start(data.rows.get("train", []))
    rows = dict(data.rows)
    if train is not None:
        rows["train"] = list(train)
    for split in [split for split in SPLIT_ORDER if split in rows]:
        progress = Progress(len(rows[split]), f"{data.task.name} {split}")
        folder.write(split, rows[split], progress.advance)
        progress.close(_note(data, folder, split))
    # rows that were drawn are no longer one data set after the other
    parts = {split: found for split, found in data.parts.items() if sum(n for _, n in found) == len(rows[split])}
    folder.finish(parts=parts, **facts)
    _check_known(folder)


def _note(data: Data, folder: Folder, split: str) -> str:
    count, report = folder.counts[split], data.reports.get(split, Report())
    notes = [f"{count.tokens} symbols, longest row {count.longest}"]
    official = data.task.rows.get(split)
    if official is not None and official not in (count.rows, count.rows + sum(report.left_out.values())):
        notes.append(f"the official file has {official} rows")
    if data.task.ranking:
        notes.append(in_words(data.rows[split]))
    notes += [f"{number} left out ({reason})" for reason, number in report.left_out.items()]
    compressed = [Path(f"{file}.gz") for file in report.files if Path(f"{file}.gz").is_file()]
    notes += [f"read {path.stem} and not {path.name}, which is beside it" for path in compressed]
    if split == "train" and not data.task.regression and len({row.label for row in data.rows[split]}) == 1:
        notes.append(f"warning: every label is {data.rows[split][0].label}, and a model learns nothing from one class")
    unlabelled = sum(row.label is None for row in data.rows[split])
    if 0 < unlabelled < count.rows:
        notes.append(f"{unlabelled} rows have no label, so none is written")
    if count.empty:
        notes.append(f"{count.empty} rows with an empty text")
    if count.unknown:
        notes.append(f"{count.unknown} symbols not in dict.txt")
    if count.shortened:
        notes.append(f"{count.shortened} rows shortened to --max-tokens")
    elif count.over_512:
        notes.append(f"{count.over_512} rows above 512 tokens: use --max-tokens 512")
    return ", " + "; ".join(notes)


def _check_known(folder: Folder) -> None:
    """A dictionary of another encoder turns nearly everything into <unk>, and nothing else would say so."""
    symbols = sum(count.tokens for count in folder.counts.values())
    unknown = sum(count.unknown for count in folder.counts.values())
    if unknown > symbols / 2:
        bpe = folder.pool.files
        what = f"lacks {unknown} of {symbols} symbols that --bpe {bpe.kind} made"
        refuse(bpe.dictionary, what, "it belongs to another BPE")


def set_aside(data: Data, options: argparse.Namespace) -> Data:
    """The data with the share of ``--hold-out`` as their valid split, if it is given."""
    if options.hold_out is None:
        return data
    rows = held_out(data.task, data.rows, options.hold_out, options.seed)
    check_unique(rows["valid"])
    return replace(data, rows=rows, task=replace(data.task, rows={}))  # whose official numbers these are not


def process(data: Data, target: Path, bpe: BpeFiles, options: argparse.Namespace) -> None:
    """Write one task's folder, or with ``--subsample`` one folder per fraction in it, and say what was written."""
    parts: list[float] = options.subsample or []
    if parts and data.task.ranking:
        raise UsageError(f"--subsample takes rows, and {data.task.name} has groups of them; leave it out")
    if parts and "train" not in data.rows:
        raise UsageError(f"--subsample needs the training part of {data.task.name}, and --data-dir does not hold it")
    pool = Pool(bpe, options.workers, options.max_tokens, data.task.texts)
    with complete_folder(target) as partial:
        facts = {"max_tokens": options.max_tokens}
        if not parts:
            write_folder(data, partial, pool, **facts)
        order = nested_order(data.rows["train"], options.seed, not data.task.regression) if parts else []
        for part in parts:
            path = partial / f"{part:g}"
            path.mkdir()
            rows = subset(data.rows["train"], part, order)
            counts = Counter(row.label for row in rows)
            classes = "".join(f", {label} {counts[label]}" for label in data.task.labels)
            print(f"fraction {part:g}: {len(rows)} training rows{classes}")
            write_folder(data, path, pool, rows, **facts, subsample=part, seed=options.seed)
    shown_at = target / f"{parts[0]:g}" if parts else target
    if "train" not in data.rows:
        print(f"wrote {target}; it has no training part: for evaluation and prediction", flush=True)
        return
    if data.task.ranking:  # a batch counts groups
        count = len(sizes_of(data.rows["train"]))
    elif data.task.candidates:
        count = max(1, pronouns_to_rank(data.rows))
    else:
        count = len(subset(data.rows["train"], parts[0], order) if parts else data.rows["train"])
    rest = smart_flags(bpe, count, f"checkpoints/{data.task.name}", data.task.candidates)
    if "valid" not in data.rows:
        print("nothing to validate on: the result is checkpoint_last.pt; --hold-out 0.1 sets a tenth aside")
    print(f"wrote {target}; train with", flush=True)
    print(f"  {training_flags(data.task, bpe.kind, data.rows, shown_at)} {rest}", flush=True)


def add_shared_options(parser: argparse.ArgumentParser, official: bool = True) -> None:
    """The options that the commands share, for ``official`` files or one's own."""
    if official:
        parser.add_argument("--data-dir", required=True, help="the folder that holds the official files")
    add_encoder_options(parser, official=official)
    parser.add_argument("--max-tokens", help="shorten longer rows, the longer text first; all added symbols count")
    parser.add_argument("--subsample", help="fractions of the training part, as in 0.001,0.01,0.1,1; nested subsets")
    parser.add_argument("--hold-out", metavar="SHARE", help="of the training rows, to validate on where no file is")
    parser.add_argument("--seed", default="1", help="of what is drawn (%(default)s)")
    parser.add_argument(
        "--skip-bad-rows", action="store_true", help="leave out rows that are not in order instead of stopping"
    )


def check_shared_options(options: argparse.Namespace) -> BpeFiles:
    """Turn the shared options into numbers in place; the encoder's files. Raises `UsageError`."""
    options.workers = whole_number("--workers", options.workers, 1)
    options.seed = whole_number("--seed", options.seed, 0)
    options.max_tokens = None if options.max_tokens is None else whole_number("--max-tokens", options.max_tokens, 1)
    if options.subsample:
        options.subsample = fractions(options.subsample)
    if options.hold_out is not None:
        share = as_number(options.hold_out)
        require(0 < share < 1, "--hold-out", shown(options.hold_out), "a share between 0 and 1")
        options.hold_out = share
    if "data_dir" in options:
        existing(Path(options.data_dir))
    return encoder_files(options)


def _glue(argv: Sequence[str] | None, prog: str) -> None:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="From the official files of GLUE, SNLI or SciTail to fairseq's data folders.",
        epilog="ANLI's rounds joined in one folder: --task ANLI. Files of your own: --task NAME --train FILE --text "
        "COLUMN. Both have options of their own, which --help behind them lists.",
    )
    parser.add_argument("--task", required=True, help=f"one of {', '.join(TASKS)}, a list of these, or all")
    parser.add_argument("--out", help="the folder to write (TASK-bin); with several tasks, the folder that holds these")
    add_shared_options(parser)
    options = parser.parse_args(argv)
    otherwise = ", or all (files of your own: --train)"
    names = [*GLUE, *EXTRA] if options.task == "all" else chosen("--task", options.task, TASKS, otherwise)
    bpe = check_shared_options(options)
    data_dir = Path(options.data_dir)
    present = names  # reading what is missing says which files it needs
    if options.task == "all":
        present = [name for name in names if find_sources(TASKS[name], data_dir)]
        if not present:
            raise located(data_dir, f"--data-dir holds none of {', '.join(names)}")
    for name in present:
        rows, reports = read_task(TASKS[name], data_dir, options.skip_bad_rows)
        _say_missing(name, TASKS[name].splits, rows)
        if TASKS[name].candidates:
            if options.max_tokens is not None or options.subsample:
                flag = "--max-tokens" if options.max_tokens is not None else "--subsample"
                raise UsageError(f"{flag} is given with --task {name}, whose rows belong together; leave it out")
            print(add_noun_rows(rows))
        target = Path(options.out or ".") / f"{name}-bin" if len(names) > 1 else Path(options.out or f"{name}-bin")
        process(set_aside(Data(TASKS[name], rows, reports), options), target, bpe, options)
    skipped = [name for name in names if name not in present]
    if skipped:
        print(f"skipped, not in {data_dir}: {', '.join(skipped)}")


def _say_missing(name: str, splits: Iterable[str], rows: Mapping[str, object]) -> None:
    missing = [split for split in splits if split not in rows]
    if missing:
        print(f"{name}: no files of {', '.join(missing)}")


def weights(text: str, parts: Sequence[str]) -> dict[str, int]:
    """Parse ``R1=10,R2=20``. Raises `UsageError` for a part that is not used or a number below 1."""
    found = {}
    for item in text.split(",") if text else []:
        name, _, number = item.partition("=")
        if name.strip().upper() not in parts:
            raise UsageError(f"--weights is {shown(text)}; {shown(name)} must be one of {', '.join(parts)}")
        found[name.strip().upper()] = whole_number("--weights", number, 1)
    return found


def join(parts: Mapping[str, dict[str, list[Row]]], extra: Sequence[str], times: Mapping[str, int]) -> Data:
    """One data set from ANLI's rounds and others: these only train; a weight repeats a part's training rows."""
    rounds = [name for name in parts if name not in extra]
    data = Data(ANLI_JOINED, {})
    for split in ("train", "valid", "test"):
        for name in [*rounds, *(extra if split == "train" else ())]:
            rows = parts[name].get(split, []) * (times.get(name, 1) if split == "train" else 1)
            if rows:
                data.rows.setdefault(split, []).extend(rows)
                data.parts.setdefault(split, []).append((name, len(rows)))
        if split != "train":
            check_unique(data.rows.get(split, []))
    return data


def _anli(argv: Sequence[str] | None, prog: str) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description="From ANLI's files, alone or with others, to fairseq's data folder."
    )
    parser.add_argument("--rounds", default="R1,R2,R3", help="which rounds (%(default)s)")
    parser.add_argument("--with", dest="extra", default="", help="more training data: MNLI, SNLI, FEVER, as a list")
    parser.add_argument("--weights", default="", help="how often training rows are repeated, as in R1=10,R2=20,R3=10")
    parser.add_argument("--out", default="ANLI-bin", help="the folder to write (%(default)s)")
    add_shared_options(parser)
    options = parser.parse_args(argv)
    rounds = chosen("--rounds", options.rounds, [name[5:] for name in ANLI])
    extra = chosen("--with", options.extra, ("MNLI", "SNLI", "FEVER")) if options.extra else []
    times = weights(options.weights, [*rounds, *extra])
    bpe = check_shared_options(options)
    parts, reports = {}, {}
    for name in [*rounds, *extra]:
        task = TASKS[f"ANLI-{name}" if name in rounds else name]
        parts[name], reports[name] = read_task(task, Path(options.data_dir), options.skip_bad_rows)
        needed = {split: rows for split, rows in parts[name].items() if name in rounds or split == "train"}
        if name in extra and "train" not in needed:
            raise located(Path(options.data_dir), f"holds no training rows of {name}, which --with names; leave it out")
        if name in rounds:
            _say_missing(task.name, task.splits, needed)
        for split, rows in needed.items():
            dropped = reports[name][split].left_out
            notes = "".join(f"; {number} left out ({reason})" for reason, number in dropped.items())
            print(f"read {name} {split}: {len(rows)} rows{notes}")
    process(set_aside(join(parts, extra, times), options), Path(options.out), bpe, options)


def glue_main(argv: Sequence[str] | None = None, prog: str = "preprocess.py") -> int:
    """The command for all tasks, a folder for each; its exit status."""
    return run("preprocess", _glue, argv, prog)


def anli_main(argv: Sequence[str] | None = None, prog: str = "preprocess.py") -> int:
    """The command for ANLI's rounds, joined in one folder; its exit status."""
    return run("preprocess", _anli, argv, prog)


def main(argv: Sequence[str] | None = None, prog: str = "preprocess.py") -> int:
    """All under one name: ``--task ANLI`` joins ANLI's rounds, ``--train FILE`` brings one's own. The exit status."""
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    for flag in ("--task", "--train", "--valid", "--test", "--text"):
        parser.add_argument(flag)
    known, others = parser.parse_known_args(argv)
    if known.train or known.valid or known.test or known.text:
        from .own import main as own_main

        return own_main(argv, prog)
    if known.task and known.task.upper() == "ANLI":
        return anli_main(others, f"{prog} --task ANLI")
    return glue_main(argv, prog)
