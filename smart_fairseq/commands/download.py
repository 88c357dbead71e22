"""The command download: the official files, resumed where a transfer broke off and checked by SHA-256.

Addresses: GLUE's download script and the data sets' own pages. Checksums: the lists of the public loaders
(huggingface/datasets, tensorflow/datasets), which name the same files; there is none for the FEVER pairs. The rated
sentences of movie, product, news and tweet come from the Python package index, all at once (ratings.py).
"""

import argparse
import http.client
import os
import shutil
import stat
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.lines import located, shown
from ..data.readers import find_sources
from ..data.tasks import GLUE, SENTIMENT, TASKS
from ..errors import UsageError
from ..files import hidden_folder, sha256
from ..progress import Progress
from . import ratings
from .options import chosen
from .run import run

TIMEOUT = 30.0  # seconds without a byte
TRIES = 4
BLOCK = 1 << 16


@dataclass(frozen=True)
class Resource:
    """One file to fetch: a zip to unpack in the data folder, or a file with its place there."""

    url: str
    sha256: str | None
    target: str = ""  # empty for a zip

    @property
    def name(self) -> str:
        """The file's own name, without folders."""
        return self.target.rpartition("/")[2] or urllib.parse.urlparse(self.url).path.rpartition("/")[2]


_HOSTS = {
    "facebook": "https://dl.fbaipublicfiles.com",
    "senteval": "https://dl.fbaipublicfiles.com/senteval/senteval_data",
    "stanford": "https://nlp.stanford.edu/projects",
    "allen": "http://data.allenai.org.s3.amazonaws.com/downloads",
    "dropbox": "https://www.dropbox.com/s",
}
# SHA-256 where it is known, data set, host, path there, and the name in the data set's folder where that is another
_FILES = """
f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff CoLA facebook glue/data/CoLA.zip
d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa SST-2 facebook glue/data/SST-2.zip
971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7 MRPC facebook glue/data/mrpc_dev_ids.tsv dev_ids.tsv
60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89 MRPC senteval msr_paraphrase_train.txt
a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784 MRPC senteval msr_paraphrase_test.txt
e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85 STS-B facebook glue/data/STS-B.zip
40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0 QQP facebook glue/data/QQP-clean.zip
e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633 MNLI facebook glue/data/MNLI.zip
e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5 QNLI facebook glue/data/QNLIv2.zip
6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee RTE facebook glue/data/RTE.zip
ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46 WNLI facebook glue/data/WNLI.zip
0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd AX facebook glue/data/AX.tsv
e5c058f2bb4e6190b0651badca2c590e45db95248f8b28cde674615ee40820bf ANLI facebook anli/anli_v1.0.zip
afb3d70a5af5d8de0d9d81e2637e0fb8c22d1235c2749d83125ca43dab0dbd3e SNLI stanford snli/snli_1.0.zip
3fccd37350a94ca280b75998568df85fc2fc62843a3198d644fcbf858e6943d5 SciTail allen SciTailV1.1.zip
-                                                                FEVER dropbox hylbuaovqwo2zav/nli_fever.zip?dl=1
196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783 gpt2_bpe facebook fairseq/gpt2_bpe/encoder.json
1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5 gpt2_bpe facebook fairseq/gpt2_bpe/vocab.bpe
2c31c5b236661067fe8626775eb995ef5fe808ac87d2ad4a6ddbef68550f5cc6 gpt2_bpe facebook fairseq/gpt2_bpe/dict.txt
"""


def _resources() -> dict[str, tuple[Resource, ...]]:
    found: dict[str, tuple[Resource, ...]] = {}
    for line in _FILES.strip().splitlines():
        digest, name, host, path, *own = line.split()
        place = "" if ".zip" in path else f"{name}/{own[0] if own else Path(path).name}"
        resource = Resource(f"{_HOSTS[host]}/{path}", None if digest == "-" else digest, place)
        found[name] = (*found.get(name, ()), resource)
    return found


RESOURCES = _resources()
GLUE_DEFAULT = (*GLUE, "gpt2_bpe")
ANLI_DEFAULT = ("ANLI", "gpt2_bpe")
NAMES = (*RESOURCES, *SENTIMENT)


def mirrored(url: str, mirror: str | None) -> str:
    """The address with scheme and host replaced by those of ``mirror``."""
    if not mirror:
        return url
    return mirror.rstrip("/") + urllib.parse.urlparse(url)._replace(scheme="", netloc="").geturl()


def fetch(url: str, part: Path, name: str) -> None:
    """Bring ``part`` up to the whole file, going on where it ends.

    Tries a few times, each time from where the last one broke off. Raises `UsageError` when the server cannot be
    reached or refuses; what has arrived is kept for the next run.
    """
    problem = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(min(2**attempt, 8) * WAIT)
        try:
            _fetch_once(url, part, name)
            return
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                message = f"{url}: the server answered {error.code} ({error.reason}); the file may have moved"
                raise UsageError(message) from None
            problem = f"the server answered {error.code}"
        except urllib.error.URLError as error:
            problem = str(error.reason)
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            problem = str(error) or type(error).__name__
    have = f" ({part.stat().st_size} bytes are kept, and the next run goes on from there)" if part.exists() else ""
    raise UsageError(
        f"{url}: cannot be downloaded: {problem}{have}; check the network and the https_proxy variable, "
        "give --mirror, or fetch the file elsewhere and unpack it in the data folder"
    )


WAIT = 1.0  # scales the pauses between tries


def _fetch_once(url: str, part: Path, name: str) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "smart_fairseq"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:
            return  # nothing is left to send; the checksum says whether it is right
        raise
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if not resumed:
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else 0
        progress = Progress(total, name, "B")
        progress.advance(have)
        with open(part, "ab" if resumed else "wb") as file:
            for block in iter(lambda: response.read(BLOCK), b""):
                file.write(block)
                progress.advance(len(block))
        progress.close("" if not resumed else f", resumed at {have}")
        if total and part.stat().st_size < total:
            raise ConnectionError(f"the connection ended at byte {part.stat().st_size} of {total}")


def verify(resource: Resource, path: Path) -> None:
    """Raise `UsageError`, and remove the file, unless it has the official checksum."""
    found = sha256(path)
    if resource.sha256 is None:
        print(f"{resource.name}: no official checksum to compare with; SHA-256 {found}")
    elif found != resource.sha256:
        path.unlink()
        raise UsageError(
            f"{resource.url}: SHA-256 is {found}, and {resource.sha256} is expected; the file was removed: "
            "run again, and if it happens again the file at that address has changed"
        )


def members(archive: zipfile.ZipFile, path: Path) -> list[zipfile.ZipInfo]:
    """The files of an archive that belong in the data folder. Raises `UsageError` if a path leads out of it."""
    wanted = []
    for member in archive.infolist():
        parts = member.filename.replace("\\", "/").split("/")
        if member.is_dir() or parts[0] == "__MACOSX" or parts[-1] in (".DS_Store", ""):
            continue
        if ".." in parts or member.filename.startswith(("/", "\\")) or ":" in parts[0]:
            raise located(path, f"member {shown(member.filename)} leads out of the folder; not unpacked")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise located(path, f"member {shown(member.filename)} is a link; not unpacked")
        if member.flag_bits & 1:
            raise located(path, f"member {shown(member.filename)} is encrypted; not unpacked")
        wanted.append(member)
    return wanted


def unpack(path: Path, folder: Path) -> list[str]:
    """Unpack a zip into ``folder``, all of it or nothing; the names of its top folders."""
    try:
        with hidden_folder(folder / "unpack") as partial, zipfile.ZipFile(path) as archive:
            wanted = members(archive, path)
            size, free = sum(member.file_size for member in wanted), shutil.disk_usage(folder).free
            if size > free:
                raise located(folder, f"{path.name} needs {size} bytes, and {free} are free; make room")
            archive.extractall(partial, wanted)
            for member in wanted:
                target = folder / member.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial / member.filename, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise located(path, f"is not a complete zip file ({error}); remove it and download it again") from None
    except OSError as error:
        raise located(folder, f"cannot be written ({error.strerror or error}); nothing was unpacked") from None
    return sorted({member.filename.split("/")[0] for member in wanted})


def complete(name: str, folder: Path) -> bool:
    """Is everything of a data set there already?"""
    if name == "ANLI":
        return all(complete(f"ANLI-{part}", folder) for part in ("R1", "R2", "R3"))
    if name in TASKS:
        return set(find_sources(TASKS[name], folder)) == set(TASKS[name].splits)
    return all((folder / resource.target).is_file() for resource in RESOURCES[name])


def download(name: str, folder: Path, mirror: str | None = None) -> None:
    """Fetch one data set into ``folder``, unless it is there."""
    if complete(name, folder):
        print(f"{name}: already there")
        return
    if name in SENTIMENT:
        print(f"{name}: fetching {ratings.WHAT} ...", flush=True)
        print(f"{name}: unpacked {', '.join(SENTIMENT)} in {ratings.fetch(folder)}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for resource in RESOURCES[name]:
        target = folder / resource.target if resource.target else None
        if target is not None and target.is_file():
            continue
        part = folder / f".{resource.name}.part"
        fetch(mirrored(resource.url, mirror), part, resource.name)
        verify(resource, part)
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(part, target)
            print(f"{name}: wrote {target}")
        else:
            archive = part.with_name(resource.name)
            os.replace(part, archive)
            try:
                print(f"{name}: unpacked {', '.join(unpack(archive, folder))} in {folder}")
            finally:
                archive.unlink()


def _run(argv: Sequence[str] | None, prog: str, default: Sequence[str], example: str) -> None:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=f"Fetch the official files, for example --tasks {example}; without: {', '.join(default)}.",
    )
    parser.add_argument("folder", metavar="DIR", help="the data folder, made where it does not exist")
    parser.add_argument("--tasks", default="all", help=f"a list of {', '.join(NAMES)} (%(default)s: see above)")
    parser.add_argument(
        "--mirror", help="address that stands for scheme and host of the official ones; pip has its own"
    )
    options = parser.parse_args(argv)
    if options.mirror and not options.mirror.startswith(("http://", "https://")):
        raise UsageError(f"--mirror is {shown(options.mirror)}; it must begin with http:// or https://")
    folder = Path(options.folder)
    if folder.exists() and not folder.is_dir():
        raise located(folder, "is a file, and a folder is needed")
    names = default if options.tasks == "all" else chosen("--tasks", options.tasks, NAMES, ", or all")
    for name in names:
        download(name, folder, options.mirror)


def glue_main(argv: Sequence[str] | None = None, prog: str = "download.py") -> int:
    """The command; without --tasks it fetches GLUE. Its exit status."""
    return run("download", _run, argv, prog, GLUE_DEFAULT, "RTE,MRPC,gpt2_bpe")


def anli_main(argv: Sequence[str] | None = None, prog: str = "download.py") -> int:
    """The command; without --tasks it fetches ANLI. Its exit status."""
    return run("download", _run, argv, prog, ANLI_DEFAULT, "ANLI,SNLI,MNLI,FEVER,gpt2_bpe")


main = glue_main
