"""What is done at once, or without asking the device, equals what is done tensor by tensor."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq import optim
from fairseq.optim.fp16_optimizer import FP16Optimizer
from toolkit import HALF_TYPES, assert_close, assert_equal, batch, command, parse, set_up

from smart_fairseq.encoder import encoder_of

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


@pytest.mark.parametrize("padded", [True, False])
def test_a_forward_that_does_not_ask_whether_there_is_padding(padded: bool, class_data: Path) -> None:
    """Bit for bit, also where all hidden states are asked for."""
    task, model, _ = set_up(class_data, "--attention-dropout", "0.1")
    sample = batch(task, 6)
    tokens = sample["net_input"]["src_tokens"] if padded else sample["net_input"]["src_tokens"][:, :4]
    assert tokens.eq(1).any() == padded
    for more in ({}, {"return_all_hiddens": True}):
        results = []
        for around in (torch.enable_grad, encoder_of(model).lean):
            torch.manual_seed(3)
            with around():
                results.append(model(tokens, features_only=True, **more)[0])
        assert_equal(*results)
    assert "forward_scriptable" not in vars(model.encoder.sentence_encoder)


def test_a_mask_that_masks_nothing_changes_nothing(class_data: Path) -> None:
    """On a GPU it is used without asking."""
    task, model, _ = set_up(class_data)
    layer, x = model.encoder.sentence_encoder.layers[0].eval(), torch.randn(4, 2, 16)
    assert_close(layer(x, encoder_padding_mask=torch.zeros(2, 4).bool()), layer(x, encoder_padding_mask=None))
