"""The command export: `python -m smart_fairseq.export CHECKPOINT OUT.pt [--teacher] [--task TASK]`.

It turns a checkpoint of this plugin into one that plain fairseq loads, with the same predictions: convert/exporting.py.
With ``--format huggingface`` it writes a folder for transformers instead: convert/hugging_face.py.
With ``--task`` it takes one task of a checkpoint of several: convert/single_task.py.
With ``--teacher`` the weights are those of the teacher that --optimizer mbpp keeps, instead of the model's.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from smart_fairseq.commands.run import run
from smart_fairseq.errors import refuse
from smart_fairseq.files import check_place, whole_file

FORMATS = ("fairseq", "huggingface")


def export(
    checkpoint: Path,
    out: Path,
    teacher: bool = False,
    overwrite: bool = False,
    format: str = "fairseq",
    data_dir: Path | None = None,
    bpe_dir: Path | None = None,
    task: str | None = None,
) -> str:
    """Write a checkpoint, or the teacher in it, in another format, completely or not at all; a line for the user.

    ``data_dir`` and ``bpe_dir``, for huggingface alone, stand in for the folders that the checkpoint's run had;
    ``task``: which of a smart_multitask checkpoint.
    Raises `UsageError` for what is no checkpoint of smart_bert or RoBERTa, for impossible places, and for an ``out``
    that is there unless ``overwrite`` is set.
    """
    if format == "huggingface":
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            refuse(out, "exists already", "OUT must be an empty folder or not exist")
    elif data_dir or bpe_dir:
        refuse("--data-dir and --bpe-dir", f"given with --format {format}", "they are for huggingface")
    elif out.is_dir() or not out.parent.is_dir():
        refuse(out, "cannot be written", "OUT.pt must be a file in an existing folder")
    if not checkpoint.exists():
        refuse(checkpoint, "no such file", "CHECKPOINT must be a checkpoint written by fairseq-train")
    if out.exists() and out.samefile(checkpoint):
        refuse(out, "is CHECKPOINT itself", "choose another file")
    if out.is_file() and not overwrite:
        refuse(out, "exists already", "choose another OUT.pt or give --overwrite")
    check_place(out)

    import torch  # what takes seconds to load comes after what can be said without

    from smart_fairseq import register
    from smart_fairseq.convert.checkpoint import as_written, load_checkpoint, scores_candidates
    from smart_fairseq.convert.exporting import left_behind, teacher_weights, to_plain_roberta
    from smart_fairseq.convert.hugging_face import write_hugging_face
    from smart_fairseq.convert.single_task import chosen_task, of_several_tasks

    register()
    state = load_checkpoint(checkpoint)
    whose = "the teacher's weights, " if teacher else ""
    with as_written(checkpoint):
        if scores_candidates(state):
            what = "ranks candidates by its LM head (--task smart_wnli)"
            refuse(checkpoint, what, "fairseq and transformers know no such head; evaluate and predict take it")
        if teacher:
            state["model"] = teacher_weights(checkpoint, state)
        state = chosen_task(checkpoint, state, task)
        if of_several_tasks(state):
            what = f"the head of {task} is a stochastic answer network (--multitask-san)"
            refuse(checkpoint, what, "fairseq and transformers know heads without it; evaluate and predict take it")
        if format == "huggingface":
            write_hugging_face(checkpoint, state, out, data_dir, bpe_dir)
            return f"wrote {out}: {whose}for AutoModelForSequenceClassification and AutoTokenizer of transformers"
        exported = to_plain_roberta(checkpoint, state)
    with whole_file(out) as partial, open(partial, "wb") as file:  # which tells why it cannot be written
        torch.save(exported, file)
    return f"wrote {out}: {whose}arch roberta, loads without this plugin (float32 or bfloat16){left_behind(state)}"


def _main(argv: Sequence[str] | None, prog: str) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description="turn a checkpoint of this plugin into one that plain fairseq or transformers load"
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="written by fairseq-train or import_hf")
    parser.add_argument("out", metavar="OUT", type=Path, help="the file to write, for huggingface the folder")
    help_of_teacher = "write the teacher's weights, which --optimizer mbpp keeps"
    parser.add_argument("--teacher", action="store_true", help=help_of_teacher)
    parser.add_argument("--task", metavar="TASK", help="of a checkpoint of --task smart_multitask: which, as RTE")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.add_argument("--format", choices=FORMATS, default="fairseq", help="plain fairseq's (default) or the folder")
    data = "huggingface: the data folder, for label names (default: the one it was trained on)"
    parser.add_argument("--data-dir", metavar="DIR", type=Path, help=data)
    bpe = "huggingface: dict.txt and the encoder's files (default: beside the model that training started from)"
    parser.add_argument("--bpe-dir", metavar="DIR", type=Path, help=bpe)
    print(f"export: {export(**vars(parser.parse_args(argv)))}")


def main(argv: Sequence[str] | None = None, prog: str = "export") -> int:
    """The command; its exit status."""
    return run("export", _main, argv, prog)


if __name__ == "__main__":
    sys.exit(main())
