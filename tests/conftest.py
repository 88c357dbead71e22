"""Fixtures; what tests import stands in toolkit.py."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import toolkit


@pytest.fixture(scope="session")
def class_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny two-class data folder."""
    return toolkit.write_data(tmp_path_factory.mktemp("classes") / "data")


@pytest.fixture(scope="session")
def regression_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny regression data folder."""
    return toolkit.write_data(tmp_path_factory.mktemp("regression") / "data", kind="regression")
