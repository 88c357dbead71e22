"""Updates in many forms on a CUDA device that is not there; a program of its own, run by test_pretended_cuda.py.

    python tests/pretended_updates.py FOLDER < forms.json > counts.json

FOLDER holds tiny data; each form is {"flags": [...], "precision": "bf16", ...}, as `counts` takes it.
"""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "benchmarks"))

# ruff: noqa: E402, I001  before torch
import pretended_cuda

import toolkit
import torch

pretended_cuda.FOLDERS["tests"] = HERE


def read(value: torch.Tensor) -> torch.Tensor:
    return value * float(value)


def add_on_cpu(value: torch.Tensor) -> torch.Tensor:
    return (value + torch.zeros(1)).sum()


def add_copied(value: torch.Tensor) -> torch.Tensor:
    return value + torch.zeros(()).to(value.device)


def ten_launches(value: torch.Tensor) -> torch.Tensor:
    for _ in range(10):
        value = value * 1.0
    return value


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float()": read,
    "CPU tensor": add_on_cpu,
    "copied CPU tensor": add_copied,
    "ten launches": ten_launches,
}


def counts(
    data: Path, sample: Any, flags: list[str], precision: str, change: str = "", **options: Any
) -> dict[str, Any]:
    """Of an update that is not the first, which makes the optimizer's state and the teacher.

    Args:
        flags: of fairseq-train.
        precision: as `pretended_cuda.Update` takes it.
        change: what is done to the smoothness term, from `CHANGES`; to see that the counts would show it.
        options: as `toolkit.command` takes them.
    """
    try:
        # heads of a multiple of 8 channels, as fused kernels want them
        cfg = toolkit.parse(toolkit.command(data, "--encoder-embed-dim", "32", *flags, **options))
        update = pretended_cuda.Update(cfg, precision)
        if change:
            altered = CHANGES[change]
            toolkit.alter_terms(update.criterion, lambda _, found: found._replace(value=altered(found.value)))
        update.take(sample, 0)
        device = update.take(sample, 1)
    except Exception:
        return {"error": traceback.format_exc(limit=-6)}
    return {
        "form": update.form,
        "launches": device.launches,
        "waits": device.waits,
        "draws": [stretch for stretch in device.draws if stretch],
        "operations": dict(device.operations.most_common()),
    }


def main() -> None:
    data = Path(sys.argv[1])
    _, task, _, _ = toolkit.build(toolkit.command(data))
    batch = toolkit.batch(task, 4)
    with pretended_cuda.pretended() as to_device:
        sample = to_device(batch)
        found = {name: counts(data, sample, **form) for name, form in json.load(sys.stdin).items()}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
