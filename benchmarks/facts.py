"""What a measurement was made with: hardware, versions, commit, date."""

import datetime
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import smart_fairseq

ROOT = Path(__file__).resolve().parents[1]


def _git(*command: str) -> str:
    return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def facts(script: str, device: str = "cpu") -> dict[str, Any]:
    """For the head of a report; ``script`` is the benchmark's file."""
    return {
        # without this machine's folders
        "command": " ".join(["python", f"benchmarks/{Path(script).name}", *(Path(a).name for a in sys.argv[1:])]),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {_processor()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "smart_fairseq": smart_fairseq.__version__,
        "commit": _git("rev-parse", "--short", "HEAD") + (" and changes" if _git("status", "--porcelain") else ""),
        "date": datetime.date.today().isoformat(),
    }
