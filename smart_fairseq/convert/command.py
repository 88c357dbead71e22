"""What the two commands share: refusals of one line, and the exit status."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from smart_fairseq.errors import UsageError


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
