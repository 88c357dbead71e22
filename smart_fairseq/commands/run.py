"""What the commands share: one-line errors with exit status 2, clean-up when asked to stop."""

import logging
import sys
import warnings
from collections.abc import Callable, Sequence

from ..errors import UsageError, one_line
from ..files import tidy_on_sigterm


def run(name: str, command: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Call a command; its exit status. Bad input and a failing disk give one line on standard error and status 2."""
    fairseq = logging.getLogger("fairseq")
    level = fairseq.level
    fairseq.setLevel(logging.WARNING)  # what it says while it loads is not for the reader of a table
    try:
        with tidy_on_sigterm(), warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")  # of libraries: what we have to say is printed
            command(argv)
    except (UsageError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.strerror:
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        print(f"{name}: error:", one_line(message), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130
    finally:
        fairseq.setLevel(level)
    return 0
