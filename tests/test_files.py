"""Whole or not at all: what is there stays until its successor is complete, and nothing else is left beside it."""

import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import FORKS, join

from smart_fairseq.errors import UsageError
from smart_fairseq.files import check_place, hidden_folder, sha256, whole_file, whole_files, whole_folder


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write_file(target: Path, text: str, fail: Callable[[], None] = lambda: None) -> None:
    with whole_file(target) as partial:
        partial.write_text(text)
        fail()


def write_folder(target: Path, text: str, fail: Callable[[], None] = lambda: None) -> None:
    with whole_folder(target) as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / text).write_text(text)
        fail()


def full_disk() -> None:
    raise OSError(28, "No space left on device")


def stopped() -> None:
    raise KeyboardInterrupt


WRITERS = [
    pytest.param(write_file, {"target": "old"}, {"target": "new"}, id="file"),
    pytest.param(write_folder, {"target/deep/old": "old"}, {"target/deep/new": "new"}, id="folder"),
]
Write = Callable[..., None]


@pytest.mark.parametrize("write, old, new", WRITERS)
def test_takes_the_place_of_what_was_there(tmp_path: Path, write: Write, old: dict, new: dict) -> None:
    write(tmp_path / "target", "old")
    assert content(tmp_path) == old
    write(tmp_path / "target", "new")
    assert content(tmp_path) == new and [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("fail", [full_disk, stopped])
@pytest.mark.parametrize("write, old, new", WRITERS)
def test_failure_leaves_the_old_one_whole(tmp_path: Path, write: Write, old: dict, new: dict, fail: Write) -> None:
    write(tmp_path / "target", "old")
    with pytest.raises((UsageError, KeyboardInterrupt)):
        write(tmp_path / "target", "new", fail)
    assert content(tmp_path) == old and [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_failure_leaves_nothing_where_nothing_was(tmp_path: Path, write: Write) -> None:
    with pytest.raises(UsageError, match=r"cannot be written \(No space left on device\)"):
        write(tmp_path / "target", "new", full_disk)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write, _, new", WRITERS)
def test_folders_above_come_and_go_with_it(tmp_path: Path, write: Write, _: dict, new: dict) -> None:
    with pytest.raises(UsageError, match=r"cannot be written \(No space left on device\)"):
        write(tmp_path / "a" / "b" / "target", "new", full_disk)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "a" / "b" / "target", "new")
    assert content(tmp_path) == {f"a/b/{name}": text for name, text in new.items()}


def test_hidden_folder_vanishes_unless_moved(tmp_path: Path) -> None:
    for name in ("left", "moved"):
        with hidden_folder(tmp_path / name) as partial:
            (partial / "file").write_text(name)
            if name == "moved":
                partial.rename(tmp_path / name)
    assert content(tmp_path) == {"moved/file": "moved"} and len(list(tmp_path.iterdir())) == 1


def test_behind_a_link_its_folder_is_replaced(tmp_path: Path) -> None:
    write_folder(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_folder(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "real") == {"deep/new": "new"}


def write_some(folder: Path, *names: str, fail: Callable[[], None] = lambda: None) -> None:
    with whole_files(folder, ("main", "a", "b")) as partial:
        for name in names:
            (partial / name).write_text("new")
        fail()


def test_some_files_of_a_folder(tmp_path: Path) -> None:
    """They come and go together; what else is in the folder stays."""
    folder = tmp_path / "folder"
    write_some(folder, "main", "a")
    assert content(folder) == {"main": "new", "a": "new"}
    for name in ("main", "a", "mine"):
        (folder / name).write_text("old")
    with pytest.raises(UsageError, match=r"cannot be written \(No space left on device\)"):
        write_some(folder, "main", "b", fail=full_disk)
    assert content(folder) == {"main": "old", "a": "old", "mine": "old"}
    write_some(folder, "main", "b")
    assert content(folder) == {"main": "new", "b": "new", "mine": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_files_that_belong_to_nothing_written_here_stay(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    write_some(tmp_path, "main", "b")
    assert content(tmp_path) == {"main": "new", "a": "mine", "b": "new"}


# Other processes


def other(write: Write, target: Path, pipe: Any) -> None:
    """Writes "other" to the target, says so, and completes it when it is told to."""

    def wait() -> None:
        pipe.send("written")
        pipe.recv()

    write(target, "other", wait)


def start_other(write: Write, target: Path) -> tuple[Any, Any]:
    """A process in the middle of its block, and the pipe to it."""
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=other, args=(write, target, theirs))
    process.start()
    assert ours.recv() == "written"
    return process, ours


KINDS = [pytest.param(write_file, id="file"), pytest.param(write_folder, id="folder")]


@pytest.mark.parametrize("write", KINDS)
def test_two_processes_at_once_do_not_meet(tmp_path: Path, write: Write) -> None:
    """Each completes its own; the later one stays."""
    process, pipe = start_other(write, tmp_path / "target")
    write(tmp_path / "target", "ours")
    visible = {name: text for name, text in content(tmp_path).items() if not name.startswith(".")}
    assert list(visible.values()) == ["ours"]
    pipe.send("go on")
    assert join([process]) == [0]
    assert list(content(tmp_path).values()) == ["other"] and [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("write", KINDS)
def test_sigterm_leaves_the_old_one_whole(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "target", "old")
    process, pipe = start_other(write, tmp_path / "target")
    process.terminate()
    assert join([process]) == [128 + signal.SIGTERM]
    assert list(content(tmp_path).values()) == ["old"] and [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("write", KINDS)
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "target.bin", "neighbour")
    process, pipe = start_other(write, tmp_path / "target")
    process.kill()
    process.join()
    assert len(list(tmp_path.iterdir())) == 2
    write(tmp_path / "target", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"target", "target.bin"}


def test_an_old_folder_that_a_killed_process_had_moved_aside_comes_back(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    write_folder(tmp_path / f".target.old-{gone.pid}", "old")
    with pytest.raises(UsageError, match=r"cannot be written \(No space left on device\)"):
        write_folder(tmp_path / "target", "new", full_disk)
    assert content(tmp_path) == {"target/deep/old": "old"}


def test_sigterm_keeps_the_answer_that_the_program_gives(tmp_path: Path) -> None:
    """Its own handler stays in the block, the default comes back after it, and other threads have no say in it."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        for handler, within in ((signal.SIG_IGN, signal.SIG_IGN), (signal.SIG_DFL, None)):
            signal.signal(signal.SIGTERM, handler)
            with whole_file(tmp_path / "target") as partial:
                partial.write_text("x")
                assert within is None or signal.getsignal(signal.SIGTERM) is within
            assert signal.getsignal(signal.SIGTERM) is handler
        thread = threading.Thread(target=write_file, args=(tmp_path / "thread", "from a thread"))
        thread.start()
        thread.join()
        assert (tmp_path / "thread").read_text() == "from a thread"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sha256(tmp_path: Path) -> None:
    data = bytes(range(256)) * 20_000
    (tmp_path / "data").write_bytes(data)
    assert sha256(tmp_path / "data") == hashlib.sha256(data).hexdigest()
    with pytest.raises(FileNotFoundError):
        sha256(tmp_path / "none")


def small_disk_saves(path: str) -> None:
    """torch.save with no room for it; the status is 3 for the one `UsageError`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        with whole_file(Path(path)) as partial, open(partial, "wb") as file:
            torch.save(torch.zeros(100_000), file)
    except UsageError as error:
        sys.exit(3 if f"{path}: cannot be written (File too large)" in str(error) else 4)


def test_torch_on_a_full_disk(tmp_path: Path) -> None:
    """What torch raises then is a RuntimeError on a position in the file."""
    process = FORKS.Process(target=small_disk_saves, args=(str(tmp_path / "target"),))
    process.start()
    assert join([process]) == [3] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["pipe", "pipe/below", "file/below"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path: Path, name: str) -> None:
    """And a device is not replaced by a file."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=f"{tmp_path / name}: cannot be written"):
        check_place(tmp_path / name)
    with pytest.raises(UsageError, match=f"{tmp_path / name}: cannot be written"):
        write_file(tmp_path / name, "new")
    assert not (tmp_path / "pipe").is_file() and len(list(tmp_path.iterdir())) == 2
    check_place(tmp_path / "new" / "file")
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(tmp_path: Path) -> None:
    """In a container every start may have the same number."""
    for kind in ("partial", "old"):
        write_folder(tmp_path / f".target.{kind}-{os.getpid()}", kind)
    write_folder(tmp_path / "target", "new")
    assert content(tmp_path) == {"target/deep/new": "new"}


def test_the_folder_of_work_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever works in it would be nowhere."""
    write_folder(tmp_path / "target", "old")
    monkeypatch.chdir(tmp_path / "target" / "deep")
    for place in (tmp_path / "target", Path(), Path("..")):
        with pytest.raises(UsageError, match=r"cannot be replaced \(the command is called in it\)"):
            write_folder(place, "new")
    assert content(tmp_path) == {"target/deep/old": "old"}
