"""How a model takes a perturbation: the one file that knows RoBERTa's insides.

``RobertaModel.forward`` accepts ``token_embeddings`` and ignores it (fairseq's R3F fell into that), so a
perturbation enters through a forward hook on the module whose output is perturbed, and the ordinary
forward, the distributed wrapper's included, does the rest. The hook counts its calls: a forward that the
perturbation did not reach is an error, never a regulariser that does nothing.

| --smart-embedding | module | what is perturbed |
| --- | --- | --- |
| token | encoder.sentence_encoder.embed_tokens | the embedding lookup, before positions and LayerNorm |
| input | encoder.sentence_encoder.dropout_module | what enters the first layer, after LayerNorm and dropout |
"""

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fairseq.models import BaseFairseqModel
from fairseq.modules import MultiheadAttention, gelu
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from .errors import UsageError

__all__ = [
    "Forward",
    "Substitute",
    "bare",
    "captured",
    "changed",
    "embedding_weight",
    "layer_count",
    "perturbed",
    "recomputed",
    "token_mask",
    "without_gelu_outputs",
]

_MODULES = {"token": "embed_tokens", "input": "dropout_module"}


def bare(model: Any) -> nn.Module:
    """The model inside fairseq's distributed wrappers, which all keep it as ``module``."""
    while not isinstance(model, BaseFairseqModel) and hasattr(model, "module"):
        model = model.module
    return model


def _encoder(model: nn.Module) -> Any:
    encoder = getattr(getattr(bare(model), "encoder", None), "sentence_encoder", None)
    if encoder is None or not all(hasattr(encoder, name) for name in _MODULES.values()):
        raise UsageError(
            f"--arch: {type(bare(model)).__name__} takes no perturbation of its embeddings; "
            "use a RoBERTa-style model (roberta, roberta_large, xlm, smart_bert, ...)"
        )
    return encoder


def embedding_weight(model: nn.Module) -> Tensor:
    """The table [V, C] whose rows are perturbed; raises `UsageError` for a model that is not RoBERTa's kind."""
    return _encoder(model).embed_tokens.weight


def layer_count(model: nn.Module) -> int:
    return len(_encoder(model).layers)


def token_mask(model: nn.Module, src_tokens: Tensor) -> Tensor:
    """1 at real tokens and 0 at padding: [B, T] token ids -> [B, T, 1] float32."""
    return src_tokens.ne(_encoder(model).padding_idx).unsqueeze(-1).float()


@contextmanager
def captured(
    model: nn.Module, place: str, layers: int = 0, differentiable: bool = False, leaf: bool = False
) -> Iterator[list[Tensor]]:
    """What the block's forwards perturb, [B, T, C] each, or what comes of it after ``layers`` layers.

    Args:
        place: "token" or "input" (the table above).
        differentiable: it requires a gradient, also where nothing before it does.
        leaf: it is cut off from what it was computed from as well.
    """
    found: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        tensor = output.transpose(0, 1) if layers else output  # layers have [T, B, C]
        if leaf:
            tensor = tensor.detach()
        if (differentiable or leaf) and not tensor.requires_grad:
            tensor.requires_grad_()
        found.append(tensor)
        return tensor.transpose(0, 1) if layers else tensor

    encoder = _encoder(model)
    handle = (encoder.layers[layers - 1] if layers else getattr(encoder, _MODULES[place])).register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def _replaced(replacements: list[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Run a block with other attributes: (module, name, value)."""
    before = [(module, name, vars(module).get(name)) for module, name, _ in replacements]
    for module, name, value in replacements:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, own in before:
            if own is None:  # it is its class's
                delattr(module, name)
            else:
                setattr(module, name, own)


def recomputed(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The block's forward keeps each layer's input alone, and runs the layer again when its gradient is taken."""
    layers = list(_encoder(model).layers)
    return _replaced(
        [(layer, "forward", functools.partial(checkpoint, layer.forward, use_reentrant=False)) for layer in layers]
    )


def _gelus(model: nn.Module, function: Callable[[Tensor], Tensor]) -> list[tuple[nn.Module, str, Any]]:
    """For `_replaced`: ``function`` as the activation of every module that has gelu."""
    modules = bare(model).modules()
    return [(module, "activation_fn", function) for module in modules if getattr(module, "activation_fn", None) is gelu]


@contextmanager
def without_gelu_outputs(model: nn.Module) -> Iterator[None]:
    """The block's forwards keep the input of each layer's gelu for the gradient, and not the output too.

    The output is what the next linear layer keeps; it is computed again, which costs no product of matrices.
    """
    kept: dict[int, Tensor] = {}  # the input by the output's storage, as long as that lives
    inputs: list[Tensor] | None = None

    def remembered(x: Tensor) -> Tensor:
        nonlocal inputs
        inputs = []
        output = gelu(x)
        # in half precision, what gelu keeps is a copy in float32
        if len(inputs) == 1 and inputs[0].numel() == output.numel():
            key = output.untyped_storage()._cdata
            kept[key] = inputs[0].detach()
            weakref.finalize(output, kept.pop, key, None)
        inputs = None
        return output

    def pack(tensor: Tensor) -> Any:
        if inputs is not None:
            inputs.append(tensor)
            return tensor
        source = kept.get(tensor.untyped_storage()._cdata)
        if source is None or tensor.numel() != source.numel() or not tensor.is_contiguous():
            return tensor
        return source, tensor.dtype, tensor.shape

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        source, dtype, shape = packed
        with torch.no_grad():
            return gelu(source).to(dtype).view(shape)

    with _replaced(_gelus(model, remembered)), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


@contextmanager
def perturbed(model: nn.Module, perturbation: Tensor, place: str, lookup: Tensor | None = None) -> Iterator[None]:
    """Add ``perturbation`` to the embeddings of the one forward that runs inside the block.

    Args:
        perturbation: [B, T, C], float32; gradients reach it.
        place: "token" or "input" (the table above).
        lookup: [B, T, C], what another pass looked up for the same tokens, to be used again: the gradient of the
            table, which is as large as the table, is then made once for both passes.
    Raises:
        RuntimeError: the block's forward did not pass the perturbed module exactly once.
    """
    calls = 0

    def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        # the sum is taken in the wider precision of the two and rounded once
        return (output + perturbation).to(output.dtype)

    encoder = _encoder(model)
    handles = [getattr(encoder, _MODULES[place]).register_forward_hook(add)]
    if lookup is not None:  # before the sum
        handles.append(encoder.embed_tokens.register_forward_hook(lambda *_: lookup, prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if calls != 1:
        raise RuntimeError(f"the perturbation entered the forward {calls} times instead of once")


# --- the change carried along ----------------------------------------------------------------------
#
# The difference of two outputs is rounding when the perturbation is small for the precision. So a forward
# carries the change of every activation beside its value, over the perturbation's size s, at which nothing
# underflows: torch's forward-mode differentiation holds the pair. With s = 0 the change is J d, to first order;
# with s > 0 it is (f(x + s d) - f(x)) / s, whose second order enters where two changes meet (attention's
# products) and in the nonlinear functions, which take their difference in float64.
#
# To first order some of torch's kernels do not go along: LayerNorm's tangent overflows in float16 and cannot
# be differentiated once more (its formula holds mean and deviation fixed), neither can the softmax inside
# attention, and a linear layer's tangent also multiplies by the weights' tangent, which is 0. These are
# written out, with sums in float32. What is done entry by entry or along a row, LayerNorm, softmax and gelu,
# keeps its inputs alone for the gradient and is computed again.

_Formula = Callable[..., tuple[Tensor, Tensor]]  # (value, change, ...) -> (result, its change)


def _difference(function: Callable[..., Tensor], ordinary: Callable[..., Tensor], size: float) -> _Formula:
    """The formula of ``ordinary``, which is ``function`` up to rounding, for changes over ``size``."""

    def formula(value: Tensor, change: Tensor, *parameters: Any) -> tuple[Tensor, Tensor]:
        # one copy each, where the two gradients, nearly opposite and as large as 1 / size, meet
        wide, *others = (x.double() if isinstance(x, Tensor) else x for x in (value, *parameters))
        moved = function(wide + size * change.double(), *others) - function(wide, *others)
        return ordinary(value, *parameters), (moved / size).to(value.dtype)

    return formula


def _dual(formula: _Formula, ordinary: Callable[..., Tensor], differentiable: bool) -> Any:
    """``ordinary`` for tensors that may carry a change, by ``formula``.

    Where the change need not be differentiable, the value keeps what it ordinarily does.
    """

    def apply(x: Tensor, *parameters: Any) -> Tensor:
        value, change = forward_ad.unpack_dual(x)
        if change is None:
            return ordinary(x, *parameters)
        if differentiable:
            arguments = (value, change, *parameters)
            pair = checkpoint(formula, *arguments, use_reentrant=False, preserve_rng_state=False)
            return forward_ad.make_dual(*pair)
        with torch.no_grad():
            _, moved = formula(value, change, *parameters)
        return forward_ad.make_dual(ordinary(value, *parameters), moved)

    return apply


def _widened(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def _layer_norm_change(
    value: Tensor, change: Tensor, weight: Tensor, bias: Tensor, module: Any
) -> tuple[Tensor, Tensor]:
    wide, moved = _widened(value, change)
    variance, mean = torch.var_mean(wide, dim=-1, keepdim=True, correction=0)
    scale = torch.rsqrt(variance + module.eps)
    normal = (wide - mean) * scale
    moved = moved - moved.mean(dim=-1, keepdim=True)
    moved = scale * (moved - normal * (normal * moved).mean(dim=-1, keepdim=True)) * weight
    return (normal * weight + bias).to(value.dtype), moved.to(value.dtype)


def _layer_norm(value: Tensor, weight: Tensor, bias: Tensor, module: Any) -> Tensor:
    return nn.functional.layer_norm(value, module.normalized_shape, weight, bias, module.eps)


def _normalized(layer_norm: Callable[..., Tensor], module: Any, x: Tensor) -> Tensor:
    return layer_norm(x, module.weight, module.bias, module)


def _softmax_change(value: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    wide, moved = _widened(value, change)
    shares = torch.softmax(wide, dim=-1)
    moved = shares * (moved - (shares * moved).sum(dim=-1, keepdim=True))
    return shares.to(value.dtype), moved.to(value.dtype)


def _softmax(value: Tensor) -> Tensor:
    return torch.softmax(value, dim=-1)


def _gelu_change(value: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    wide, moved = _widened(value, change)
    slope = torch.special.ndtr(wide) + wide * torch.exp(-wide.square() / 2) / math.sqrt(2 * math.pi)
    return gelu(value), (slope * moved).to(value.dtype)


def _linear(module: Any, x: Tensor) -> Tensor:
    value, change = forward_ad.unpack_dual(x)
    result = nn.functional.linear(value, module.weight, module.bias)
    return result if change is None else forward_ad.make_dual(result, nn.functional.linear(change, module.weight))


def _product(first: Tensor, second: Tensor, size: float) -> Tensor:
    """``first @ second``, where both may carry a change over ``size``."""
    (value, change), (other, moved) = forward_ad.unpack_dual(first), forward_ad.unpack_dual(second)
    if change is None or moved is None:
        return first @ second
    end = value + size * change if size else value
    return forward_ad.make_dual(value @ other, change @ other + end @ moved)


def _self_attention(
    module: Any,
    softmax: Callable[..., Tensor],
    size: float,
    query: Tensor,
    key: Any = None,
    value: Any = None,
    key_padding_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Self-attention as in fairseq's MultiheadAttention; [T, B, C] -> [T, B, C]."""
    length, batch, channels = query.shape

    def heads(x: Tensor) -> Tensor:  # [T, B, C] -> [B, H, T, C / H]
        return x.reshape(length, batch, module.num_heads, -1).permute(1, 2, 0, 3)

    q, k, v = (heads(project(query)) for project in (module.q_proj, module.k_proj, module.v_proj))
    scores = _product(q * module.scaling, k.transpose(-2, -1), size)
    if key_padding_mask is not None:
        scores = scores.masked_fill(key_padding_mask.bool()[:, None, None, :], float("-inf"))
    shares = nn.functional.dropout(softmax(scores), module.dropout_module.p, module.training)
    return module.out_proj(_product(shares, v, size).permute(2, 0, 1, 3).reshape(length, batch, channels)), None


@contextmanager
def _written_out(model: nn.Module, size: float, differentiable: bool) -> Iterator[None]:
    """Run a block with every module of the model whose change, over ``size``, torch does not give written out.

    Without ``differentiable`` changes, all keep for the values' gradient what they ordinarily do.
    """

    def written(function: Any, first_order: Any, ordinary: Any) -> Any:
        return _dual(_difference(function, ordinary, size) if size else first_order, ordinary, differentiable)

    layer_norm = written(_layer_norm, _layer_norm_change, _layer_norm)
    softmax = written(_softmax, _softmax_change, _softmax)
    replacements = _gelus(model, written(nn.functional.gelu, _gelu_change, gelu))
    for module in bare(model).modules():
        if isinstance(module, MultiheadAttention):
            if module.bias_k is not None or module.add_zero_attn or getattr(module, "use_xformers", False):
                raise UsageError("--smart-mode tangent does not know this model's attention; use --smart-mode finite")
            replacements.append((module, "forward", functools.partial(_self_attention, module, softmax, size)))
        elif type(module) is nn.Linear:
            replacements.append((module, "forward", functools.partial(_linear, module)))
        elif hasattr(module, "normalized_shape"):  # torch's LayerNorm or apex's
            replacements.append((module, "forward", functools.partial(_normalized, layer_norm, module)))
        other = getattr(module, "activation_fn", gelu)
        if other is not gelu and size:
            replacements.append((module, "activation_fn", written(other, None, other)))
    with _replaced(replacements):
        yield


@contextmanager
def changed(
    model: nn.Module, direction: Tensor, place: str, size: float = 0.0, leaf: list[Tensor] | None = None
) -> Iterator[list[Tensor]]:
    """Within the block, one forward of the model also yields the change of its output along ``direction``.

    The forward returns the ordinary logits f(x); the change, differentiable like they are, is in the yielded
    list: J d for size 0, and otherwise (f(x + size d) - f(x)) / size.

    Args:
        direction: d, [B, T, C]; of size 1 or so, whatever the perturbation's size.
        size: of the perturbation, or 0 for the change to first order.
        leaf: if given, the perturbed embeddings are cut off from what they were computed from, and handed out
            in this list as a leaf [B, T, C] that requires a gradient; the change is then not differentiable.
    """
    changes: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if leaf is not None:
            output = output.detach().requires_grad_()
            leaf.append(output)
        return forward_ad.make_dual(output, direction.to(output.dtype))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # taken apart here, inside a distributed wrapper, which would not let the change through
        logits, change = forward_ad.unpack_dual(output[0])
        changes.append(change)
        return (logits, *output[1:])

    handles = [
        getattr(_encoder(model), _MODULES[place]).register_forward_hook(enter),
        bare(model).register_forward_hook(leave),
    ]
    try:
        with _written_out(model, size, differentiable=leaf is None), forward_ad.dual_level():
            yield changes
    finally:
        for handle in handles:
            handle.remove()
    if len(changes) != 1 or changes[0] is None:
        raise RuntimeError("the direction did not reach the output of one forward")


class Substitute:
    """The bare model under other weights, for a pass of the ordinary criterion; nothing is copied or swapped."""

    def __init__(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        self.model, self.weights = bare(model), weights

    def __getattr__(self, name: str) -> Any:  # the model's heads and targets, for which the criterion asks
        return getattr(self.model, name)

    def __call__(self, **inputs: Any) -> Any:
        return torch.func.functional_call(self.model, self.weights, kwargs=inputs)


class Forward:
    """The classification forward of one batch, under weights and with a perturbation of one's choice.

    Passes with ``weights`` run on the bare model by `torch.func.functional_call`: the module's own code
    with other tensors in place of its parameters. Nothing is copied or swapped, and a distributed
    wrapper sees nothing of it.
    """

    def __init__(self, model: nn.Module, net_input: dict[str, Tensor], head: str, place: str) -> None:
        self.model = model
        self.inputs = {**net_input, "features_only": True, "classification_head_name": head}
        self.place = place

    def __call__(
        self,
        weights: dict[str, Tensor] | None = None,
        perturbation: Tensor | None = None,
        lookup: Tensor | None = None,
    ) -> Tensor:
        """The logits [B, K].

        Args:
            weights: parameter name -> tensor to use in its place; names left out keep the model's own.
                None runs the model as it was given, distributed wrapper included.
            perturbation: [B, T, C], or None.
            lookup: see `perturbed`.
        """
        if perturbation is not None:
            with perturbed(self.model, perturbation, self.place, lookup):
                return self(weights)
        if weights is None:
            logits, _ = self.model(**self.inputs)
        else:
            logits, _ = torch.func.functional_call(bare(self.model), weights, kwargs=self.inputs)
        return logits

    def hidden(self, weights: dict[str, Tensor], perturbation: Tensor, layers: int) -> Tensor:
        """What comes after the first ``layers`` layers, [B, T, C]; the others are not run."""
        others = list(_encoder(self.model).layers)[layers:]
        skipped = _replaced([(layer, "forward", lambda x, **_: x) for layer in others])
        with captured(self.model, self.place, layers) as found, skipped:
            self(weights, perturbation)
        return found[0]

    def products(
        self, weights: dict[str, Tensor], direction: Tensor, size: float = 0.0
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Outputs, their change along ``direction``, and the way back (cotangent -> J' cotangent).

        With size 0 all of them at the clean point x, where the change is J d. Otherwise all of them at x + size d,
        and the change is that from there back to x, over ``size``.

        Args:
            direction: d, [B, T, C].
        Returns:
            [B, K], [B, K], and a function from [B, K] to [B, T, C]; dtypes of the model.
        """
        leaf: list[Tensor] = []
        with contextlib.ExitStack() as block:
            if size:
                block.enter_context(perturbed(self.model, size * direction, self.place))
                direction = -direction
            block.enter_context(torch.enable_grad())
            change = block.enter_context(changed(self.model, direction, self.place, size, leaf))
            logits = self(weights)

        def pull_back(cotangent: Tensor) -> Tensor:
            return torch.autograd.grad(logits, leaf[0], cotangent.to(logits.dtype))[0]

        return logits, change[0], pull_back

    def frozen_weights(self) -> dict[str, Tensor]:
        """The model's own weights without their gradients: a pass under them keeps no activation for them."""
        return {name: parameter.detach() for name, parameter in bare(self.model).named_parameters()}
