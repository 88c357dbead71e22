"""The small files of a Hugging Face folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from smart_fairseq.convert.command import refuse

MODEL_DIR_HOLDS = "MODEL_DIR must hold config.json, model.safetensors and the vocabulary"
Content = TypeVar("Content")


def _read(path: Path, kind: str, parse: Callable[[str], Content]) -> Content:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        refuse(path, "no such file", MODEL_DIR_HOLDS)
    except (OSError, ValueError) as error:
        refuse(path, f"cannot be read as {kind} ({error})", "copy or download it again")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; `UsageError` if the file is missing, broken, or holds something else."""
    content = _read(path, "JSON", json.loads)
    if not isinstance(content, dict):
        refuse(path, f"holds a {type(content).__name__}", "a JSON object is needed")
    return content


def read_lines(path: Path) -> list[str]:
    """The file's lines without line ends; `UsageError` if it is missing or not UTF-8."""
    return _read(path, "UTF-8 text", lambda text: text.removesuffix("\n").split("\n") if text else [])
