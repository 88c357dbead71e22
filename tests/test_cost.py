"""What the passes cost in memory and arithmetic, and that saving either changes nothing."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toolkit import (
    BOLD,
    HALF_TYPES,
    LIKE_ROBERTA,
    ROOT,
    Calls,
    Step,
    assert_equal,
    assert_same_gradients,
    batch,
    command,
    flops,
    set_up,
    slow_but,
    step,
    train,
)

from smart_fairseq.encoder import Encoder, forward_mode
from smart_fairseq.errors import UsageError

sys.path.insert(0, str(ROOT / "benchmarks"))
from peak_memory import PeakMemory


def assert_same(one: Step, other: Step) -> None:
    assert_equal(one.loss, other.loss)
    assert_same_gradients(one, other)


@pytest.mark.parametrize("dropout", ["shared", "independent"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES])
def test_recomputing_the_clean_pass_changes_nothing(dtype: torch.dtype, dropout: str, class_data: Path) -> None:
    """Bit for bit, with dropout."""
    flags = ["--dropout", "0.2", "--attention-dropout", "0.2", "--smart-dropout", dropout, *BOLD]
    flags += ["--smart-epsilon", "0.1", "--smart-noise-std", "0.1"]
    results = []
    for more in ([], ["--smart-recompute"]):
        task, model, criterion = set_up(class_data, *LIKE_ROBERTA, *flags, *more)
        results.append(step(model.to(dtype), criterion, batch(task, 6)))
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
            task, model, criterion = set_up(
                class_data, *LIKE_ROBERTA, *flags, "--smart-epsilon", "0.1", "--smart-step-size", "1"
            )
            if keeping:
                monkeypatch.setattr(Encoder, "without_gelu_outputs", lambda _: contextlib.nullcontext())
            results.append(step(model.to(dtype), criterion, batch(task, 6)))
            monkeypatch.undo()
        assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF_TYPES])
def test_leaving_out_gelus_outputs_changes_nothing_to_first_order(
    dtype: torch.dtype, class_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with dropout; also where a dropout of its own stands between gelu and the next layer."""
    calls: list[bool] = []
    original = forward_mode._GeluAndLinear.forward

    def noting(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(self._made is not None and self._made[0] is x)
        return original(self, x)

    for flags, apart in (([], False), (["--activation-dropout", "0.2"], True)):
        results = []
        for keeping in (False, True):
            task, model, criterion = set_up(class_data, *LIKE_ROBERTA, *flags, *BOLD, "--smart-mode", "tangent")
            calls.clear()
            monkeypatch.setattr(forward_mode._GeluAndLinear, "forward", noting)
            if keeping:
                monkeypatch.setattr(forward_mode, "gelus_and_linears", lambda *_: [])
            results.append(step(model.to(dtype), criterion, batch(task, 6)))
            monkeypatch.undo()
            # each layer's, once in the clean pass
            assert calls == ([] if keeping else 8 * [not apart])
        assert_same(*results)


@pytest.mark.parametrize("flags", [["--smart-dropout", "off"], ["--smart-mode", "tangent"]])
def test_recomputing_is_refused_where_it_is_not_there(flags: list[str], class_data: Path) -> None:
    with pytest.raises(UsageError, match="--smart-recompute"):
        train(command(class_data, "--smart-recompute", *flags))


def peak(data: Path, dtype: torch.dtype, *flags: str, **options: Any) -> int:
    """Bytes beyond weights and gradients that forward and backward hold at once."""
    task, model, criterion = set_up(data, *LIKE_ROBERTA, *flags, **options)
    sample = batch(task, 24)
    model.to(dtype)
    step(model, criterion, sample)
    torch.manual_seed(3)
    with PeakMemory() as memory:
        criterion(model, sample)[0].backward()  # into the gradients that are there
    return memory.peak


@pytest.mark.parametrize("dtype", slow_but([torch.float32], [torch.float32, torch.bfloat16, torch.float16]))
def test_memory(dtype: torch.dtype, class_data: Path) -> None:
    """Activations at most 1.9 times plain fine-tuning's, in either form; with --smart-recompute 1.1 times."""
    shared = ["--dropout", "0.1", "--attention-dropout", "0.1"]
    plain = peak(class_data, dtype, *shared, criterion="sentence_prediction")
    smart = [*shared, *BOLD, "--smart-epsilon", "0.1", "--smart-noise-std", "1e-5"]
    for flags in [smart] if dtype == torch.float32 else [smart, [*smart, "--smart-mode", "tangent"]]:
        assert 1.2 * plain < peak(class_data, dtype, *flags) < 1.9 * plain
    assert peak(class_data, dtype, *smart, "--smart-recompute") < 1.1 * plain


@pytest.mark.parametrize(("classes", "recomputing"), [(2, 9), (3, 10), (4, 10), (5, 10)])
def test_arithmetic_of_recomputing(classes: int, recomputing: int, class_data: Path) -> None:
    """7 F is the clean pass (3), the adversarial one (3) and the first step's backward pass from the clean one (1).

    Recomputed, the clean pass takes a forward more, and the first step a forward of its own; from four classes on
    its change is carried along in that, for the cost of another, and one backward pass is enough.
    """

    def cost(*flags: str, **options: Any) -> int:
        task, model, criterion = set_up(class_data, *LIKE_ROBERTA, *flags, **options)
        return flops(model, criterion, batch(task, 4))

    forward = cost(criterion="sentence_prediction") / 3
    assert cost() / forward == pytest.approx(7, abs=0.1)
    assert cost("--smart-noise-std", "1e-3") / forward == pytest.approx(7, abs=0.1)
    assert cost("--smart-recompute", num_classes=classes) / forward == pytest.approx(recomputing, abs=0.1)


@pytest.mark.parametrize("place", ["token", "normalized", "input"])
def test_one_gradient_of_the_table_for_both_passes(place: str, class_data: Path) -> None:
    """As large as the table, it takes a zero-filled tensor of that size each time; positions have a table too."""
    task, model, criterion = set_up(class_data, *LIKE_ROBERTA, *BOLD, "--smart-embedding", place)
    with Calls() as calls:
        criterion(model, batch(task, 4))[0].backward()
    positions = 2
    assert calls.count["embedding_dense_backward.default"] == 1 + positions
