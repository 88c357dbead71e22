"""Errors for people: one line that names the flag or file, its value, what is allowed, what to do.

`UsageError` is what the package raises for bad input. Importing the package installs a hook that prints such an error
as its one line instead of a traceback, and does the same for the failures of fairseq that bad input to this plugin's
users leads to (`explain`). Everything else goes to the hook that was there before.
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


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it arose from, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def explain(error: BaseException) -> str | None:
    """The one line for a failure that a user can mend, or None for any other error."""
    for link in _chain(error):
        if isinstance(link, UsageError):
            return str(link)
    text = str(error)
    # a worker process hands its error on as text
    from_worker = re.search(r"^smart_fairseq\.errors\.UsageError: (.+)$", text, re.MULTILINE)
    if from_worker:
        return from_worker[1]
    if isinstance(error, AttributeError) and error.name == "register_classification_head":
        return (
            f"--arch: {type(error.obj).__name__} has no classification heads, which --task sentence_prediction needs; "
            "use a RoBERTa-style model (roberta, roberta_large, smart_bert, ...)"
        )
    if isinstance(error, FileNotFoundError):
        missing = str(error.filename or error)
        if missing.rstrip("'").endswith("dict.txt"):
            advice = "name a folder that examples/glue/preprocess.py or fairseq-preprocess wrote"
            if os.path.basename(os.path.dirname(missing)) == "label":
                advice = "if this is a regression task, give --regression-target --num-classes 1"
            return f"{missing}: no such file; {advice}"
    if isinstance(error, ValueError) and text.startswith("--finetune-from-model "):
        return f"{text}; name an existing checkpoint"
    if isinstance(error, ImportError) and "FullyShardedDataParallel" in text:
        return NOT_SHARDED  # fairseq asks for fairscale before the criterion can say so
    return _explain_checkpoint(error)


def _explain_checkpoint(error: BaseException) -> str | None:
    """A checkpoint that cannot be read, or that holds another model."""
    unfit = re.search(r"Cannot load model parameters from checkpoint (.+?);", str(error))
    if unfit:
        causes = "\n".join(str(link) for link in _chain(error)).splitlines()
        details = [line.strip().rstrip(".") for line in causes if line.startswith("\t")]
        more = f", and {len(details) - 1} more" if details[1:] else ""
        detail = f" ({details[0]}{more})" if details else ""
        return (
            f"--restore-file {unfit[1]}: its weights do not fit the model of this run{detail}; "
            "choose the --arch and sizes that the checkpoint was made with"
        )
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "load_checkpoint_to_cpu":
            foreign = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
            if foreign:
                what = (
                    f"it holds a {foreign[1]}, which torch's safe loader refuses; if you trust the file, load it once "
                    "and save it without that object"
                )
            else:
                first_line = (str(error).strip().splitlines() or [""])[0]
                what = (
                    f"not a readable checkpoint ({type(error).__name__}: {first_line}); it may have been cut short: "
                    "copy or download it again"
                )
            return f"--restore-file {frame.f_locals.get('path')}: {what}"
    return None


def install_excepthook() -> None:
    """Print what `explain` knows of a program's last error as one line on standard error; the status stays 1."""
    before = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        line = explain(error)
        if line is None:
            before(kind, error, trace)
        else:
            print(f"smart_fairseq: error: {line}", file=sys.stderr)

    sys.excepthook = excepthook
