"""What the commands share: one-line errors with exit status 2, clean-up when asked to stop, output without a reader."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec

from ..errors import UsageError, one_line
from ..files import tidy_on_sigterm

Given = ParamSpec("Given")


class _Output:
    """Standard output whose reader may go, as ``head`` does: then the rest is thrown away, and the work goes on.

    Signs that its encoding lacks are written as escapes.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._thrown_away():
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        with self._thrown_away():
            self._stream.flush()

    @contextlib.contextmanager
    def _thrown_away(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # where Python writes what it still holds, at the latest at its end
            os.close(nowhere)


@contextlib.contextmanager
def _unread_output() -> Iterator[None]:
    if sys.stdout is None:  # closed from the start
        yield
        return
    output: Any = _Output(sys.stdout)
    with contextlib.redirect_stdout(output):
        try:
            yield
        finally:
            output.flush()


def run(name: str, command: Callable[Given, None], *given: Given.args, **named: Given.kwargs) -> int:
    """Call a command; its exit status. Bad input and a failing disk give one line on standard error and status 2."""
    fairseq = logging.getLogger("fairseq")
    level = fairseq.level
    fairseq.setLevel(logging.WARNING)  # what it says while it loads is not for the reader of a table
    try:
        with tidy_on_sigterm(), _unread_output(), warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")  # of libraries: what we have to say is printed
            command(*given, **named)
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
