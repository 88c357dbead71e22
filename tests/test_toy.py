"""examples/toy: the notebook's cells run, and on two moons the terms do what they are for."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from toolkit import ROOT

sys.path.insert(0, str(ROOT / "examples" / "toy"))
import toy


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Sequential]:
    return {name: toy.train(name, *toy.two_moons(40, seed=2), updates=200, seed=2) for name in toy.METHODS}


def test_regularised_boundaries_hold_where_plain_ones_do_not(models: dict[str, torch.nn.Sequential]) -> None:
    held_out = toy.two_moons(1000, seed=0)
    moved = {name: toy.accuracy(model, *held_out, toy.RADIUS) for name, model in models.items()}
    assert all(moved[name] > moved["plain"] + 3 for name in ("PGD", "R3F", "SMART")), moved
    assert toy.accuracy(models["plain"], *toy.two_moons(40, seed=2)) > 95


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "UPDATES", 3)
    monkeypatch.setattr(toy.train, "__defaults__", (3, 1))
    notebook = json.loads((ROOT / "examples" / "toy" / "toy.ipynb").read_text("utf-8"))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert os.path.getsize("toy.png") > 10_000
