"""download.py against a server on this machine: whole, resumed, broken, forged and offline."""

import hashlib
import http.server
import io
import socket
import threading
import zipfile
from pathlib import Path

import pytest
from data_samples import write
from toolkit import error_line

from smart_fairseq.commands import download
from smart_fairseq.commands.download import RESOURCES, Resource, glue_main
from smart_fairseq.data.readers import read_task
from smart_fairseq.data.tasks import TASKS

RTE = b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n"


def make_zip(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the server's ``files``, with ranges; ``break_after`` cuts connections after so many bytes."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Range")))
        content = self.server.files.get(self.path.partition("?")[0])
        if content is None:
            self.send_error(self.server.missing)
            return
        start, status = 0, 200
        if self.headers.get("Range") and self.server.ranges:
            start, status = int(self.headers["Range"][6:].rstrip("-")), 206
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        stop = len(content)
        if self.server.breaks:
            self.server.breaks -= 1
            stop = start + self.server.break_after
        self.wfile.write(content[start:stop])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked, server.breaks, server.break_after = {}, [], 0, 1000
    server.missing, server.ranges = 404, True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(download, "WAIT", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server.address = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def offer(server, monkeypatch):
    """Put a file on the server as a data set's only resource, with its checksum."""

    def offer(name, content, target="", sha256=""):
        url = f"https://official.example/data/{name}.zip?dl=1"
        server.files[f"/data/{name}.zip"] = content
        sha256 = sha256 if sha256 is None else sha256 or hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(RESOURCES, name, (Resource(url, sha256, target),))

    return offer


def run(server, folder, *flags):
    return glue_main([str(folder), "--tasks", "RTE", "--mirror", server.address, *flags])


def refused(capsys, server, folder, *flags):
    return error_line("download", lambda given: run(server, folder, *given), flags, capsys)


def whole_rte(rows=1):
    data = RTE + b"".join(b"%d\tone\ttwo\tentailment\n" % (number * 7919) for number in range(1, rows))
    return make_zip(**{"RTE/train.tsv": data, "RTE/dev.tsv": RTE, "RTE/test.tsv": RTE, "__MACOSX/RTE/._x": b"x"})


def test_fetch_verify_unpack_and_skip(server, offer, tmp_path, capsys):
    offer("RTE", whole_rte())
    folder = tmp_path / "new" / "glue"
    assert run(server, folder) == 0
    assert "RTE: unpacked RTE in" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["RTE"]
    assert len(read_task(TASKS["RTE"], folder)[0]["train"]) == 1
    assert run(server, folder) == 0
    assert "RTE: already there" in capsys.readouterr().out
    assert server.asked == [("/data/RTE.zip?dl=1", None)]


def test_a_single_file_goes_to_its_place(server, offer, tmp_path):
    offer("RTE", RTE, target="RTE/train.tsv")
    assert run(server, tmp_path) == 0
    assert (tmp_path / "RTE" / "train.tsv").read_bytes() == RTE


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_connections_are_resumed(server, offer, tmp_path, capsys, ranges):
    content = whole_rte(rows=3000)
    offer("RTE", content)
    server.breaks, server.break_after, server.ranges = 2, len(content) // 3, ranges
    assert run(server, tmp_path) == 0
    resumed = [int(asked[6:-1]) for _, asked in server.asked if asked]
    third = len(content) // 3
    assert resumed == [third, 2 * third if ranges else third]
    assert ("resumed at" in capsys.readouterr().out) == ranges


def test_a_later_run_goes_on_from_what_was_kept(server, offer, tmp_path, capsys):
    content = whole_rte(rows=3000)
    offer("RTE", content)
    server.breaks, server.break_after = 99, 100
    line = refused(capsys, server, tmp_path)
    assert "the connection ended at byte" in line and "400 bytes are kept" in line
    server.breaks = 0
    assert run(server, tmp_path) == 0
    assert server.asked[-1][1] == "bytes=400-"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["RTE"]


def test_all_was_there_but_unverified(server, offer, tmp_path):
    content = whole_rte()
    offer("RTE", content)
    (tmp_path / ".RTE.zip.part").write_bytes(content)
    assert run(server, tmp_path) == 0


def test_wrong_checksum(server, offer, tmp_path, capsys):
    offer("RTE", whole_rte(), sha256="0" * 64)
    assert "and 0000" in refused(capsys, server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_an_official_checksum_it_is_shown(server, offer, tmp_path, capsys):
    offer("RTE", whole_rte(), sha256=None)
    assert run(server, tmp_path) == 0
    assert "RTE.zip: no official checksum to compare with; SHA-256" in capsys.readouterr().out


def test_missing_on_the_server(server, tmp_path, capsys):
    assert "/glue/data/RTE.zip: the server answered 404" in refused(capsys, server, tmp_path)
    assert len(server.asked) == 1


def test_server_in_trouble_is_asked_again(server, tmp_path, capsys):
    server.missing = 503
    assert "cannot be downloaded: the server answered 503" in refused(capsys, server, tmp_path)
    assert len(server.asked) == download.TRIES


def test_offline(server, tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    line = refused(capsys, server, tmp_path, "--mirror", address)
    assert "cannot be downloaded: [Errno" in line and "check the network and the https_proxy variable" in line
    assert list(tmp_path.iterdir()) == []


ARCHIVES = {
    "a path that escapes": ({"../RTE/train.tsv": b"x"}, r"member '../RTE/train.tsv' leads out of the folder"),
    "an absolute path": ({"/etc/train.tsv": b"x"}, "leads out of the folder"),
    "a path of another system": ({"RTE\\..\\..\\x": b"x"}, "leads out of the folder"),
    "a drive": ({"C:/x": b"x"}, "leads out of the folder"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives_that_lead_out_of_the_folder(server, offer, tmp_path, capsys, kind):
    files, message = ARCHIVES[kind]
    offer("RTE", make_zip(**{"RTE/dev.tsv": RTE, **files}))
    folder = tmp_path / "glue"
    assert message in refused(capsys, server, folder)
    assert list(folder.iterdir()) == [] and [path.name for path in tmp_path.iterdir()] == ["glue"]


def test_archive_with_a_link(server, offer, tmp_path, capsys):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        link = zipfile.ZipInfo("RTE/train.tsv")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    offer("RTE", buffer.getvalue())
    assert "is a link; not unpacked" in refused(capsys, server, tmp_path)


@pytest.mark.parametrize("content", [b"no zip at all", whole_rte(rows=500)[:-40], b""])
def test_archives_that_are_not_whole(server, offer, tmp_path, capsys, content):
    offer("RTE", content)
    assert "is not a complete zip file" in refused(capsys, server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damage_inside_an_archive(server, offer, tmp_path, capsys):
    content = bytearray(whole_rte(rows=500))
    content[80] ^= 0xFF
    offer("RTE", bytes(content))
    assert "is not a complete zip file" in refused(capsys, server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_flags(server, tmp_path, capsys):
    assert "--tasks is 'RTF'; it must be a list, each once, of" in refused(capsys, server, tmp_path, "--tasks", "RTF")
    assert "--mirror is 'ftp://x'" in refused(capsys, server, tmp_path, "--mirror", "ftp://x")
    taken = write(tmp_path / "taken", "x")
    assert "taken: is a file, and a folder is needed" in refused(capsys, server, taken)


def test_table_of_addresses():
    for resources in RESOURCES.values():
        for resource in resources:
            assert resource.url.startswith(("https://", "http://data.allenai.org"))
            assert resource.sha256 is None or len(bytes.fromhex(resource.sha256)) == 32
            assert resource.target or resource.name.endswith(".zip")
    assert {*download.GLUE_DEFAULT, *download.ANLI_DEFAULT} <= set(RESOURCES)
    assert Path(RESOURCES["MRPC"][0].target).name == "dev_ids.tsv"
