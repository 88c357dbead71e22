"""`--ddp-backend pytorch_ddp`, which the docs recommend on GPUs, by two workers over gloo on the CPU.

What is patched of fairseq is one argument: the GPU that it names to torch's wrapper (`processes.wrap_on_a_cpu`).
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from collectives import collectives, recorded
from processes import assert_same_run, finish, join, start, updates
from toolkit import CRITERIA, HEAD, STEADY, Regularised, command, set_up, slow_but, write_data
from torch import Tensor

from smart_fairseq.terms import TermValue
from smart_fairseq.training.criterion import RegularizedCriterion

WRAPPED = ["--ddp-backend", "pytorch_ddp", "--find-unused-parameters", "--bucket-cap-mb", "0"]
WAYS = {**CRITERIA, "smart, adam": CRITERIA["smart"]}
# update-freq -> size of the training set and of a batch: of each epoch's last update one worker has a dummy alone
SHAPES = {1: (20, 4), 2: (18, 2)}
TERMS = ("smart", "r3f", "rdrop", "bregman")
LM_HEAD = 5  # weights of it, which classification leaves alone
FREEAT = 3  # its updates on each batch
BROKEN = 5  # an example in whose batch no term is a number


def prepared(out: str) -> None:
    """Record what is sent; leave out the terms of one worker's batch."""
    recorded(out)
    original = RegularizedCriterion._term

    @contextmanager
    def broken(self: Any, name: str, forward: Any, sample: Any, at: Any) -> Iterator[Callable[[Tensor], TermValue]]:
        with original(self, name, forward, sample, at) as value:
            factor = math.nan if BROKEN in sample["id"].tolist() else 1
            yield lambda clean: (found := value(clean))._replace(value=found.value * factor)

    RegularizedCriterion._term = broken  # type: ignore[method-assign]


@pytest.mark.parametrize(("way", "frequency"), slow_but([("freelb", 1)], itertools.product(WAYS, SHAPES)))
def test_two_workers_equal_one(way: str, frequency: int, tmp_path: Path) -> None:
    """Weights, teacher and losses; both send the same in the same order, and nothing from our passes.

    In two epochs of three updates (FreeAT: three times as many), with a dummy batch and the terms of a batch left out
    on one worker in each.
    """
    criterion: Regularised = WAYS[way]
    optimizer = "adam" if way.endswith("adam") else "mbpp"
    times = FREEAT if way == "freeat" else 1
    count = 6 * times
    train, size = SHAPES[frequency] if way != "freeat" or frequency == 1 else (20, 2)
    data = write_data(tmp_path / "data", train=train)
    processes = []
    for name, workers in (("one", 1), ("two", 2)):
        flags = [*STEADY, *WRAPPED, *criterion.flags, "--batch-size", str(size)]
        flags += ["--update-freq", str(frequency * 2 // workers)]
        flags += ["--mbpp-warmup-ratio", "0.5"] if optimizer == "mbpp" else []
        arguments = command(
            data, *flags, criterion=criterion.criterion, optimizer=optimizer, save_dir=tmp_path / name, max_update=count
        )
        processes += start(
            arguments, tmp_path / name, workers, prepare=functools.partial(prepared, str(tmp_path / name))
        )
    finish(processes, tmp_path / "two")
    assert_same_run(tmp_path, ["one", "two"], count=count, terms=criterion.still, teacher=optimizer == "mbpp")
    lost = sum(update.get(f"{term}_dropped", 0) for update in updates(tmp_path / "two") for term in TERMS)
    assert lost == 2 * times * (len(criterion.terms) + (optimizer == "mbpp"))
    first, second = (collectives(tmp_path / "two", rank) for rank in (0, 1))
    assert first == second
    trained = len(torch.load(tmp_path / "two" / "checkpoint_last.pt")["last_optimizer_state"]["state"])
    # once an update, whatever passes, batches and terms it had: each gradient, and which of them are of use
    each = trained + LM_HEAD + 1
    assert Counter(one.place for one in first if one.place != "around") == {"backward": count * each}


@pytest.mark.parametrize(
    "criterion", ["smart_sentence_prediction", pytest.param("sentence_prediction", marks=pytest.mark.slow)]
)
def test_the_lm_head_needs_find_unused_parameters(criterion: str, class_data: Path, tmp_path: Path) -> None:
    """Plain fine-tuning too, where torch says so at the second update."""
    flags = ["--ddp-backend", "pytorch_ddp", "--adam-eps", "1e-4"]
    arguments = command(class_data, *flags, criterion=criterion, optimizer="adam", save_dir=tmp_path / "run")
    assert join(start(arguments, tmp_path / "run", workers=2)) == [1, 1]
    text = (tmp_path / "run.0.log").read_text()
    if criterion == "sentence_prediction":
        assert "Expected to have finished reduction in the prior iteration" in text
    else:
        assert (
            "--ddp-backend is pytorch_ddp on several workers, which would wait for gradients of weights that "
            "classification leaves alone (encoder.lm_head.bias, 5 in all); add --find-unused-parameters"
        ) in text


def test_a_frozen_lm_head_does_not(class_data: Path) -> None:
    _, model, criterion = set_up(class_data)
    encoder = criterion.encoder_for(model)
    assert len(encoder.resting(HEAD)) == LM_HEAD
    for name, weight in model.encoder.lm_head.named_parameters():
        weight.requires_grad_(name == "weight")  # the embeddings'
    assert encoder.resting(HEAD) == []
