"""Files that are no checkpoint of fairseq, or a hostile one, and what must be said of each."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Foreign:
    """Something that the safe loader does not know."""


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def _with(value: Any) -> Callable[[Path, Path], None]:
    """A whole checkpoint with one more object in it."""

    def write(source: Path, target: Path) -> None:
        state = torch.load(source)
        state["extra_state"] = {**(state.get("extra_state") or {}), "more": value}
        torch.save(state, target)

    return write


def _saved(value: Any) -> Callable[[Path, Path], None]:
    return lambda source, target: torch.save(value, target)


def _cut(share: float) -> Callable[[Path, Path], None]:
    def write(source: Path, target: Path) -> None:
        content = source.read_bytes()
        target.write_bytes(content[: int(share * len(content))])

    return write


def _bytes(content: bytes) -> Callable[[Path, Path], None]:
    return lambda source, target: target.write_bytes(content)


def _damaged(source: Path, target: Path) -> None:
    content = bytearray(source.read_bytes())
    content[200:400] = bytes(200)
    target.write_bytes(content)


CUT_SHORT = r"not a readable checkpoint of fairseq \("
ANOTHER = f"({CUT_SHORT}|holds no model or no configuration)"
REFUSED = "which torch's safe loader refuses"
# how it is made of a good checkpoint, and the pattern of what must be said of it
CHECKPOINTS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "nothing": (_bytes(b""), CUT_SHORT),
    "text": (_bytes(b"no checkpoint\n"), CUT_SHORT),
    "a web page": (_bytes(b"<!DOCTYPE html><html>404</html>"), CUT_SHORT),
    "a pointer of Git LFS": (_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), CUT_SHORT),
    "the first 10 bytes": (_cut(1e-4), CUT_SHORT),
    "half": (_cut(0.5), CUT_SHORT),
    "99 %": (_cut(0.99), CUT_SHORT),
    "bytes overwritten": (_damaged, CUT_SHORT),
    "a pickle of protocol 4": (_bytes(pickle.dumps({"model": {}}, protocol=4)), CUT_SHORT),
    "a list": (_saved([1, 2]), ANOTHER),
    "a state without a configuration": (_saved({"model": {}}), ANOTHER),
    "a bare state_dict": (_saved({"encoder.weight": torch.zeros(2)}), ANOTHER),
    "a foreign object": (_with(Foreign()), f"Foreign, {REFUSED}"),
    "a call of the shell": (_with(Calls(os.system, "touch hostile")), f"system, {REFUSED}"),
    "a call of eval": (_with(Calls(eval, "open('hostile', 'w')")), f"eval, {REFUSED}"),
    "a name with terminal codes": (
        _bytes(pickle.dumps(Foreign(), protocol=2).replace(b"Foreign\n", b"\x1b[31mred\x1b[0m\n")),
        REFUSED,
    ),
}
