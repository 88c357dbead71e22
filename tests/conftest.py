"""Fixtures; what tests import stands in toolkit.py."""

import gc
import logging
import os
import random
import sys
from pathlib import Path

# tiny tensors: a second thread costs more than it saves, and many times as much on a busy machine
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

# a remark on tensorboardX, which nothing here uses; pytest's own process, which loads this file too, would end with it
logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)

import toolkit  # noqa: E402

SEED = int(os.environ.get("SMART_TEST_SEED", "1"))


def seed_everything() -> None:
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before the fixtures of any scope ..."""
    seed_everything()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """... and before the test, which then draws the same numbers whichever tests ran before it."""
    seed_everything()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if toolkit.DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.exit("SMART_TEST_DEVICE is cuda (make test-gpu), and torch finds no CUDA device", returncode=2)
    for item in items:
        if item.get_closest_marker("gpu") and toolkit.DEVICE != "cuda":
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: make test-gpu"))


def pytest_collection_finish() -> None:
    """What the libraries have made by now stays: the collector, which tests set off, need not look through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def class_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny two-class data folder."""
    return toolkit.write_data(tmp_path_factory.mktemp("classes") / "data")


@pytest.fixture(scope="session")
def study_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a study takes it."""
    from study_samples import write_data

    return write_data(tmp_path_factory.mktemp("study") / "data")


@pytest.fixture(scope="session")
def pair_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for pairs of texts, with which `toolkit.command` trains BERT."""
    return toolkit.write_data(tmp_path_factory.mktemp("pairs") / "data", kind="pairs")


@pytest.fixture(scope="session")
def regression_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny regression data folder."""
    return toolkit.write_data(tmp_path_factory.mktemp("regression") / "data", kind="regression")
