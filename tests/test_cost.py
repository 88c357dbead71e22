"""What the passes cost in memory and arithmetic, and that saving either changes nothing."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toolkit import BOLD, HALF_TYPES, ROOT, assert_equal, batch, build, command, flops
from torch.utils._python_dispatch import TorchDispatchMode

import smart_fairseq.smoothness as module
from smart_fairseq.errors import UsageError

sys.path.insert(0, str(ROOT / "benchmarks"))
from peak_memory import PeakMemory

# layers as wide as in RoBERTa in relation to each other, and many, so that the ends do not count
LIKE_ROBERTA = ["--encoder-layers", "8", "--encoder-embed-dim", "64", "--encoder-ffn-embed-dim", "256"]


def set_up(data: Path, *flags: str, **options: Any) -> tuple[Any, Any, Any]:
    options = {"optimizer": "adam", **options}
    _, task, model, criterion = build(command(data, *LIKE_ROBERTA, *flags, **options))
    return task, model.train(), criterion


def passes(model: Any, criterion: Any, sample: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a batch."""
    model.zero_grad()
    torch.manual_seed(3)
    loss, _, _ = criterion(model, sample)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: Any, other: Any) -> None:
    assert_equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert_equal(other[1][name], gradient)


@pytest.mark.parametrize("dropout", ["shared", "independent"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES])
def test_recomputing_the_clean_pass_changes_nothing(dtype: torch.dtype, dropout: str, class_data: Path) -> None:
    """Bit for bit, with dropout."""
    flags = ["--dropout", "0.2", "--attention-dropout", "0.2", "--smart-dropout", dropout, *BOLD]
    flags += ["--smart-epsilon", "0.1", "--smart-noise-std", "0.1"]
    results = []
    for more in ([], ["--smart-recompute"]):
        task, model, criterion = set_up(class_data, *flags, *more)
        results.append(passes(model.to(dtype), criterion, batch(task, 6)))
        assert not any("forward" in vars(m) for m in model.modules())
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES])
def test_leaving_out_gelus_outputs_changes_nothing(
    dtype: torch.dtype, class_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with dropout; also where a dropout of its own stands between gelu and the next layer."""
    for flags in ([], ["--activation-dropout", "0.2"]):
        results = []
        for keeping in (False, True):
            task, model, criterion = set_up(class_data, *flags, "--smart-epsilon", "0.1", "--smart-step-size", "1")
            if keeping:
                monkeypatch.setattr(module, "without_gelu_outputs", lambda _: contextlib.nullcontext())
            results.append(passes(model.to(dtype), criterion, batch(task, 6)))
            monkeypatch.undo()
        assert_same(*results)


@pytest.mark.parametrize("flags", [["--smart-dropout", "off"], ["--smart-mode", "tangent"]])
def test_recomputing_is_refused_where_it_is_not_there(flags: list[str], class_data: Path) -> None:
    with pytest.raises(UsageError, match="--smart-recompute"):
        set_up(class_data, "--smart-recompute", *flags)


def peak(data: Path, dtype: torch.dtype, *flags: str, **options: Any) -> int:
    """Bytes beyond weights and gradients that forward and backward hold at once."""
    task, model, criterion = set_up(data, *flags, **options)
    sample = batch(task, 24)
    model.to(dtype)
    passes(model, criterion, sample)
    torch.manual_seed(3)
    with PeakMemory() as memory:
        criterion(model, sample)[0].backward()  # into the gradients that are there
    return memory.peak


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES])
def test_memory(dtype: torch.dtype, class_data: Path) -> None:
    """Activations at most 1.9 times plain fine-tuning's, in either form; with --smart-recompute 1.1 times."""
    shared = ["--dropout", "0.1", "--attention-dropout", "0.1"]
    plain = peak(class_data, dtype, *shared, criterion="sentence_prediction")
    # in half precision the noise is below what is resolved: the first step goes to first order
    smart = [*shared, *BOLD, "--smart-epsilon", "0.1", "--smart-noise-std", "1e-5"]
    forms = [smart] if dtype == torch.float32 else [smart, [*smart, "--smart-mode", "tangent"]]
    for flags in forms:
        assert 1.2 * plain < peak(class_data, dtype, *flags) < 1.9 * plain
    assert peak(class_data, dtype, *smart, "--smart-recompute") < 1.1 * plain


def test_arithmetic_of_recomputing(class_data: Path) -> None:
    def cost(*flags: str, **options: Any) -> int:
        task, model, criterion = set_up(class_data, *flags, **options)
        return flops(model, criterion, batch(task, 4))

    forward = cost(criterion="sentence_prediction") / 3
    assert cost() / forward == pytest.approx(7, abs=0.1)
    assert cost("--smart-noise-std", "1e-3") / forward == pytest.approx(8, abs=0.1)
    assert cost("--smart-recompute") / forward == pytest.approx(9, abs=0.1)


class Calls(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.__name__] = self.count.get(func.__name__, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("place", ["token", "input"])
def test_one_gradient_of_the_table_for_both_passes(place: str, class_data: Path) -> None:
    """As large as the table, it takes a zero-filled tensor of that size each time; positions have a table too."""
    task, model, criterion = set_up(class_data, "--smart-embedding", place)
    with Calls() as calls:
        criterion(model, batch(task, 4))[0].backward()
    positions = 2
    assert calls.count["embedding_dense_backward.default"] == 1 + positions
