"""A small plan of a study, on tiny models."""

from pathlib import Path

from toolkit import TINY_MODEL

__all__ = ["MODEL", "PLAN", "write_plan"]

PLAN = """
out: {folder}/out
work: {folder}/work
encoder:
  flags: {{{model}}}
train: {{batch-size: 4, lr: 1e-3, epochs: 2}}
tasks:
  letters: {{data: {data}, rows: 12}}
methods:
  plain: {{criterion: sentence_prediction, optimizer: adam}}
  smart: {{criterion: smart_sentence_prediction, optimizer: adam, smart-weight: 0}}
seeds: [1, 2]
"""
MODEL = ", ".join(f"{name.removeprefix('--')}: {value}" for name, value in zip(TINY_MODEL[::2], TINY_MODEL[1::2]))


def write_plan(folder: Path, data: Path, text: str = PLAN) -> Path:
    """plan.yaml in ``folder``, for the data folder ``data``."""
    path = folder / "plan.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text.format(folder=folder, data=data, model=MODEL))
    return path
