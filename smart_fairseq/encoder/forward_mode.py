"""J d by forward-mode differentiation: a forward carries the change of every activation beside its value.

The difference of two outputs is rounding when the perturbation is small for the precision; a change that is carried
along at size 1 is not. torch's forward-mode differentiation holds the pair. Some of torch's kernels do not go along:
LayerNorm's tangent overflows in float16 and cannot be differentiated once more (its formula holds mean and deviation
fixed), neither can the softmax inside attention, and a linear layer's tangent also multiplies by the weights'
tangent, which is 0. These are written out, with sums in float32. What is done entry by entry or along a row,
LayerNorm, softmax and gelu, keeps its inputs alone for the gradient and is computed again.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from ..errors import UsageError
from .lean import additive
from .memory import GeluAndLinear, Replacement, gelu_at_once, gelus, gelus_and_linears, replaced
from .place import Place

# (value, change, ...) -> (result, its change)
Formula = Callable[..., tuple[Tensor, Tensor]]


def _pair(value: Tensor, change: Tensor) -> Tensor:
    return forward_ad.make_dual(value, change)  # type: ignore[no-any-return]


def _dual(formula: Formula, ordinary: Callable[..., Tensor], differentiable: bool) -> Any:
    """``ordinary`` for tensors that may carry a change, by ``formula``.

    Where the change need not be differentiable, the value keeps what it ordinarily does.
    """

    def apply(x: Tensor, *parameters: Any) -> Tensor:
        value, change = forward_ad.unpack_dual(x)
        if change is None:
            return ordinary(x, *parameters)
        if differentiable:
            arguments = (value, change, *parameters)
            return _pair(*checkpoint(formula, *arguments, use_reentrant=False, preserve_rng_state=False))
        with torch.no_grad():
            _, moved = formula(value, change, *parameters)
        return _pair(ordinary(value, *parameters), moved)

    return apply


def _widened(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def _layer_norm(value: Tensor, weight: Tensor, bias: Tensor, module: Any) -> Tensor:
    return nn.functional.layer_norm(value, module.normalized_shape, weight, bias, module.eps)


def _layer_norm_change(
    value: Tensor, change: Tensor, weight: Tensor, bias: Tensor, module: Any
) -> tuple[Tensor, Tensor]:
    # in rows, as torch's own result is: on a GPU dropout's masks, the head's too, depend on what lies where in memory
    wide, moved = _widened(value.contiguous(), change.contiguous())
    variance, mean = torch.var_mean(wide, dim=-1, keepdim=True, correction=0)
    scale = torch.rsqrt(variance + module.eps)
    normal = (wide - mean) * scale
    moved = moved - moved.mean(dim=-1, keepdim=True)
    moved = scale * (moved - normal * (normal * moved).mean(dim=-1, keepdim=True)) * weight
    return (normal * weight + bias).to(value.dtype), moved.to(value.dtype)


def _normalized(layer_norm: Callable[..., Tensor], module: Any, x: Tensor) -> Tensor:
    return layer_norm(x, module.weight, module.bias, module)


def _softmax(scores: Tensor) -> Tensor:
    # autocast's is in float32, and dropout's masks depend on the precision of what they fall on
    return torch.softmax(scores, dim=-1).to(scores.dtype)


def _softmax_change(value: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    wide, moved = _widened(value, change)
    shares = torch.softmax(wide, dim=-1)
    moved = shares * (moved - (shares * moved).sum(dim=-1, keepdim=True))
    return shares.to(value.dtype), moved.to(value.dtype)


def _gelu_change(value: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    wide, moved = _widened(value, change)
    slope = torch.special.ndtr(wide) + wide * torch.exp(-wide.square() / 2) / math.sqrt(2 * math.pi)
    return gelu_at_once(value), (slope * moved).to(value.dtype)


class _GeluAndLinear(GeluAndLinear):
    """The same with a change: what is computed again is gelu's value and its change."""

    def activation(self, x: Tensor) -> Tensor:
        value, change = forward_ad.unpack_dual(x)
        if change is None:
            return gelu_at_once(x)
        output = _pair(*checkpoint(_gelu_change, value, change, use_reentrant=False, preserve_rng_state=False))
        self._made = output, value.detach(), change.detach()
        return output

    def parts(self, x: Tensor) -> Sequence[Tensor]:
        return tuple(forward_ad.unpack_dual(x))

    def again(self, *inputs: Tensor) -> Sequence[Tensor]:
        return _gelu_change(*inputs)

    def project(self, x: Tensor) -> Tensor:
        return _linear(self.linear, x)


def _linear(module: Any, x: Tensor) -> Tensor:
    value, change = forward_ad.unpack_dual(x)
    result = nn.functional.linear(value, module.weight, module.bias)
    return result if change is None else _pair(result, nn.functional.linear(change, module.weight))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    changes: tuple[Tensor, Tensor, Tensor] | None,
    mask: Tensor | None,
    dropped: Callable[[Tensor], Tensor],
    differentiable: bool,
) -> tuple[Tensor, Tensor | None]:
    """What attention gives, and its change; [B, H, T, C / H]. ``mask`` is added to the scores."""
    scores = q @ k.transpose(-2, -1)
    scores = scores if mask is None else scores + mask
    if changes is None:
        return dropped(_softmax(scores)) @ v, None
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        moved_q, moved_k, moved_v = changes
        moved_scores = moved_q @ k.transpose(-2, -1) + q @ moved_k.transpose(-2, -1)
        shares, moved = _softmax_change(scores, moved_scores)
    shares = dropped(shares if differentiable else _softmax(scores))
    attended = shares @ v
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        return attended, dropped(moved) @ v + shares @ moved_v


def _self_attention(
    module: Any,
    differentiable: bool,
    query: Tensor,
    key: Any = None,
    value: Any = None,
    key_padding_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Self-attention as in fairseq's MultiheadAttention; [T, B, C] -> [T, B, C].

    A differentiable change doubles all that is as large as T x T for each head; none of that but the dropout's mask is
    kept for the gradient.
    """
    length, batch, channels = query.shape

    def heads(x: Tensor) -> Tensor:  # [T, B, C] -> [B, H, T, C / H]
        return x.reshape(length, batch, module.num_heads, -1).permute(1, 2, 0, 3)

    def joined(x: Tensor) -> Tensor:  # and back
        return x.permute(2, 0, 1, 3).reshape(length, batch, channels)

    projected = [heads(project(query)) for project in (module.q_proj, module.k_proj, module.v_proj)]
    (q, moved_q), (k, moved_k), (v, moved_v) = (forward_ad.unpack_dual(x) for x in projected)
    mask = key_padding_mask
    if mask is not None and mask.dim() == 2:
        mask = additive(mask.bool(), q)
    if moved_q is None:
        dropout = functools.partial(nn.functional.dropout, p=module.dropout_module.p, training=module.training)
        return module.out_proj(joined(_attend(q * module.scaling, k, v, None, mask, dropout, True)[0])), None
    dropped = _dropping(module, q)
    arguments = (q * module.scaling, k, v, (moved_q * module.scaling, moved_k, moved_v), mask, dropped, differentiable)
    if differentiable:
        attended, moved = checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False)
    else:
        attended, moved = _attend(*arguments)
    return module.out_proj(_pair(joined(attended), joined(moved))), None


def _dropping(module: Any, q: Tensor) -> Callable[[Tensor], Tensor]:
    """The dropout of shares of attention, [B, H, T, T] in the dtype of ``q``: one mask, that of an ordinary pass."""
    share = module.dropout_module.p
    if not (module.training and share > 0):
        return lambda x: x
    ones = torch.ones(*q.shape[:3], q.shape[2], dtype=q.dtype, device=q.device)
    kept = nn.functional.dropout(ones, share).bool()
    return lambda x: torch.where(kept, x / (1 - share), 0)


def _attention(module: MultiheadAttention, differentiable: bool = False) -> Replacement:
    """For `replaced`: the module's attention written out; raises `UsageError` for one that is not known here."""
    if module.bias_k is not None or module.add_zero_attn or getattr(module, "use_xformers", False):
        raise UsageError(
            "--arch: this model's attention (xformers, a bias or zeros added to its keys) has no forward-mode "
            "form here, which --smart-mode tangent, more than four classes and half precision need"
        )
    return module, "forward", functools.partial(_self_attention, module, differentiable)


def attention_written_out(model: nn.Module) -> list[Replacement]:
    """For `replaced`: forwards draw the dropout masks that one within `changed` draws.

    A fused kernel draws other masks from the same state of the generator.
    """
    modules = (module for module in model.modules() if isinstance(module, MultiheadAttention))
    return [_attention(module) for module in modules if module.dropout_module.p > 0]


def written_out(model: nn.Module, differentiable: bool) -> list[Replacement]:
    """For `replaced`: every module whose change torch does not give is written out.

    Without ``differentiable`` changes, all keep for the values' gradient what they ordinarily do.
    """
    layer_norm = _dual(_layer_norm_change, _layer_norm, differentiable)
    replacements = gelus(model, _dual(_gelu_change, gelu_at_once, differentiable))
    for module in model.modules():
        if isinstance(module, MultiheadAttention):
            replacements.append(_attention(module, differentiable))
        elif type(module) is nn.Linear:
            replacements.append((module, "forward", functools.partial(_linear, module)))
        elif hasattr(module, "normalized_shape"):  # torch's LayerNorm or apex's
            replacements.append((module, "forward", functools.partial(_normalized, layer_norm, module)))
    return [*replacements, *(gelus_and_linears(model, _GeluAndLinear) if differentiable else ())]


@contextmanager
def changed(
    model: nn.Module,
    place: Place,
    direction: Tensor,
    replacements: Sequence[Replacement],
    leaf: list[Tensor] | None = None,
) -> Iterator[list[Tensor]]:
    """Within the block, one forward of the model also yields the change of its output along ``direction``.

    The forward returns the ordinary logits f(x); the change J d, differentiable like they are, is in the yielded list.

    Args:
        model: bare.
        place: where the perturbation enters.
        direction: d, [B, T, C]; of size 1 or so, whatever the perturbation's size.
        replacements: `written_out`, differentiable where there is no ``leaf``.
        leaf: if given, the perturbed embeddings are cut off from what they were computed from, and handed out (or what
            stands in for their change) in this list as a leaf [B, T, C]; the change is then not differentiable.
    Raises:
        RuntimeError: the direction did not reach the output of one forward.
    """
    changes: list[Tensor] = []

    def enter(x: Tensor) -> Tensor:
        if leaf is not None:
            x, entered = place.entered(x.detach())
            leaf.append(entered)
        return _pair(x, place.scaled(x, direction).to(x.dtype))

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        # taken apart here, inside a distributed wrapper, which would not let the change through
        logits, change = forward_ad.unpack_dual(output[0])
        changes.append(change)
        return (logits, *output[1:])

    with place.hook(enter), model.register_forward_hook(leave):
        with replaced(replacements), forward_ad.dual_level():
            yield changes
    if len(changes) != 1 or changes[0] is None:
        raise RuntimeError("the direction did not reach the output of one forward")
