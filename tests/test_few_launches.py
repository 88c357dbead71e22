"""What is done at once, or without asking the device, equals what is done tensor by tensor."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq import optim
from fairseq.optim.fp16_optimizer import FP16Optimizer
from toolkit import (
    HALF_TYPES,
    NO_DROPOUT,
    Calls,
    assert_close,
    assert_equal,
    batch,
    command,
    fairseq_gelu,
    parse,
    set_up,
)

from smart_fairseq.encoder import encoder_of
from smart_fairseq.encoder.lean import additive

SHAPES = [(3, 4), (5,), (1, 2, 3)]


def parameters_with_gradients(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """The last one has none."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    for parameter in found[:-1]:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    return found


def optimizer_for(data: Path, parameters: list[Any], *flags: str) -> Any:
    return optim.build_optimizer(parse(command(data, *flags)).optimizer, parameters)


def test_the_fused_kernel_is_fairseqs_adam(class_data: Path) -> None:
    """To 1e-6 relative, also where epsilon is as large as the gradients: fairseq adds it before the bias correction."""
    flags = ["--adam-eps", "0.1", "--adam-betas", "(0.9, 0.98)", "--weight-decay", "0.1", "--lr", "0.1"]
    results = []
    for base in ("adam", "adamw_fused"):
        parameters = parameters_with_gradients(1)
        optimizer = optimizer_for(class_data, parameters, *flags, "--mbpp-base", base)
        for update in range(5):
            for parameter, other in zip(parameters, parameters_with_gradients(update)):
                parameter.grad = other.grad
            optimizer.step()
        results.append([*(parameter.detach() for parameter in parameters), *optimizer.teacher])
        assert all(group["eps"] == 0.1 for group in optimizer.param_groups)
    for ours, theirs in zip(*results):
        assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        # the epsilon of torch's own would show
    assert not torch.equal(results[0][0], parameters_with_gradients(1)[0].detach())


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0])
def test_the_norm_of_the_gradients_is_fairseqs(max_norm: float, class_data: Path) -> None:
    norms, gradients = [], []
    for clip in (lambda o: o.clip_grad_norm(max_norm), lambda o: optim.FairseqOptimizer.clip_grad_norm(o, max_norm)):
        parameters = parameters_with_gradients(1)
        norms.append(clip(optimizer_for(class_data, parameters)))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters[:-1]]))
    assert_equal(norms[0], norms[1])
    assert_equal(gradients[0], gradients[1])


@pytest.mark.parametrize("flat", [False, True], ids=["tensor by tensor", "flat"])
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_copies_between_the_precisions(dtype: torch.dtype, flat: bool) -> None:
    """Gradients one way, 0 where there is none, and weights the other."""
    half = parameters_with_gradients(1, dtype)
    wide = [torch.nn.Parameter(parameter.detach().float() + 1e-3) for parameter in half]
    for parameter in wide:
        parameter.grad = torch.full_like(parameter, 7.0)
    held: Any = wide
    if flat:
        whole = torch.nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in wide]))
        whole.grad = torch.full_like(whole, 7.0)
        held = {0: whole}
    optimizer: Any = SimpleNamespace(fp16_params=half, fp32_params=held, has_flat_params=flat, _needs_sync=True)
    FP16Optimizer._sync_fp16_grads_to_fp32(optimizer)
    FP16Optimizer._sync_fp32_params_to_fp16(optimizer)
    assert not optimizer._needs_sync
    expected = [torch.zeros_like(p).float() if p.grad is None else p.grad.float() for p in half]
    found = held[0].grad if flat else torch.cat([parameter.grad.flatten() for parameter in wide])
    assert_equal(found, torch.cat([gradient.flatten() for gradient in expected]))
    for parameter, other in zip(half, wide):
        assert_equal(parameter.detach(), other.detach().to(dtype))


# --- lean passes -------------------------------------------------------------------------------------

DROPPING = ["--attention-dropout", "0.1", "--activation-dropout", "0.1"]


def outputs_and_gradients(model: Any, tokens: torch.Tensor, **more: Any) -> list[torch.Tensor]:
    """Of a pass with dropout, from one state of the generator."""
    torch.manual_seed(3)
    model.zero_grad()
    states = model(tokens, features_only=True, **more)[0]
    states.float().square().sum().backward()
    return [states.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_lean_pass_is_fairseqs(dtype: torch.dtype, padded: bool, class_data: Path) -> None:
    """Without asking whether there is padding: bit for bit, also where all hidden states are asked for.

    In float16 to a rounding: torch's gelu for it and the one for float32 differ on the CPU.
    """
    task, model, _ = set_up(class_data, *DROPPING)
    model.to(dtype)
    tokens = batch(task, 6)["net_input"]["src_tokens"]
    tokens = tokens if padded else tokens[:, :4]
    assert tokens.eq(1).any() == padded
    for more in ({}, {"return_all_hiddens": True}):
        expected = outputs_and_gradients(model, tokens, **more)
        with encoder_of(model).lean():
            found = outputs_and_gradients(model, tokens, **more)
        assert len(found) == len(expected) > 30
        for ours, theirs in zip(found, expected):
            if dtype == torch.float16:
                assert_close(ours, theirs, atol=1e-2 * float(theirs.abs().max()))
            else:
                assert_equal(ours, theirs)
    assert not any({"forward", "forward_scriptable"} & vars(module).keys() for module in model.modules())
    assert all(layer.activation_fn is fairseq_gelu for layer in model.encoder.sentence_encoder.layers)


def test_a_lean_pass_has_fewer_operations(class_data: Path) -> None:
    """A layer has no mask, no biases and no copies to make, and does not widen what gelu gets."""
    task, model, _ = set_up(class_data)
    model.to(torch.bfloat16)
    tokens = batch(task, 6)["net_input"]["src_tokens"]
    counts = []
    for around in (nullcontext, encoder_of(model).lean):
        with around(), Calls() as calls:
            outputs_and_gradients(model, tokens)
        counts.append(calls.count)
    theirs, ours = counts
    for name, in_a_layer, around_them in (
        ("cat.default", 2, 0),
        ("zeros_like.default", 1, 0),
        ("masked_fill_.Scalar", 1, -1),  # the mask of all layers
        ("_to_copy.default", 4, 2),
    ):
        assert theirs[name] - ours.get(name, 0) == 2 * in_a_layer + around_them, name


def test_attention_that_is_not_known_gets_fairseqs_mask(class_data: Path) -> None:
    """Zeros added to its keys: the pass asks nothing, and the layers are fairseq's."""
    task, model, _ = set_up(class_data)
    tokens = batch(task, 6)["net_input"]["src_tokens"]
    for layer in model.encoder.sentence_encoder.layers:
        layer.self_attn.add_zero_attn = True
    expected = outputs_and_gradients(model, tokens)
    with encoder_of(model).lean():
        found = outputs_and_gradients(model, tokens)
        assert not any("forward" in vars(module) for module in model.modules())
        assert "forward_scriptable" in vars(model.encoder.sentence_encoder)
    for ours, theirs in zip(found, expected):
        assert_equal(ours, theirs)


@pytest.mark.parametrize("length", [8, 13])
def test_the_additive_mask(length: int) -> None:
    """Its rows begin at multiples of 8, and written-out attention takes it as it takes fairseq's."""
    padding = torch.arange(length) >= torch.tensor([[length], [length - 3]])
    mask = additive(padding, torch.zeros((), dtype=torch.bfloat16))
    assert mask.dtype == torch.bfloat16 and mask.shape == (2, 1, 1, length)
    assert all(stride % 8 == 0 for stride in mask.stride()[:-1])
    assert_equal(mask[:, 0, 0].exp(), (~padding).to(torch.bfloat16))
    with torch.autocast("cpu", torch.float16):
        assert additive(padding, torch.zeros(())).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_written_out_takes_both_masks(dtype: torch.dtype, class_data: Path) -> None:
    task, model, _ = set_up(class_data, *DROPPING)
    model.to(dtype)
    tokens, encoder = batch(task, 6)["net_input"]["src_tokens"], encoder_of(model)
    with encoder.attention_written_out():
        expected = outputs_and_gradients(model, tokens)
    with encoder.lean(), encoder.attention_written_out():
        found = outputs_and_gradients(model, tokens)
    for ours, theirs in zip(found, expected):
        assert_equal(ours, theirs)


# --- other weights -----------------------------------------------------------------------------------


def test_a_model_under_other_weights(class_data: Path) -> None:
    """As by torch's functional_call, shared ones included; names left out keep the model's own."""
    task, model, _ = set_up(class_data, *NO_DROPOUT)
    inputs = batch(task, 6)["net_input"]  # without a head: the language model's output, by the table's weight
    own = dict(model.named_parameters())
    assert "encoder.lm_head.weight" not in own
    weights = {name: parameter.detach() + 0.1 for name, parameter in own.items() if "layers.0" not in name}
    encoder = encoder_of(model)
    found = encoder.under(weights)(**inputs)[0]
    assert_equal(found, torch.func.functional_call(model, weights, kwargs=inputs)[0])
    assert not torch.equal(found, model(**inputs)[0])
    with pytest.raises(TypeError):
        encoder.under(weights)(no_such_argument=1)
    assert all(parameter is own[name] for name, parameter in model.named_parameters())
    assert model.encoder.lm_head.weight is own["encoder.sentence_encoder.embed_tokens.weight"]
    for name, weight in encoder.frozen_weights().items():
        assert weight.data_ptr() == own[name].data_ptr() and not weight.requires_grad


def test_weights_under_autocast_are_cast_at_once(class_data: Path) -> None:
    """Those of linear layers, to what autocast makes of them itself; a pass under them is the same."""
    task, model, _ = set_up(class_data, *NO_DROPOUT)
    encoder, inputs = encoder_of(model), {**batch(task, 6)["net_input"], "features_only": True}
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert encoder.cast(weights) is weights
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = encoder.under(weights)(**inputs)[0]
        cast = encoder.cast(weights)
        with Calls() as calls:
            found = encoder.under(cast)(**inputs)[0]
    assert_equal(found, expected)
    half = {name for name, weight in cast.items() if weight.dtype == torch.bfloat16}
    assert {name for name in half if "layer_norm" in name or "embed" in name} == set()
    assert "encoder.sentence_encoder.layers.1.self_attn.q_proj.weight" in half and len(half) >= 2 * 12
    # of activations alone: three projections, the way out and both linear layers
    assert calls.count["_to_copy.default"] <= 10 * 2


def test_a_mask_that_masks_nothing_changes_nothing(class_data: Path) -> None:
    """On a GPU it is used without asking."""
    task, model, _ = set_up(class_data)
    layer, x = model.encoder.sentence_encoder.layers[0].eval(), torch.randn(4, 2, 16)
    assert_close(layer(x, encoder_padding_mask=torch.zeros(2, 4).bool()), layer(x, encoder_padding_mask=None))
