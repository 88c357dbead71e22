"""A plan's YAML and its values, each checked: errors name the file, the key, the value and what is allowed."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..data.lines import located, shown
from ..errors import UsageError


class Wrong(UsageError):
    """A value that is not allowed; `plan.read_plan` puts the file's name in front."""


def load(path: Path) -> Any:
    """A file of YAML."""
    try:
        # this loader refuses a key that stands twice, and reads 1e-4 as a number
        return OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except OSError as error:
        raise located(path, f"cannot be read ({error.strerror}); name a study's plan") from None
    except Exception as error:  # the YAML loader's own, which say where, and omegaconf's
        mark = getattr(error, "problem_mark", None)
        said = str(getattr(error, "problem", None) or str(error).splitlines()[0])
        raise located(path, f"is not a plan in YAML: {said}", mark.line + 1 if mark else 0) from None


def must_be(condition: Any, key: str, value: Any, allowed: str) -> None:
    """Raise `Wrong` with the key, its value and what is allowed where the condition does not hold."""
    if not condition:
        raise Wrong(f"{key} is {shown(str(value))}; it must be {allowed}")


def mapping(where: str, value: Any, allowed: Sequence[str] = ()) -> dict[str, Any]:
    """A mapping with words for keys, of the ``allowed`` ones where these are named."""
    must_be(isinstance(value, dict), where, value, "a mapping, key: value")
    for key in value:
        must_be(isinstance(key, str), f"{where}: key", key, "a word")
        if allowed and key not in allowed:
            raise Wrong(f"{where}: unknown key {shown(key)}; known are {', '.join(allowed)}")
    return dict(value)


def named(given: Mapping[str, Any], key: str, where: str = "") -> dict[str, Any]:
    """What stands under a key: a mapping from names; empty without the key."""
    place = f"{where}: {key}" if where else key
    found = mapping(place, given.get(key, {}))
    for name in found:
        right = name.replace("-", "").replace("_", "").isalnum()
        must_be(right, f"{place}: name", name, "of letters, digits, - and _")
    return found


def some_of(key: str, value: Any, allowed: Sequence[Any]) -> list[Any]:
    """A list of one or more of the ``allowed``."""
    right = isinstance(value, list) and value and all(item in allowed for item in value)
    must_be(right, key, value, f"a list of {', '.join(map(str, allowed))}")
    return list(value)


def number(key: str, value: Any, least: float) -> float:
    """A finite number from ``least`` on."""
    right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= least
    must_be(right, key, value, f"a number from {least:g}")
    return float(value)


def whole(key: str, value: Any, least: int = 1) -> int | None:
    """A whole number from ``least`` on, or None."""
    if value is None:
        return None
    must_be(type(value) is int and value >= least, key, value, f"a whole number from {least}")
    return int(value)


def boolean(key: str, value: Any) -> bool:
    """True or false."""
    must_be(isinstance(value, bool), key, value, "true or false")
    return bool(value)
