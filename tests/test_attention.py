"""All passes of a term draw the same dropout masks, also on a GPU.

There a fused attention draws other masks from the same state of the generator than the written-out one, which carries a
change along. On the CPU both draw the same, so a kernel that does as a GPU's stands in for torch's.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from toolkit import BOLD, assert_equal, batch, set_up, step
from torch import Tensor
from torch.nn import functional

TWO_FORWARDS = [*BOLD, "--smart-mode", "finite"]
TANGENT = ["--smart-mode", "tangent"]
TWO_STEPS = ["--smart-steps", "2"]

# flags, classes, passes through a layer, whether attention is written out
FORMS = {
    "two forwards": (TWO_FORWARDS, 2, 2, False),
    "two forwards, two steps": ([*TWO_FORWARDS, *TWO_STEPS], 2, 3, False),
    "two forwards, each step linear": ([*TWO_FORWARDS, *TWO_STEPS, "--smart-linear-search"], 5, 2, False),
    "two forwards, five classes": (TWO_FORWARDS, 5, 3, True),
    "two forwards, five classes, two steps": ([*TWO_FORWARDS, *TWO_STEPS], 5, 4, True),
    "recomputed": ([*TWO_FORWARDS, "--smart-recompute"], 2, 4, False),
    "recomputed, four classes": ([*TWO_FORWARDS, "--smart-recompute"], 4, 4, True),
    "first order": (TANGENT, 2, 2, True),
    "first order, two steps": ([*TANGENT, *TWO_STEPS], 3, 2, True),
    "first order, four classes": (TANGENT, 4, 2, True),
    "first order, four classes, two steps": ([*TANGENT, *TWO_STEPS], 4, 3, True),
}


class AttentionOfAGpu:
    """Stands in for torch's fused attention, whose masks are not those of a dropout from the same state.

    masks: of every pass through each layer's attention, [B, H, T, T] bool.
    in_rows: whether what a dropout falls on lies in memory row by row, for each dropout of every pass.
    real: where there is no padding, [B, H, T, T] bool.
    """

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.masks: dict[int, list[Tensor]] = defaultdict(list)
        self.in_rows: list[bool] = []
        self.real = torch.tensor(True)
        self.fused = 0
        self._layer = 0
        self._dropout = functional.dropout
        for number, layer in enumerate(model.encoder.sentence_encoder.layers):
            layer.self_attn.register_forward_pre_hook(lambda *_, number=number: setattr(self, "_layer", number))
        monkeypatch.setattr(functional, "dropout", self.dropout)
        monkeypatch.setattr(functional, "scaled_dot_product_attention", self.attention)

    def dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        result = self._dropout(x, p, training, inplace)
        self.in_rows.append(x.is_contiguous())
        if x.dim() == 4:
            self.masks[self._layer].append(result.detach() != 0)
            self.real = self.real & (x.detach() != 0)  # shares at padding are 0
        return result

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, p: float = 0.0, *_: Any) -> Tensor:
        self.fused += 1
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        shares = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        torch.rand(3)  # moves the generator on
        return self.dropout(shares, p) @ v


@pytest.mark.parametrize("form", FORMS)
def test_every_pass_draws_the_same_masks(form: str, class_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's dropout goes by what lies where in memory: everywhere in rows, as torch's LayerNorm leaves it."""
    flags, classes, passes, written_out = FORMS[form]
    rates = ["--attention-dropout", "0.3", "--dropout", "0.1", "--pooler-dropout", "0.1"]
    task, model, criterion = set_up(class_data, *flags, *rates, num_classes=classes)
    attention = AttentionOfAGpu(model, monkeypatch)
    step(model, criterion, batch(task, 6))
    assert len(attention.masks) == 2
    for first, *rest in attention.masks.values():
        assert 0.6 < first[attention.real].float().mean() < 0.8 and attention.real.float().mean() > 0.5
        assert 1 + len(rest) == passes
        for other in rest:
            assert_equal(other[attention.real].float(), first[attention.real].float())
    assert all(attention.in_rows)
    assert attention.fused == (0 if written_out else passes * len(attention.masks))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("flags", [TANGENT, [*TWO_FORWARDS, "--smart-recompute"]], ids=["tangent", "recompute"])
def test_the_kernel_is_as_it_was_without_dropout_in_attention(
    flags: list[str], class_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it draws no mask, only the pass that carries a change is written out, which keeps more."""
    task, model, criterion = set_up(class_data, *flags, "--attention-dropout", "0", num_classes=4)
    attention = AttentionOfAGpu(model, monkeypatch)
    step(model, criterion, batch(task, 6))
    # the recomputed form's clean pass twice and its perturbed one; both passes of the first order carry a change
    assert attention.fused == (0 if flags is TANGENT else 3 * 2)
