"""Flags that runs of `--task smart_multitask` share, and runs that are refused."""

from collections.abc import Sequence

import pytest
from toolkit import TINY_MODEL, capture_log, train

from smart_fairseq.errors import UsageError

WHOLE = ["--required-batch-size-multiple", "1"]


def around(criterion: str, max_update: int) -> list[str]:
    """What a run on one task and one on several have in common."""
    return [
        *("--init-token", "0", "--separator-token", "2", *TINY_MODEL, "--max-positions", "256"),
        *("--criterion", criterion, "--optimizer", "mbpp", "--lr", "1e-3", "--lr-scheduler", "fixed"),
        *("--batch-size", "4", "--seed", "7", "--cpu", "--max-update", str(max_update), "--num-workers", "0"),
        *("--log-format", "json", "--log-interval", "1", "--disable-validation", *WHOLE),
    ]


def refused(arguments: Sequence[str]) -> str:
    """The message with which a run is refused, before its first update."""
    with capture_log() as log, pytest.raises(UsageError) as caught:
        train(arguments)
    assert not log["train_inner"]
    return str(caught.value)
