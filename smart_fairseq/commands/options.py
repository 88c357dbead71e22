"""Options that several commands take, and what they stand for: numbers, lists of names, data folders, encoders."""

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..data.binarize import MANIFEST, Folder, data_folders_in, read_manifest
from ..data.bpe import BpeFiles, find_bpe
from ..data.lines import located, read_object, shown
from ..data.pool import Pool
from ..data.readers import read_task
from ..data.tasks import Task
from ..errors import UsageError, require


def whole_number(flag: str, text: str, least: int) -> int:
    """Parse a flag's value. Raises `UsageError` below ``least``."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    require(value >= least, flag, shown(text), f"a whole number from {least}")
    return value


def chosen(flag: str, text: str, allowed: Iterable[str], otherwise: str = "") -> list[str]:
    """Parse a list of names in any case, as ``allowed`` writes them. Raises `UsageError` for others and for none.

    otherwise: ends the message, as with ", or all".
    """
    by_lower = {name.lower(): name for name in allowed}
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    known = bool(names) and set(names) <= set(by_lower) and len(set(names)) == len(names)
    require(known, flag, shown(text), f"a list, each once, of {', '.join(by_lower.values())}{otherwise}")
    return [by_lower[name] for name in names]


def existing(data_dir: Path) -> None:
    """Raise `UsageError` if the folder of ``--data-dir`` is not there."""
    if not data_dir.is_dir():
        raise located(data_dir, "--data-dir: no such folder")


def data_folders(data_dir: Path) -> dict[str, Path]:
    """Task to data folder: ``data_dir`` itself, or the folders in it that preprocess wrote."""
    existing(data_dir)
    places = [data_dir] if (data_dir / MANIFEST).is_file() else data_folders_in(data_dir)
    return {read_manifest(place)["task"]: place for place in places}


def chosen_splits(folder: Path, text: str | None, kind: str) -> list[str]:
    """The splits that a flag names; without one, those of a kind (test, valid)."""
    there = read_manifest(folder)["rows"]
    if text is None:
        return [split for split in there if split.startswith(kind)]
    splits = [split.strip() for split in text.split(",")]
    for split in splits:
        if split not in there:
            raise UsageError(f"--split is {shown(text)}; {folder} has {', '.join(there)}")
    return splits


def add_encoder_options(parser: argparse.ArgumentParser, when: str = "", official: bool = True) -> None:
    """The options of all commands that read ``official`` files, or one's own; ``when`` begins their help."""
    kinds = "gpt2 (RoBERTa), sentencepiece or bert; default: what --bpe-dir says, else gpt2"
    files = "dict.txt and encoder.json, vocab.bpe (gpt2), *.model (sentencepiece) or vocab.txt (bert)"
    workers = str(min(8, os.cpu_count() or 1))
    parser.add_argument("--bpe", help=f"{when}{kinds}")
    parser.add_argument(
        "--bpe-dir", help=f"{when}folder with {files}" + ("; default: gpt2_bpe in --data-dir" if official else "")
    )
    parser.add_argument("--workers", default=workers, help=f"{when}processes that encode (%(default)s)")


def encoder_files(options: argparse.Namespace) -> BpeFiles:
    """The encoder that --bpe and --bpe-dir name."""
    return find_bpe(options.bpe, Path(options.bpe_dir or Path(options.data_dir) / "gpt2_bpe"))


def official_folder(task: Task, kind: str, target: Path, options: argparse.Namespace) -> Path:
    """Make a data folder of --split, or the splits of a kind, from the official files, as preprocess would."""
    named = [split.strip() for split in (options.split or "").split(",") if split.strip()]
    splits: Sequence[str] = named or [split for split in task.splits if kind in split]
    bpe = encoder_files(options)
    rows, _ = read_task(task, Path(options.data_dir))
    pool = Pool(bpe, whole_number("--workers", options.workers, 1), None, task.texts)
    folder = Folder(target, task, pool)
    folder.start(rows.get("train", []))
    for split in splits:
        if split in rows:
            folder.write(split, rows[split])
    folder.finish()
    return target


def plugin_flags() -> list[str]:
    """The flags of fairseq-train that bring this plugin, from the folder of work."""
    return ["--user-dir", os.path.relpath(Path(__file__).parents[1])]


def import_report(folder: Path) -> dict[str, Any]:
    """What `import_hf` wrote about an encoder, as its architecture's "flags"; `UsageError` for another folder."""
    return read_object(folder / "import.json")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options of all commands that run a model on a data folder."""
    parser.add_argument("--data-dir", required=True, help="a data folder, a folder of these, or the official files")
    add_encoder_options(parser, "with official files: ")
    parser.add_argument("--max-tokens", default="8192", help="in a batch, padding counted (%(default)s)")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--fp16", action="store_true", help="half precision (GPU)")
