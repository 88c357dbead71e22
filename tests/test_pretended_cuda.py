"""On a GPU that is not there: no mixed devices, no wait beyond the known, no launch too many, the same draws.

`pretended_updates.py` takes an update in each form and counts; results are not seen.
"""

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from toolkit import BOLD, CRITERIA, ROOT

TORCH = "2.13.0+cpu"
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="compiles a device guard with g++"),
    pytest.mark.skipif(torch.__version__ != TORCH, reason=f"counts and guard are those of torch {TORCH}"),
]

RELATIVE = ["--smart-recipe", "smart"]  # 3 % of the embeddings, two forwards in every precision
TWO_FORWARDS = [*BOLD, "--smart-mode", "finite"]
TANGENT = ["--smart-mode", "tangent"]
Form = dict[str, Any]

FORMS: dict[str, Form] = {
    "plain": {"flags": [], "criterion": "sentence_prediction", "optimizer": "adam"},
    "MBPP alone": {"flags": ["--smart-weight", "0"]},
    "SMART alone": {"flags": RELATIVE, "optimizer": "adam"},
    "default": {"flags": RELATIVE},
    "release": {"flags": ["--smart-recipe", "release"]},
    "two steps": {"flags": [*RELATIVE, "--smart-steps", "2"]},
    "two steps, linear": {"flags": [*RELATIVE, "--smart-steps", "2", "--smart-linear-search"]},
    "l2, token, two steps": {
        "flags": [*RELATIVE, "--smart-norm", "l2", "--smart-norm-scope", "token", "--smart-steps", "2"]
    },
    "own pass": {"flags": TWO_FORWARDS, "num_classes": 5},
    "recompute": {"flags": [*RELATIVE, "--smart-recompute"]},
    "recompute, 4 classes": {"flags": [*RELATIVE, "--smart-recompute"], "num_classes": 4},
    "dropout off": {"flags": [*RELATIVE, "--smart-dropout", "off"]},
    "dropout independent": {"flags": [*RELATIVE, "--smart-dropout", "independent"]},
    "input": {"flags": [*RELATIVE, "--smart-embedding", "input"]},
    "kl": {"flags": [*RELATIVE, "--smart-divergence", "kl"]},
    "js": {"flags": [*RELATIVE, "--smart-divergence", "js"]},
    "squared": {"flags": [*RELATIVE, "--smart-divergence", "squared"]},
    "regression": {"flags": [*RELATIVE, "--regression-target"], "num_classes": 1},
    "tangent": {"flags": TANGENT},
    "tangent, 4 classes": {"flags": TANGENT, "num_classes": 4},
    "radam": {"flags": [*RELATIVE, "--mbpp-base", "radam"]},
    **{
        name: {"flags": CRITERIA[name].flags, "criterion": CRITERIA[name].criterion}
        for name in ("r3f", "rdrop", "pgd", "freelb", "freeat")
    },
}
# launches of forward, backward and step: the default recipe as the README's command has it, by layers
OF_LARGE = {6: (705, 625, 35), 24: (1950, 2180, 110)}
PRECISIONS = ["fp32", "bf16", "fp16", "fp16 flat", "amp"]
MAIN = [
    "plain, bf16",
    "default, bf16",
    "default, amp",
    "tangent, fp16 flat",
    "tangent, 4 classes, amp",
]
# at most so many launches, of forward and backward in bfloat16 and under --amp, two layers
LAUNCHES = {
    "plain": (85, 110, 120, 150),
    "MBPP alone": (145, 120, 190, 160),
    "SMART alone": (360, 260, 410, 315),
    "default": (430, 280, 490, 335),
    "release": (465, 280, 520, 335),
    "two steps": (595, 280, 665, 335),
    "two steps, linear": (485, 280, 550, 335),
    "l2, token, two steps": (640, 280, 715, 335),
    "own pass": (715, 300, 780, 360),
    "recompute": (480, 320, 545, 405),
    "recompute, 4 classes": (725, 345, 785, 435),
    "dropout off": (470, 400, 540, 465),
    "dropout independent": (470, 280, 525, 335),
    "input": (435, 280, 495, 335),
    "kl": (400, 250, 455, 300),
    "js": (430, 275, 490, 330),
    "squared": (400, 250, 460, 300),
    "regression": (375, 240, 435, 295),
    "tangent": (660, 760, 725, 765),
    "tangent, 4 classes": (870, 760, 920, 765),
    "radam": (430, 280, 490, 335),
    "r3f": (295, 280, 340, 330),
    "rdrop": (245, 290, 285, 340),
    "pgd": (550, 120, 600, 160),
    "freelb": (640, 440, 720, 560),
    "freeat": (205, 120, 230, 165),
}
# and of the step with fairseq's adam
OF_A_STEP = {"fp32": 370, "bf16": 500, "fp16": 500, "fp16 flat": 110, "amp": 460}
# backward passes over a batch
PASSES = {"freelb": 3}
# known waits, and how many of each in a pass: the check of the terms' values; in plain training the layers ask
# whether there is padding
WAITS = {
    "forward, read: smart_fairseq/training/criterion.py _add": 1,
    "forward, read: fairseq/models/transformer/transformer_encoder.py forward_scriptable": 2,
    # by the examples of a batch FreeAT knows it again
    "forward, read: smart_fairseq/criterions/freeat_sentence_prediction.py perturbation": 1,
    # what --fp16 and --amp ask of the gradients
    "step, read: fairseq/optim/fp16_optimizer.py clip_grad_norm": 1,
    "step, read: fairseq/optim/dynamic_loss_scaler.py check_overflow": 2,
    "step, read: fairseq/optim/amp_optimizer.py clip_grad_norm": 1,
    "step, read: fairseq/optim/amp_optimizer.py step": 1,
    # each tensor's norm goes to the CPU where torch was built without CUDA, and only there
    "step, copy: fairseq/utils.py <listcomp>": 45,
}


def large(layers: int) -> Form:
    """RoBERTa-large, or so many layers of it."""
    shape = ["--encoder-embed-dim", "1024", "--encoder-ffn-embed-dim", "4096", "--encoder-attention-heads", "16"]
    flags = [*RELATIVE, "--mbpp-base", "adamw_fused", "--encoder-layers", str(layers), *shape]
    return {"flags": flags, "precision": "bf16"}


@functools.cache
def guard_folder() -> str:
    """Where the tests' programs compile the device guard, once."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def run(folder: Path, data: Path, forms: dict[str, Form]) -> dict[str, Any]:
    """What `pretended_updates.py` counts for each of the forms."""
    shutil.copytree(data, folder / "data")
    program = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "pretended_updates.py"), str(folder / "data")],
        input=json.dumps(forms),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PRETENDED_CUDA_FOLDER": guard_folder()},
    )
    assert program.returncode == 0, program.stderr[-3000:]
    found: dict[str, Any] = json.loads(program.stdout)
    return found


def faults(form: str, precision: str, counts: dict[str, Any]) -> list[str]:
    """What is wrong with the counts of a form; nothing where all is right."""
    if "error" in counts:
        return [counts["error"]]
    allowed = {where: number * PASSES.get(form, 1) for where, number in WAITS.items()}
    waits = counts["waits"].items()
    found = [f"{number} waits at {where}" for where, number in waits if number > allowed.get(where, 0)]
    bounds = LAUNCHES[form][2:] if precision == "amp" else LAUNCHES[form][:2]
    for phase, bound in zip(("forward", "backward", "step"), (*bounds, OF_A_STEP[precision])):
        number = counts["launches"][phase]
        if number > bound:
            found.append(f"{phase} launches {number} kernels, at most {bound} are expected")
    if len({tuple(draws) for draws in counts["draws"]}) > 1:
        found.append("passes draw different masks")
    return found


def in_precision(name: str) -> tuple[str, str]:
    """ "tangent, 4 classes, amp" -> ("tangent, 4 classes", "amp")"""
    form, precision = name.rsplit(", ", 1)
    return form, precision


# what is done to a form's smoothness term, and what must be seen of it
CHANGES = {
    "float()": "1 waits at forward, read: tests/",
    "CPU tensor": "Expected all tensors to be on the same device",
    "copied CPU tensor": "1 waits at forward, copy: tests/",
    "ten launches": "forward launches",
}


@pytest.fixture(scope="module")
def main_forms(class_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    forms = {name: {**FORMS[form], "precision": precision} for name in MAIN for form, precision in [in_precision(name)]}
    forms["RoBERTa-large"] = large(6)
    forms |= {change: {**FORMS["SMART alone"], "precision": "bf16", "change": change} for change in CHANGES}
    return run(tmp_path_factory.mktemp("main"), class_data, forms)


@pytest.mark.parametrize("name", MAIN)
def test_main_forms(name: str, main_forms: dict[str, Any]) -> None:
    assert not faults(*in_precision(name), main_forms[name])


@pytest.mark.parametrize("layers", [6, pytest.param(24, marks=pytest.mark.slow)])
def test_roberta_large(layers: int, main_forms: dict[str, Any], class_data: Path, tmp_path: Path) -> None:
    counts = main_forms["RoBERTa-large"] if layers == 6 else run(tmp_path, class_data, {"all": large(24)})["all"]
    assert counts["form"].startswith("by two forwards, its first ascent step from the clean pass")
    launches = [counts["launches"][phase] for phase in ("forward", "backward", "step")]
    assert all(0.9 * bound < number <= bound for number, bound in zip(launches, OF_LARGE[layers])), launches
    assert sum(counts["waits"].values()) == 1


@pytest.mark.parametrize(("change", "seen"), CHANGES.items())
def test_a_fault_is_seen(change: str, seen: str, main_forms: dict[str, Any]) -> None:
    assert any(seen in fault for fault in faults("SMART alone", "bf16", main_forms[change]))


@pytest.mark.slow
def test_every_form_in_every_precision(class_data: Path, tmp_path: Path) -> None:
    names = [f"{form}, {precision}" for form in FORMS for precision in PRECISIONS]
    forms = {name: {**FORMS[in_precision(name)[0]], "precision": in_precision(name)[1]} for name in names}
    found = {name: faults(*in_precision(name), counts) for name, counts in run(tmp_path, class_data, forms).items()}
    assert not {name: wrong for name, wrong in found.items() if wrong}
    assert len(found) == len(FORMS) * len(PRECISIONS)


@pytest.mark.slow
def test_the_table_of_launches_and_memory(tmp_path: Path) -> None:
    """By hand, of P weights: bf16 weights and gradients, float32 copies, their gradients and two moments: 20 P bytes.

    A teacher in float32 and its copy in bf16 are 6 P more.
    """
    out = tmp_path / "counts.json"
    command = ["--model", "tiny", "--batch", "2", "--lengths", "8", "256", "--out", str(out), "--forms"]
    program = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "count_updates.py"), *command, "plain", "MBPP alone"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PRETENDED_CUDA_FOLDER": guard_folder()},
    )
    assert program.returncode == 0, program.stderr[-3000:]
    rows = json.loads(out.read_text())["rows"]
    plain, mbpp = rows["plain"], rows["MBPP alone"]
    # tables of words and positions, two layers, two heads, the language model's
    layer = 4 * (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32) + 2 * 64
    weights = (64 + 514 + 2) * 32 + 64 + 2 * layer + (32 * 32 + 32) + (2 * 32 + 2) + (32 * 32 + 32) + 64 + 64
    sizes = {label: {length: row[f"GiB at 2 x {length}"] * 2**30 for length in (8, 256)} for label, row in rows.items()}
    assert 20 * weights < sizes["plain"][8] < 24 * weights
    # at least what each layer keeps of its inputs
    assert sizes["plain"][256] > sizes["plain"][8] + 2 * 2 * 256 * (4 * 32 + 64)
    assert sizes["MBPP alone"][8] - sizes["plain"][8] == pytest.approx(6 * weights, rel=0.02)
    assert 79 == plain["launches"][0] < mbpp["launches"][0] < 150 and [plain["of ours"], mbpp["of ours"]] == [0, 1]
    # a line of the table
    assert f"| plain | 79 + {plain['launches'][1]} + {plain['launches'][2]} | 2 | 0 | 0.0 | 0.0 |" in program.stdout
