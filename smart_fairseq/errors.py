"""Errors for people: one line that names the flag or file, its value, what is allowed, what to do.

`UsageError` is what the package raises for bad input. Importing the package installs a hook that prints such an error
as its one line instead of a traceback, and does the same for the failures of fairseq that bad input to this plugin's
users leads to (`explain`). Everything else goes to the hook that was there before.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

NOT_SHARDED = (
    "--ddp-backend is fully_sharded; this plugin needs whole weights on each worker: use legacy_ddp or pytorch_ddp"
)
_ANOTHER = "give another --save-dir, and to start from its weights --finetune-from-model"


class UsageError(ValueError):
    """Bad input: the message is one line that names the flag or file, the value, what is allowed, what to do."""


def require(condition: bool, flag: str, value: Any, allowed: str) -> None:
    """Raise `UsageError` unless ``condition`` holds."""
    if not condition:
        raise UsageError(f"{flag} is {value}; it must be {allowed}")


def refuse(where: Any, what: str, allowed: str) -> NoReturn:
    """Raise the `UsageError` that names the file, what is wrong with it, and what would be right."""
    raise UsageError(f"{where}: {what}; {allowed}")


def one_line(message: str) -> str:
    """The message without line ends and terminal codes, which file names and files' contents may bring along."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in message).split())


def parse_json(text: str, once: bool = False) -> Any:
    """What stands there. Raises ValueError where it is no JSON, or what its escapes stand for is no text.

    ``once``: no object may have a key twice; without it the last one counts.
    """
    try:
        value = json.loads(text, object_pairs_hook=_each_once if once else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\u" in text:  # half of a pair of surrogates could never be written
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} twice")
        found[key] = value
    return found


def unreadable(error: Exception) -> str:
    """What is wrong with a checkpoint at which torch's safe loader raised this; its own words advise to trust it."""
    text = str(error)
    foreign = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", text)
    if foreign or "allowlist" in text or "call reduce" in text:
        what = foreign[1] if foreign else "an object"
        return f"it holds {what}, which torch's safe loader refuses: it could run code; save the weights without it"
    if isinstance(error, OSError) and error.filename:
        return f"cannot be read ({error.strerror})"
    what = f"not a readable checkpoint of fairseq ({type(error).__name__})"
    return f"{what}: cut short, or another program's file; copy or download it again"


def unfit(text: str) -> str:
    """How a checkpoint's weights differ from a model's, in brackets; from what torch says about loading them."""
    shape = r"torch\.Size\((\[.*?\])\)"
    sizes = re.findall(rf"size mismatch for (\S+): .*?{shape} from checkpoint.*?{shape}", text)
    found = [f"{name} is {there} in it and {here} in the model" for name, there, here in sizes]
    found += [f"it has no {name}" for name in re.findall(r'Missing key\(s\) in state_dict: "([^"]+)"', text)]
    found += [f"the model has no {name}" for name in re.findall(r'Unexpected key\(s\) in state_dict: "([^"]+)"', text)]
    more = f", and {len(found) - 1} more" if found[1:] else ""
    return f"its weights do not fit the model ({found[0]}{more})" if found else "its weights do not fit the model"


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it arose from, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def explain(error: BaseException) -> str | None:
    """The one line for a failure that a user can mend, or None for any other error."""
    line = _explained(error)
    return None if line is None else one_line(line)


def _explained(error: BaseException) -> str | None:
    for link in chain(error):
        if isinstance(link, UsageError):
            return str(link)
        if isinstance(link, FloatingPointError):  # fairseq then looks for the place, and falls over RoBERTa's output
            advice = "lower --lr, lengthen --warmup-updates or give --clip-norm"
            what = f"the gradients are not finite; {advice}" if "Nan/Inf" in str(link) else str(link)
            return f"{what} (the weights are in crash.pt of --save-dir)"
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
            from .data.binarize import one_of_those_in  # which imports this module

            folder = Path(missing.strip("'")).parent
            advice = one_of_those_in(folder.parent) or advice
            if (folder / "input0").is_dir():
                advice = (
                    "is the checkpoint an encoder that is not fine-tuned, or of another --task than this data folder?"
                )
            if os.path.basename(os.path.dirname(missing)) == "label":
                advice = "if this is a regression task, give --regression-target --num-classes 1"
            return f"{missing}: no such file; {advice}"
    if isinstance(error, ValueError) and text.startswith("--finetune-from-model "):
        if "--reset-optimizer or" in text:
            return "--finetune-from-model is set with a --reset flag; leave these out, as it resets all that they do"
        if " and --restore-file (" in text:
            return "--finetune-from-model is set with --restore-file; leave one of them out"
        return f"{text}; name an existing checkpoint"
    if isinstance(error, AssertionError) and text.startswith("could not find dataset: "):
        missing = text.removeprefix("could not find dataset: ")
        without = ", or train without it by --disable-validation" if os.path.basename(missing) == "valid" else ""
        return f"{missing}: no such part in the data folder; name another folder{without}"
    other = re.match(r"(Criterion|Optimizer) does not match; .* (\S+) vs (\S+)$", text)
    if isinstance(error, AssertionError) and other:
        what = f"the checkpoint to go on from is of a run with {other[2]}, and this one has {other[3]}"
        return f"--{other[1].lower()}: {what}; {_ANOTHER}"
    if isinstance(error, ValueError) and text.startswith("loaded state dict ") and "parameter group" in text:
        what = "the checkpoint's optimizer has another number of weights than this run, as with other tasks or heads"
        return f"{what}; {_ANOTHER}"
    if isinstance(error, ImportError) and "FullyShardedDataParallel" in text:
        return NOT_SHARDED  # fairseq asks for fairscale before the criterion can say so
    if "lr_scheduler.total_num_update=null" in text:  # hydra's, where polynomial_decay was not told
        return "--total-num-update is not given; --lr-scheduler polynomial_decay needs it, equal to --max-update"
    causes = "\n".join(str(link) for link in chain(error))
    unfit_one = re.search(r"Cannot load model parameters from checkpoint (.+?);", text)
    if unfit_one or "loading state_dict for" in text:
        where = f"{unfit_one[1]}: " if unfit_one else "the checkpoint: "
        return f"{where}{unfit(causes)}; choose the --arch, sizes and data that it was made with"
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
    hydra = sys.modules.get("hydra.core.hydra_config")
    if hydra and hydra.HydraConfig.initialized():
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # without it hydra prints tracebacks of its own
