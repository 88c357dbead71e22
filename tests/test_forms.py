"""The rule that chooses the form of the term: what it measures, where, and what it says."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toolkit import LIKE_ROBERTA, NO_DROPOUT, batch, set_up

from smart_fairseq.encoder import encoder_of
from smart_fairseq.errors import UsageError
from smart_fairseq.terms import precision
from smart_fairseq.terms.precision import Form, FormOfTerm, PlaceSizes, Search, choose_form, measure_place

TWO_FORWARDS, FIRST_ORDER = FormOfTerm
# of entries of size 1
PLACE = PlaceSizes(median=1.0, root_mean_square=1.5, entries=900.0)


def form_at(size: float, data: Path, *flags: str, dtype: torch.dtype = torch.float16, num_classes: int = 2) -> Form:
    """What is chosen for a radius of ``size`` times what the rule takes to be resolved, reached by one long step."""
    radius = size * precision.ROUNDINGS[dtype] * torch.finfo(dtype).eps * PLACE.median
    _, model, criterion = set_up(data, "--smart-epsilon", str(radius), "--smart-step-size", "100", *flags)
    return choose_form(criterion.cfg, encoder_of(model), PLACE, num_classes, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_two_forwards_as_far_down_as_they_are_resolved(dtype: torch.dtype, class_data: Path) -> None:
    assert form_at(1.01, class_data, dtype=dtype)[:2] == (TWO_FORWARDS, Search.CLEAN_PASS)
    assert form_at(0.99, class_data, dtype=dtype)[:2] == (FIRST_ORDER, Search.OWN_PASS)


@pytest.mark.parametrize(("on", "device"), [(True, "cuda"), (False, "cuda"), (True, "cpu")])
def test_tf32_resolves_what_float16_does(
    on: bool, device: str, class_data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a GPU alone, and as torch itself says whether it is on."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else "highest")
    try:
        _, _, criterion = set_up(class_data, "--smart-epsilon", "5e-3", "--smart-step-size", "1")
        table = SimpleNamespace(is_cuda=device == "cuda", shape=(17, 16))
        encoder: Any = SimpleNamespace(table=table, has_dropout=True)
        with caplog.at_level(logging.INFO):
            form = choose_form(criterion.cfg, encoder, PLACE, 2, torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)
    rounded = on and device == "cuda"
    assert form.term is (FIRST_ORDER if rounded else TWO_FORWARDS)
    assert ("is below what float32 with TF32 resolves here (6e-03)" in caplog.text) == rounded


@pytest.mark.parametrize(
    ("scope", "entries"), [("token", 16), ("example", PLACE.entries)], ids=["a token's 16 channels", "an example's"]
)
def test_an_l2_norm_is_spread_over_its_entries(scope: str, entries: float, class_data: Path) -> None:
    flags = ["--smart-norm", "l2", "--smart-norm-scope", scope]
    assert form_at(1.01 * entries**0.5, class_data, *flags).term is TWO_FORWARDS
    assert form_at(0.99 * entries**0.5, class_data, *flags).term is FIRST_ORDER


def test_what_the_steps_do_not_reach_does_not_count(class_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A large ball, in which noise and step stay near the clean point."""
    with caplog.at_level(logging.INFO):
        form = form_at(1000, class_data, "--smart-step-size", "1e-5", "--smart-steps", "3")
    assert form.term is FIRST_ORDER
    assert "--smart-noise-std + --smart-steps x --smart-step-size = 4e-05 is below what float16" in caplog.text
    assert form_at(1000, class_data, "--smart-step-size", "1e-5", "--smart-noise-std", "0.1").term is TWO_FORWARDS


def test_absolute_noise_is_an_entrys(class_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Over the 16 channels of a token, noise of 0.5 has the l2 norm 2; it reaches what a step of 1e-5 does not."""
    flags = ["--smart-norm", "l2", "--smart-norm-scope", "token", "--smart-step-size", "1e-5", "--smart-noise-std"]
    resolved = precision.ROUNDINGS[torch.float16] * torch.finfo(torch.float16).eps  # of an entry
    assert form_at(1000, class_data, *flags, str(1.01 * resolved)).term is TWO_FORWARDS
    with caplog.at_level(logging.INFO):
        assert form_at(1000, class_data, *flags, str(0.98 * resolved)).term is FIRST_ORDER
    assert f"--smart-step-size = {4 * 0.98 * resolved + 1e-5:g} is below what float16" in caplog.text


def test_what_the_start_of_the_log_says_of_the_first_order() -> None:
    form = Form(FIRST_ORDER, Search.OWN_PRODUCTS)
    assert form.in_words() == "to first order (tangent), every ascent step from a pass of its own"


@pytest.mark.parametrize("norm", ["inf", "l2"])
def test_a_relative_radius_is_a_share_of_the_place(norm: str, class_data: Path) -> None:
    """Of its root mean square, 1.5: a share of 2/3 is an entry of size 1."""
    flags = ["--smart-epsilon-unit", "relative", "--smart-norm", norm]
    assert form_at(1.01 / 1.5, class_data, *flags).term is TWO_FORWARDS
    assert form_at(0.99 / 1.5, class_data, *flags).term is FIRST_ORDER


OF_STEPS, OF_INPUT = "--smart-steps 2 in ", "--smart-embedding input in bfloat16"


@pytest.mark.parametrize(
    ("dtype", "flags", "warned"),
    [
        (torch.bfloat16, ["--smart-steps", "2"], [OF_STEPS]),
        (torch.float16, ["--smart-steps", "2"], [OF_STEPS]),
        (torch.bfloat16, [], []),
        (torch.bfloat16, ["--smart-embedding", "input"], [OF_INPUT]),
        (torch.float16, ["--smart-embedding", "input"], []),
        (torch.float32, ["--smart-steps", "2"], []),
        (torch.bfloat16, ["--smart-steps", "2", "--smart-linear-search"], []),
    ],
    ids=str,
)
def test_what_half_precision_is_less_exact_in_is_warned_of(
    dtype: torch.dtype, flags: list[str], warned: list[str], class_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert form_at(2, class_data, *flags, dtype=dtype).term is TWO_FORWARDS
    assert [said for said in (OF_STEPS, OF_INPUT) if said in caplog.text] == warned


def test_the_release_is_of_size_one(class_data: Path) -> None:
    assert form_at(1e-3, class_data, "--smart-projection", "normalize").term is TWO_FORWARDS


@pytest.mark.parametrize(
    ("flags", "classes", "search"),
    [
        ([], 4, Search.CLEAN_PASS),
        ([], 5, Search.OWN_PRODUCTS),
        (["--smart-recompute"], 2, Search.OWN_PASS),
        (["--smart-recompute"], 4, Search.OWN_PRODUCTS),
        (["--smart-linear-search"], 2, Search.EVERY_STEP),
        (["--smart-linear-search"], 5, Search.EVERY_STEP),
        (["--smart-dropout", "off"], 2, Search.CLEAN_PASS),
        (["--smart-dropout", "independent"], 2, Search.FORWARD),
        (["--smart-dropout", "independent", *NO_DROPOUT], 2, Search.CLEAN_PASS),
        (["--smart-dropout", "independent", *NO_DROPOUT], 5, Search.OWN_PRODUCTS),
    ],
    ids=str,
)
def test_where_the_first_step_comes_from(flags: list[str], classes: int, search: Search, class_data: Path) -> None:
    """To first order whatever the precision, but where fresh masks move the output more than any noise."""
    for dtype in (torch.float16, torch.float32):
        assert form_at(10, class_data, *flags, dtype=dtype, num_classes=classes)[:2] == (TWO_FORWARDS, search)


def test_no_form_is_right(class_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Below the resolution, and the first order unknown to a flag or off: refused, or warned of by name."""
    with pytest.raises(
        UsageError, match=r"below what float16 resolves here .* --smart-dropout independent; use shared"
    ):
        form_at(0.5, class_data, "--smart-dropout", "independent")
    # without dropout its masks are the same as shared ones
    assert form_at(0.5, class_data, "--smart-dropout", "independent", *NO_DROPOUT).term is FIRST_ORDER
    caplog.clear()
    assert form_at(0.9, class_data, dtype=torch.bfloat16).term is FIRST_ORDER
    share = 0.9 * precision.ROUNDINGS[torch.bfloat16] * torch.finfo(torch.bfloat16).eps / PLACE.root_mean_square
    assert ("may be off by more than 5 %" in caplog.text) == (share > precision.LINEAR_SHARE)


def test_forced_modes(class_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert form_at(1000, class_data, "--smart-mode", "tangent").term is FIRST_ORDER
    assert form_at(1000, class_data, "--smart-mode", "finite").term is TWO_FORWARDS
    assert "rounding" not in caplog.text
    assert form_at(0.5, class_data, "--smart-mode", "finite").term is TWO_FORWARDS
    assert caplog.text.count("the term will be partly rounding") == 1


@pytest.mark.parametrize("place", ["token", "input"])
def test_the_place_is_measured_over_real_tokens(place: str, class_data: Path) -> None:
    """Against what the encoder's own parts give; dropout on, but not in the measurement."""
    task, model, _ = set_up(class_data, *LIKE_ROBERTA)
    sample: Any = batch(task, 6)
    tokens = sample["net_input"]["src_tokens"]
    inner = model.encoder.sentence_encoder
    found = measure_place(encoder_of(model), place, sample["net_input"])
    assert model.training
    with torch.no_grad():
        inner.eval()
        output = inner.embed_tokens(tokens) if place == "token" else inner.forward_embedding(tokens)[0]
    real = output[tokens.ne(1)]
    assert real.numel() < output.numel()
    assert found.median == pytest.approx(float(real.abs().median()), rel=1e-6)
    assert found.root_mean_square == pytest.approx(float(real.square().mean().sqrt()), rel=1e-6)
    assert found.entries == pytest.approx(real.numel() / 6)
