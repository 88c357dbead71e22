"""What the commands share: one-line errors with exit status 2, clean-up when asked to stop, progress."""

import logging
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from ..errors import UsageError


def _stop(number: int, _: FrameType | None) -> None:
    # as an exception, so that what is half written is removed on the way out
    sys.exit(128 + number)


def run(name: str, command: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Call a command; its exit status. Bad input and a failing disk give one line on standard error and status 2."""
    before = signal.signal(signal.SIGTERM, _stop)
    fairseq = logging.getLogger("fairseq")
    level = fairseq.level
    fairseq.setLevel(logging.WARNING)  # what it says while it loads is not for the reader of a table
    try:
        command(argv)
    except UsageError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"{name}: error: {place}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
        fairseq.setLevel(level)
    return 0


class Progress:
    """A bar on a terminal, a plain line at the end of each step otherwise."""

    def __init__(self, total: int, what: str, unit: str = " rows") -> None:
        self._what, self._done, self._unit = what, 0, unit
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, unit=unit, leave=False)

    def advance(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)

    def close(self, note: str = "") -> None:
        if self._bar is not None:
            self._bar.close()
        print(f"{self._what}: {self._done}{self._unit}{note}", flush=True)
