"""How far a long step has come."""

from tqdm import tqdm


class Progress:
    """A bar on a terminal, a plain line at the end of each step otherwise."""

    def __init__(self, total: int, what: str, unit: str = " rows") -> None:
        self._what, self._done, self._unit = what, 0, unit
        self._bar = tqdm(total=total, desc=what, unit=unit, leave=False, disable=None)  # on terminals alone

    def advance(self, count: int) -> None:
        """So much more is done."""
        self._done += count
        self._bar.update(count)

    def close(self, note: str = "") -> None:
        """All is done: the line that stays, with a note at its end."""
        self._bar.close()
        print(f"{self._what}: {self._done}{self._unit}{note}", flush=True)
