"""What all readers share: the lines of a file, a row, and errors that name file and line."""

import gzip
import math
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UsageError, parse_json

UTF8_MARK = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """One example."""

    id: str
    texts: tuple[str, ...]
    label: str | None  # the task's word, or a number as it stands in the file; None where it is not published
    votes: tuple[str, ...] = ()
    file: str = ""
    line: int = 0


@dataclass
class Report:
    """What became of the lines of one split."""

    files: list[str] = field(default_factory=list)
    left_out: "Counter[str]" = field(default_factory=Counter)  # reason to count


def located(path: Path, message: str, line: int = 0) -> UsageError:
    """An error at a place: ``FILE:LINE: message``; line 0 stands for the file as a whole."""
    return UsageError(f"{path}:{line}: {message}" if line else f"{path}: {message}")


def shown(value: str, limit: int = 60) -> str:
    """The value in quotes, on one line, shortened."""
    return repr(value if len(value) <= limit else value[: limit - 3] + "...")


def as_number(text: str) -> float:
    """The number that stands there; nan for anything else."""
    try:
        return math.nan if "_" in text else float(text)  # Python's own spelling of thousands
    except ValueError:
        return math.nan


def source_path(folder: Path, name: str) -> Path | None:
    """The file, plain or compressed with gzip, or None."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_bytes(path: Path) -> bytes:
    """The whole file, decompressed; refuses what is not text, naming what it is instead."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise located(path, f"not a complete gzip file ({error}); download it again") from None
    except IsADirectoryError:
        raise located(path, "is a folder, and a file is needed") from None
    except OSError as error:
        raise located(path, f"cannot be read ({error.strerror})") from None
    if not data.strip():
        raise located(path, "is empty; download it again")
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        raise located(path, "is a web page, not data: the download went wrong; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise located(path, "is a Git LFS pointer, not the file itself; run `git lfs pull` where it came from")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise located(path, "is UTF-16 text, and UTF-8 is needed; convert it with `iconv -f UTF-16 -t UTF-8`")
    if data[:4] == b"PK\x03\x04" or data[:2] == b"\x1f\x8b":
        raise located(path, "is an archive; unpack it first")
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise located(path, "holds a zero byte: this is a binary file, and text is needed", line)
    return data


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of each line."""
    lines = read_bytes(path).removeprefix(UTF8_MARK).removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix(b"\r")
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            message = f"byte 0x{byte:02x} at position {error.start + 1} is not UTF-8; convert the file to UTF-8"
            raise located(path, message, number) from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds. Raises `UsageError` where it holds none."""
    try:
        found = parse_json(read_bytes(path).decode("utf-8"))
    except ValueError as error:
        message = f"cannot be read as JSON ({error}); make, copy or download it again"
        raise located(path, message, getattr(error, "lineno", 0)) from None
    if not isinstance(found, dict):
        raise located(path, f"holds a {type(found).__name__}, and a JSON object is needed")
    return found


class Skip(Exception):
    """This row is left out, for this reason."""
