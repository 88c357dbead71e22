"""The examples in the docstrings of method/: they hold, and each public function has one."""

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import smart_fairseq.method

MODULES = [
    importlib.import_module(f"smart_fairseq.method.{module.name}")
    for module in pkgutil.iter_modules(smart_fairseq.method.__path__)
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_examples(module: ModuleType) -> None:
    public = [(name, getattr(module, name)) for name in module.__all__]
    documented = [(name, value) for name, value in public if inspect.isfunction(value) or inspect.isclass(value)]
    assert documented and not [name for name, value in documented if ">>>" not in (value.__doc__ or "")]
    assert doctest.testmod(module).failed == 0
