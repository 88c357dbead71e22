"""One door to the commands: `python -m smart_fairseq.commands NAME ...`; alone or with --help it lists them."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

PROGRAM = "python -m smart_fairseq.commands"
COMMANDS = {  # name to module, which is imported on demand, and what it does
    "download": (".download", "fetch the official files, checked and resumable"),
    "preprocess": (".preprocess", "official files, or your own, to the data folders of fairseq-train"),
    "predict": (".predict", "predictions of checkpoints, as files for the GLUE server or by id"),
    "evaluate": (".evaluate", "official metrics of checkpoints or prediction files"),
    "agreement": (".agreement", "accuracy and cross entropy by the annotators' agreement"),
    "export": ("..export", "a checkpoint of this plugin to what plain fairseq or transformers load"),
    "import-hf": ("..import_hf", "a Hugging Face folder (BERT, RoBERTa) to a checkpoint for fairseq"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Call the command that the first argument names; its exit status."""
    given, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if given in ("-h", "--help"):
        lines = [f"  {name:12}{line}" for name, (_, line) in COMMANDS.items()]
        end = f"{PROGRAM} NAME --help lists a command's options"
        print("\n".join([f"usage: {PROGRAM} NAME ...", "", *lines, "", end]))
        return 0
    name = given.replace("_", "-")
    if name not in COMMANDS:
        print(f"{PROGRAM}: error: no command {given!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[name]
    command: Callable[..., int] = import_module(module, __package__).main
    return command(rest, f"{PROGRAM} {name}")


if __name__ == "__main__":
    sys.exit(main())
