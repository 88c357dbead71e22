"""What the two commands share: errors of one line, with exit status 2, and small files that are read or refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from smart_fairseq.errors import UsageError

MODEL_DIR_HOLDS = "MODEL_DIR must hold config.json, model.safetensors and the vocabulary"
Content = TypeVar("Content")


def refuse(where: Any, what: str, allowed: str) -> NoReturn:
    """Raise the error that names the file, what is wrong with it, and what would be right."""
    raise UsageError(f"{where}: {what}; {allowed}")


def run(name: str, work: Callable[[], None]) -> int:
    """Do the work of a command; its exit status: 0, or 2 with one line on standard error."""
    try:
        work()
    except (UsageError, OSError) as error:
        print(f"{name}: error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    return 0


def _read(path: Path, kind: str, parse: Callable[[str], Content]) -> Content:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        refuse(path, "no such file", MODEL_DIR_HOLDS)
    except (OSError, ValueError) as error:
        refuse(path, f"cannot be read as {kind} ({error})", "copy or download it again")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; `UsageError` if the file is missing, broken, or holds something else."""
    content = _read(path, "JSON", json.loads)
    if not isinstance(content, dict):
        refuse(path, f"holds a {type(content).__name__}", "a JSON object is needed")
    return content


def read_lines(path: Path) -> list[str]:
    """The file's lines without line ends; `UsageError` if it is missing or not UTF-8."""
    return _read(path, "UTF-8 text", lambda text: text.removesuffix("\n").split("\n") if text else [])
