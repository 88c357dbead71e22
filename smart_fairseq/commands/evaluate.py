"""The command evaluate: official metrics of checkpoints or prediction files on a labelled split, or all of
`smart_fairseq.evaluation` for checkpoints."""

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..data.binarize import read_manifest
from ..data.bpe import BpeFiles, find_bpe
from ..data.folders import read_ids, task_of
from ..data.lines import as_number, located, read_lines, shown
from ..data.ranking import parts, read_groups
from ..data.readers import find_sources, read_source
from ..data.tasks import RIGHT, TASKS, Task
from ..errors import UsageError, parse_json, refuse, require
from ..evaluation.full import evaluate_model
from ..evaluation.labels import gold_labels, vote_shares, write_shares
from ..evaluation.metrics import over_seeds, score
from ..evaluation.report import aligned, comparison, draw, for_json, notes, pyplot, write_arrays
from ..files import check_file, check_place, write_json
from ..inference import Model, check_there
from .options import add_model_options, chosen_splits, data_folders, existing, official_folder, whole_number
from .predict import LETTERS
from .run import run

Scores = dict[str, float]
Found = TypeVar("Found")


def read_predictions(path: Path, task: Task) -> dict[str, str]:
    """Id to label, from a file that predict wrote (TSV, or ANLI's JSON lines). Raises with file and line."""
    found: dict[str, str] = {}
    words = {letter: word for word, letter in LETTERS.items()}
    for number, line in read_lines(path):
        if path.suffix == ".jsonl":
            try:
                entry = parse_json(line)
                identity, label = str(entry["uid"]), str(entry["label"])
            except (ValueError, KeyError, TypeError):
                raise located(
                    path, 'each line must be an object such as {"uid": "...", "label": "e"}', number
                ) from None
            label = words.get(label, label)
        else:
            cells = line.split("\t")
            if number == 1:
                if cells[:2] != ["index", "prediction"]:
                    raise located(path, f"the header is {shown(line)}; it must begin with index<TAB>prediction", 1)
                continue
            if len(cells) < 2:
                raise located(path, f"{len(cells)} column, and 2 are needed: index<TAB>prediction", number)
            identity, label = cells[0], cells[1]
        if identity in found:
            raise located(path, f"id {shown(identity)} was there already", number)
        found[identity] = _checked(task, label, path, number)
    return found


def _checked(task: Task, label: str, path: Path, number: int) -> str:
    if task.regression:
        if not math.isfinite(as_number(label)):
            raise located(path, f"prediction {shown(label)} is not a number", number)
    elif label not in task.labels:
        raise located(path, f"prediction {shown(label)} is not one of {', '.join(task.labels)}", number)
    return label


def metrics_of(task: Task, folder: Path, split: str, predicted: Sequence[str], gold: Sequence[str]) -> Scores:
    """The task's metrics; for joined rounds of ANLI the accuracy of each, then of all."""
    joined = read_manifest(folder).get("parts", {}).get(split, [])
    scores: Scores = {}
    for (name, _), rows in zip(joined, parts([count for _, count in joined])) if len(joined) > 1 else ():
        scores[f"accuracy {name}"] = score(("accuracy",), predicted[rows], gold[rows], False)["accuracy"]
    return {**scores, **score(task.metrics, predicted, gold, task.regression)}


def summary(runs: Sequence[Scores]) -> dict[str, Scores]:
    """By kind what `over_seeds` gives for each metric of the runs."""
    found = {name: over_seeds([run[name] for run in runs]) for name in runs[0]}
    kinds = ("mean", "median", "standard deviation")
    return {kind: {name: values[place] for name, values in found.items()} for place, kind in enumerate(kinds)}


def table(rows: Sequence[tuple[str, Scores]]) -> str:
    """Aligned columns, two decimals."""
    names = list(rows[0][1])
    cells = [["", *names]]
    cells += [[name, *("-" if math.isnan(s[metric]) else f"{s[metric]:.2f}" for metric in names)] for name, s in rows]
    return aligned(cells)


def in_order(path: Path, found: Mapping[str, Found], ids: Sequence[str], holds: str) -> list[Found]:
    """What was found for each id; other ids or fewer raise `UsageError`, which ``holds`` words."""
    lacking = [identity for identity in ids if identity not in found]
    if lacking or len(found) != len(ids):
        which = f"; {len(lacking)} are missing, the first for id {shown(lacking[0])}" if lacking else ""
        raise located(path, f"holds {len(found)} {holds.format(len(ids))}{which}")
    return [found[identity] for identity in ids]


def _from_files(paths: Sequence[Path], task: Task, ids: Sequence[str]) -> list[str]:
    """The predictions of one run, from one file or one for each round, in the order of the ids."""
    found: dict[str, str] = {}
    for path in paths:
        more = read_predictions(path, task)
        twice = next(iter(found.keys() & more.keys()), None)
        if twice is not None:
            raise located(path, f"id {shown(twice)} was in a file before it already")
        found.update(more)
    return in_order(paths[0], found, ids, "predictions, and the split has {} rows")


def _check_picks(path: Path, predicted: Sequence[str], groups: Sequence[int]) -> None:
    """Raise `UsageError` for a group of a ranking without its one pick, on which the metric counts."""
    for number, part in enumerate(parts(groups), start=1):
        picks = predicted[part].count(RIGHT)
        if picks != 1:
            refuse(path, f"group {number} has {picks} picks", f"a ranking has one in each group, labelled {RIGHT}")


def _data_folder(options: argparse.Namespace, scratch: Path) -> Path:
    """The data folder that --data-dir is or holds, or one made of the official files of --task."""
    folders = data_folders(Path(options.data_dir))
    if options.task is None:
        if len(folders) != 1:
            message = f"--data-dir holds {len(folders)} data folders; name one, or say which --task"
            raise located(Path(options.data_dir), message)
        return next(iter(folders.values()))
    if options.task in folders:
        return folders[options.task]
    require(options.task in TASKS, "--task", shown(options.task), f"one of {', '.join(TASKS)}")
    return official_folder(TASKS[options.task], "valid", scratch / "data", options)


def _labelled_splits(folder: Path, options: argparse.Namespace) -> list[str]:
    splits = chosen_splits(folder, options.split, "valid")
    if not splits:
        raise located(folder, "has no valid split; name another with --split")
    return splits


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """All runs on all splits: {split: {runs: {name: scores}, summary: ...}}."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = _data_folder(options, Path(scratch))
        task = task_of(folder)
        splits = _labelled_splits(folder, options)
        gold = {split: gold_labels(folder, split, task) for split in splits}
        runs: dict[str, dict[str, Scores]] = {split: {} for split in splits}
        if options.predictions:
            if len(splits) != 1:
                raise UsageError(f"--predictions needs one split; say --split with one of {', '.join(splits)}")
            ids = read_ids(folder, splits[0])
            for text in options.predictions:
                paths = [text] if Path(text).is_file() else text.split(",")
                predicted = _from_files(list(map(Path, paths)), task, ids)
                if task.ranking:
                    _check_picks(Path(text), predicted, read_groups(folder, splits[0], len(ids)))
                runs[splits[0]][text] = metrics_of(task, folder, splits[0], predicted, gold[splits[0]])
        for checkpoint in options.checkpoint or []:
            model = Model(Path(checkpoint), folder, options.cpu, options.fp16)
            for split in splits:
                predicted = model.predict(split, options.max_tokens).labels
                runs[split][checkpoint] = metrics_of(task, folder, split, predicted, gold[split])
        return {
            "task": task.name,
            "splits": {
                split: {"rows": len(gold[split]), "runs": found, "summary": summary(list(found.values()))}
                for split, found in runs.items()
            },
        }


def evaluate_fully(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All that `evaluate_model` finds: {split: {checkpoint: ...}}."""
    if options.predictions or not options.checkpoint:
        raise UsageError("--full needs --checkpoint and goes without --predictions: it runs the models")
    rows = None if options.attack_rows is None else whole_number("--attack-rows", options.attack_rows, 1)
    if options.picture:
        pyplot()  # so that what is missing is said now
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = _data_folder(options, Path(scratch))
        splits = _labelled_splits(folder, options)
        bpe = _typo_files(folder, options) if options.typos else None
        if Path(scratch) in folder.parents:
            _write_annotators(folder, splits, options)
        for checkpoint in options.checkpoint:
            model = Model(Path(checkpoint), folder, options.cpu, options.fp16)
            for split in splits:
                found.setdefault(split, {})[checkpoint] = evaluate_model(
                    model,
                    folder,
                    split,
                    attack=options.attack,
                    attack_rows=rows,
                    typos=bpe,
                    max_tokens=options.max_tokens,
                    seed=options.seed,
                    threads=None,
                )
        if options.outputs:
            write_arrays(Path(options.outputs), found, {split: read_ids(folder, split) for split in splits})
    return found


def _typo_files(folder: Path, options: argparse.Namespace) -> BpeFiles:
    """The encoder of a data folder, which says its kind alone."""
    if not options.bpe_dir:
        raise UsageError("--typos needs --bpe-dir, the folder of the encoder's files that preprocess was given")
    return find_bpe(options.bpe or read_manifest(folder).get("bpe"), Path(options.bpe_dir))


def _write_annotators(folder: Path, splits: Sequence[str], options: argparse.Namespace) -> None:
    """The annotators' shares of splits whose official files have their labels."""
    task = TASKS[options.task]
    for split, (source, place) in find_sources(task, Path(options.data_dir)).items():
        if split in splits and source.votes:
            write_shares(folder, split, task.labels, vote_shares(read_source(task, source, place)[0], task.labels))


def _show_fully(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """Tables on the terminal, and the files that were asked for."""
    for split, results in found.items():
        first = next(iter(results.values()))
        print(
            f"{first['task']} {split}, {first['rows']} rows; intervals: bootstrap, {first['resamples']} samples of rows"
        )
        for place, (name, result) in enumerate(results.items()):
            print("; ".join([f"{chr(ord('A') + place)} is {name}" if len(results) > 1 else name, *notes(result)]))
        print(comparison(list(results.values())))
        if options.picture:
            for path in draw(results, Path(f"{options.picture}-{split}")):
                print(f"drew {path}")
    if options.json:
        write_json(Path(options.json), {split: for_json(results) for split, results in found.items()})


def _main(argv: Sequence[str] | None, prog: str) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description="A task's official metrics for one or several checkpoints or prediction files."
    )
    parser.add_argument("--task", help="which, if --data-dir holds several data folders or the official files")
    parser.add_argument("--checkpoint", nargs="+", action="extend", help="one or several, e.g. of several seeds")
    parser.add_argument("--predictions", nargs="+", action="extend", help="files of predict; ANLI's rounds with commas")
    parser.add_argument("--split", help="labelled splits (all whose name begins with valid)")
    parser.add_argument("--json", help="write the same there")
    more = parser.add_argument_group("beyond the official metrics (docs/evaluation.md); each of these implies --full")
    more.add_argument("--full", action="store_true", help="calibration, annotators, intervals, paired differences")
    more.add_argument("--attack", action="store_true", help="attacks in embedding space: some 170 passes over each row")
    more.add_argument("--attack-rows", metavar="N", help="attack so many rows, drawn at random (all)")
    more.add_argument("--typos", action="store_true", help="accuracy under typing errors; needs --bpe-dir")
    more.add_argument("--outputs", metavar="FILE", help="write each row's logits and probabilities there (.npz)")
    more.add_argument("--picture", metavar="PREFIX", help="draw PREFIX-SPLIT-*.png; needs matplotlib")
    more.add_argument("--seed", default="1", help="of what is drawn at random (%(default)s)")
    add_model_options(parser)
    options = parser.parse_args(argv)
    options.max_tokens = whole_number("--max-tokens", options.max_tokens, 1)
    options.seed = whole_number("--seed", options.seed, 0)
    for path in (options.json, options.outputs):
        check_file(path)
    check_place(options.picture)
    options.attack = options.attack or options.attack_rows is not None
    if len(set(options.checkpoint or [])) < len(options.checkpoint or []):
        raise UsageError("--checkpoint names one twice; give each once")
    existing(Path(options.data_dir))
    for path in options.checkpoint or ():  # before the first one takes its time
        check_there(Path(path))
    if options.full or options.attack or options.typos or options.outputs or options.picture:
        _show_fully(evaluate_fully(options), options)
        return
    if not options.checkpoint and not options.predictions:
        raise UsageError("--checkpoint or --predictions must be given")
    result = evaluate(options)
    for split, found in result["splits"].items():
        print(f"{result['task']} {split}, {found['rows']} rows")
        rows = list(found["runs"].items())
        print(table(rows + (list(found["summary"].items()) if len(rows) > 1 else [])))
    if options.json:
        write_json(Path(options.json), result)


def main(argv: Sequence[str] | None = None, prog: str = "evaluate.py") -> int:
    """The command; its exit status."""
    return run("evaluate", _main, argv, prog)
