"""Fixtures; what tests import stands in toolkit.py."""

import os
import sys
from pathlib import Path

# tiny tensors: a second thread costs more than it saves, and many times as much on a busy machine
os.environ["OMP_NUM_THREADS"] = "1"

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
