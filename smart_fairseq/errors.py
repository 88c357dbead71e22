"""Errors for people: one line that names the flag or file, its value, what is allowed, what to do.

`UsageError` is what the package raises for bad input. With ``--user-dir`` the plugin also installs
`excepthook`, which prints such an error as its one line instead of a traceback, and does the same for
the failures of fairseq that bad input to this plugin's users leads to (`explain`). Everything else goes
to the hook that was there before.
"""

import os
import re
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NoReturn

NOT_SHARDED = (
    "--ddp-backend is fully_sharded; this plugin needs whole weights on each worker: use legacy_ddp or pytorch_ddp"
)


class UsageError(ValueError):
    """Bad input: the message is one line that names the flag or file, the value, what is allowed, what to do."""


def require(condition: bool, flag: str, value: Any, allowed: str) -> None:
    """Raise `UsageError` unless ``condition`` holds."""
    if not condition:
        raise UsageError(f"{flag} is {value}; it must be {allowed}")


def refuse(where: Any, what: str, allowed: str) -> NoReturn:
    """Raise the `UsageError` that names the file, what is wrong with it, and what would be right."""
    raise UsageError(f"{where}: {what}; {allowed}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it arose from, outermost first."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def explain(error: BaseException) -> str | None:
    """The one line for a failure that a user can mend, or None for any other error."""
    for link in _chain(error):
        if isinstance(link, UsageError):
            return str(link)
    # a worker process hands its error on as text
    from_worker = re.search(r"^smart_fairseq\.errors\.UsageError: (.+)$", str(error), re.MULTILINE)
    if from_worker:
        return from_worker[1]
    if isinstance(error, AttributeError) and error.name == "register_classification_head":
        return (
            f"--arch: {type(error.obj).__name__} has no classification heads, which --task sentence_prediction needs; "
            "use a RoBERTa-style model (roberta, roberta_large, smart_bert, ...)"
        )
    if isinstance(error, FileNotFoundError) and str(error.filename or error).rstrip("'").endswith("dict.txt"):
        missing = str(error.filename or error)
        if os.path.basename(os.path.dirname(missing)) == "label":
            return f"{missing}: no such file; if this is a regression task, give --regression-target --num-classes 1"
        return f"{missing}: no such file; name a folder that examples/glue/preprocess.py or fairseq-preprocess wrote"
    if isinstance(error, ValueError) and str(error).startswith("--finetune-from-model "):
        return f"{error}; name an existing checkpoint"
    if isinstance(error, ImportError) and "FullyShardedDataParallel" in str(error):
        return NOT_SHARDED  # fairseq asks for fairscale before the criterion can say so
    return _explain_checkpoint(error)


def _explain_checkpoint(error: BaseException) -> str | None:
    """A checkpoint that cannot be read, or that holds another model."""
    unfit = re.search(r"Cannot load model parameters from checkpoint (.+?);", str(error))
    reasons = [str(link) for link in _chain(error)]
    if unfit:
        details = [line.strip() for line in "\n".join(reasons[1:]).splitlines() if line.startswith("\t")]
        return (
            f"--restore-file {unfit[1]}: its weights do not fit the model of this run"
            + (
                f" ({details[0].rstrip('.')}" + (f", and {len(details) - 1} more)" if details[1:] else ")")
                if details
                else ""
            )
            + "; choose the --arch and sizes that the checkpoint was made with"
        )
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "load_checkpoint_to_cpu":
            path = frame.f_locals.get("path")
            foreign = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
            if foreign:
                return (
                    f"--restore-file {path}: it holds a {foreign[1]}, which torch's safe loader refuses; if you "
                    "trust the file, load it once and save it without that object"
                )
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
            return (
                f"--restore-file {path}: not a readable checkpoint ({type(error).__name__}: {first_line}); "
                "it may have been cut short: copy or download it again"
            )
    return None


_previous_hook = sys.excepthook


def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print what `explain` knows as one line on standard error; Python then exits with status 1."""
    line = explain(error)
    if line is None:
        _previous_hook(kind, error, trace)
    else:
        print(f"smart_fairseq: error: {line}", file=sys.stderr)


def install_excepthook() -> None:
    """Show `UsageError`s of a program as one line; called when fairseq loads the plugin."""
    global _previous_hook
    if sys.excepthook is not excepthook:
        _previous_hook = sys.excepthook
        sys.excepthook = excepthook
