"""Files and folders that are there whole or not at all, and their SHA-256.

What is written goes to a hidden folder beside the target, .NAME.partial-PID, and takes the target's name when it is
complete. It is removed when the writing fails and on SIGTERM. What a process left that was killed without notice is
removed by the next one that writes the same target.
"""

import contextlib
import glob
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import UsageError, chain


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finite(value: Any) -> Any:
    """A value for JSON, which has no nan and no infinity: null in their place."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_place(path: str | Path | None) -> None:
    """Raise `UsageError` where a file or folder of that name could not be written, before the work for it begins."""
    if path is not None:
        path = Path(path)
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UsageError(f"{path}: cannot be written (no file and no folder); choose another name")
        with hidden_folder(path):
            pass


def check_file(path: str | Path | None) -> None:
    """The same for a file alone."""
    if path is not None and Path(path).is_dir():
        raise UsageError(f"{path}: cannot be written (it is a folder); name a file")
    check_place(path)


@contextlib.contextmanager
def _named(target: Path, partial: Path) -> Iterator[None]:
    """Turn a failure of the disk, which names the hidden place or none, into a `UsageError` that names the target."""
    try:
        yield
    except (UsageError, ConnectionError):
        raise
    except Exception as error:  # torch.save raises a RuntimeError when the disk is full, on top of the system's
        for link in chain(error):
            if isinstance(link, OSError) and link.strerror:
                above = Path(str(link.filename)) in target.parents
                if above or link.filename is None or str(partial) in str(link.filename):
                    reason = f"{link.filename}: {link.strerror}" if above else link.strerror
                    raise UsageError(f"{target}: cannot be written ({reason}); nothing was kept") from error
        raise


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The path of a file of that name in a hidden folder, to be written: it takes its place when the block ends well.

    Close the file within the block. ``path`` stays as it was when the block fails; folders and a failing disk as in
    `hidden_folder`.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: cannot be written (it is no file); choose another name")
    with hidden_folder(path) as folder:
        partial = folder / path.name
        yield partial
        os.replace(partial, path)


def replace_file(path: Path, text: str) -> None:
    """Write the whole file or nothing."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """The same for JSON, as `finite` makes it."""
    replace_file(path, json.dumps(finite(value), indent=1) + "\n")


@contextlib.contextmanager
def hidden_folder(target: Path) -> Iterator[Path]:
    """An empty hidden folder beside ``target``, which vanishes at the end unless it was moved away.

    Folders above it are made, and vanish as well if nothing is in them. A failing disk is a `UsageError`.
    """
    made = [parent for parent in target.parents if not parent.exists()]
    partial = _beside(target, "partial")
    with tidy_on_sigterm(), _named(target, partial):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _clear_up(target)
            partial.mkdir()
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()  # goes only while it is empty


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target``, to be filled: it takes its place, old files and all, when the block ends well.

    Behind a link, its folder is what is replaced. ``target`` stays as it was when the block fails. Raises `UsageError`
    where this process works in it, which would be nowhere then.
    """
    target = Path(os.path.realpath(target))
    if Path.cwd().is_relative_to(target):
        raise UsageError(f"{target}: cannot be replaced (the command is called in it); call it in another folder")
    with hidden_folder(target) as partial:
        yield partial
        old = _beside(target, "old")
        if target.is_dir():
            target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def whole_files(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A hidden folder beside ``folder``, to be filled with some of ``names``: they move there when the block ends well.

    Other files of ``folder`` stay. The first name goes first and comes last: where it is, the rest belongs to it.
    """
    with hidden_folder(folder) as partial:
        yield partial
        if not folder.exists():
            partial.rename(folder)
            return
        replaces = (folder / names[0]).exists()
        (folder / names[0]).unlink(missing_ok=True)
        for name in reversed(names):
            if (partial / name).exists():
                os.replace(partial / name, folder / name)
            elif replaces:
                (folder / name).unlink(missing_ok=True)  # its successor does without


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}")


def _clear_up(target: Path) -> None:
    """What processes that were killed have left beside ``target``; an old folder that lost its name gets it back."""
    with contextlib.suppress(OSError):  # what it stands in the way of will say so
        for stale in list(target.parent.glob(f".{glob.escape(target.name)}.*-*")):
            kind, _, number = stale.name[len(target.name) + 2 :].rpartition("-")
            if kind not in ("partial", "old") or not number.isdigit() or _another_runs(int(number)):
                continue
            if kind == "old" and not target.exists():
                stale.rename(target)
            else:
                shutil.rmtree(stale, ignore_errors=True)


def _another_runs(number: int) -> bool:
    """Whether a process of that number runs beside this one, which may have the number of one that was killed."""
    if number == os.getpid():
        return False
    try:
        os.kill(number, 0)
    except OSError as error:  # one that is another user's runs as well
        return not isinstance(error, ProcessLookupError)
    return True


@contextlib.contextmanager
def tidy_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as an error does, unless the program has an answer of its own to it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
