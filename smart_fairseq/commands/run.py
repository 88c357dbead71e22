"""What the commands share: one-line errors with exit status 2, clean-up when asked to stop."""

import logging
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

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
