"""The small files of a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

from smart_fairseq.convert.command import refuse

__all__ = ["read_json", "read_lines"]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; `UsageError` if the file is missing, broken, or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        refuse(path, "no such file", "MODEL_DIR must hold config.json, model.safetensors and the vocabulary")
    except (OSError, ValueError) as error:
        refuse(path, f"cannot be read as JSON ({error})", "copy or download it again")
    if not isinstance(content, dict):
        refuse(path, f"holds a {type(content).__name__}", "a JSON object is needed")
    return content


def read_lines(path: Path) -> list[str]:
    """The file's lines without line ends; `UsageError` if it is missing or not UTF-8."""
    try:
        with path.open(encoding="utf-8") as file:
            return [line.rstrip("\n") for line in file]
    except FileNotFoundError:
        refuse(path, "no such file", "MODEL_DIR must hold config.json, model.safetensors and the vocabulary")
    except (OSError, ValueError) as error:
        refuse(path, f"cannot be read as UTF-8 text ({error})", "copy or download it again")
