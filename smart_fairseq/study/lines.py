"""runs.jsonl: a line for each finished run. The file is replaced as a whole, so that no line is ever half there."""

import contextlib
import datetime
import fcntl
import hashlib
import json
import math
import platform
import subprocess
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import smart_fairseq

from ..data.lines import located, shown
from ..errors import UsageError, parse_json
from ..files import finite, replace_file

Line = dict[str, Any]
# what every line has, with the kind of each; metrics and terms hold numbers
FIELDS: dict[str, Any] = {
    **dict.fromkeys(("key", "task", "method", "commit", "torch", "date"), str),
    **dict.fromkeys(("variant", "draw", "flags", "metrics", "terms", "rows"), dict),
    **dict.fromkeys(("seed", "updates"), int),
    **dict.fromkeys(("epochs", "warmup"), (int, float)),
}


def read_lines(path: Path) -> list[Line]:
    """The lines so far, none where there is no file. Raises `UsageError` for one that is no run's, or a run's again."""
    if not path.is_file():
        return []
    found: list[Line] = []
    places: dict[str, int] = {}
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line = _sound(parse_json(text.decode("utf-8"), once=True))
        except ValueError as error:
            what = f"is not the line of a run ({getattr(error, 'msg', error)}); remove it, and its run is repeated"
            raise located(path, what, number) from None
        first = places.setdefault(line["key"], number)
        if first != number:
            what = f"is about the run {shown(line['key'])} of line {first} again; remove one of the two"
            raise located(path, what, number)
        found.append(line)
    return found


def _sound(line: Any) -> Line:
    """The line; null among metrics and terms is nan again. Raises ValueError where something is not as written."""
    if not isinstance(line, dict):
        raise ValueError(f"a JSON {type(line).__name__}, and an object is needed")
    for name, kind in FIELDS.items():
        if not isinstance(line.get(name), kind):
            raise ValueError(f"key {name!r} holds {type(line[name]).__name__}" if name in line else f"no key {name!r}")
    numbers = [line.get(name) for name in ("seconds_per_update", "cpu_seconds_per_update")]
    numbers += [*line["metrics"].values(), *line["terms"].values()]
    if not all(value is None or type(value) in (int, float) for value in numbers):
        raise ValueError("a word where a number is needed")
    if not {"train", "valid"} <= line["rows"].keys() or type(line["draw"].get("flip")) not in (int, float):
        raise ValueError("'rows' or 'draw' lacks a part")
    return {**line, **{kind: _with_nan(line[kind]) for kind in ("metrics", "terms")}}


def _with_nan(numbers: dict[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in numbers.items()}


def write_lines(path: Path, lines: Sequence[Line]) -> None:
    """Replace the file; numbers that are not finite become null."""
    replace_file(path, "".join(json.dumps(finite(line)) + "\n" for line in lines))


@contextlib.contextmanager
def lines_to_change(path: Path) -> Iterator[list[Line]]:
    """The lines, which replace the file when the block ends well; a study that would change them too waits till then.

    Hold it for moments.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside the file, which is another one after each change
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lines = read_lines(path)
        yield lines
        write_lines(path, lines)


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

    commit = ""
    if git("ls-files", "__init__.py"):  # not where it is installed within someone else's repository
        changed = " and changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        commit = git("rev-parse", "--short", "HEAD") + changed
    return {
        "commit": commit,
        "smart_fairseq": smart_fairseq.__version__,
        "fairseq": version("fairseq-fixed"),
        "torch": version("torch"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "host": _host(),
        "date": datetime.date.today().isoformat(),
    }


def _host() -> str:
    """Tells machines apart, and names none: from the node's name, the processor's model and the GPU's."""
    import torch  # takes seconds to load

    parts = [platform.node()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        parts += [line for line in lines if line.startswith("model name")][:1]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
