"""runs.jsonl: a line for each finished run. The file is replaced as a whole, so that no line is ever half there."""

import contextlib
import datetime
import fcntl
import json
import math
import platform
import subprocess
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import smart_fairseq

from ..data.lines import located
from ..errors import UsageError
from ..files import finite, whole_file

Line = dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """The lines so far, none where there is no file. Raises `UsageError` for one that is not JSON."""
    if not path.is_file():
        return []
    found = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            found.append({**line, "metrics": {k: math.nan if v is None else v for k, v in line["metrics"].items()}})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise located(path, number, "is not the line of a run; remove it, and its run is repeated") from None
    return found


def write_lines(path: Path, lines: Sequence[Line]) -> None:
    """Replace the file; numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        text = "".join(json.dumps(finite(line)) + "\n" for line in lines)
        partial.write_text(text, encoding="utf-8", newline="\n")


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``. Raises `UsageError` where another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{path}: another study runs in this folder; wait for it, or name another work:") from None
        yield


def facts() -> dict[str, str]:
    """What a run was made with: commit (where there is one), versions, hardware, date."""

    def git(*command: str) -> str:
        here = Path(smart_fairseq.__file__).parent
        with contextlib.suppress(OSError):
            return subprocess.run(["git", *command], cwd=here, capture_output=True, text=True).stdout.strip()
        return ""

    changed = " and changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "commit": git("rev-parse", "--short", "HEAD") + changed,
        "smart_fairseq": smart_fairseq.__version__,
        "fairseq": version("fairseq-fixed"),
        "torch": version("torch"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "date": datetime.date.today().isoformat(),
    }
