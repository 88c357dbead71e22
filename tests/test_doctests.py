"""The examples in the docstrings of method/: they hold, and each public function has one."""

import doctest
import importlib
import pkgutil
from types import FunctionType, ModuleType

import pytest

import smart_fairseq.method

MODULES = [
    importlib.import_module(f"smart_fairseq.method.{module.name}")
    for module in pkgutil.iter_modules(smart_fairseq.method.__path__)
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_examples(module: ModuleType) -> None:
    own = [(name, value) for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    public = [(name, value) for name, value in own if name[0] != "_" and isinstance(value, type | FunctionType)]
    assert public and not [name for name, value in public if ">>>" not in (value.__doc__ or "")]
    assert doctest.testmod(module).failed == 0
