"""fairseq's attention and gelu by fewer kernels, for passes of the plugin's own. They compute the same.

In each layer fairseq joins the biases of three projections and takes them apart again, makes numbers of the padding
mask, copies them for every head, and widens what gelu gets to float32 and back: nine launches of a GPU in forward and
backward that are of no use.
"""

import functools
from typing import Any

import torch
from fairseq.modules import MultiheadAttention
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from torch import Tensor, nn

from .memory import Replacement, gelu_at_once, gelus

# what fused kernels align the rows of a mask to, with a copy in each layer where they are not
_ALIGNED = 8


def known(layer: nn.Module) -> bool:
    """Whether a layer, which may get an `additive` mask, is fairseq's own, and its attention plain self-attention."""
    if getattr(type(layer), "forward", None) is not TransformerEncoderLayerBase.forward:
        return False
    attention: Any = layer.self_attn
    return (
        type(attention) is MultiheadAttention
        and attention.self_attention
        and attention.bias_k is None
        and not (attention.add_zero_attn or attention.skip_embed_dim_check or attention.onnx_trace)
        and not getattr(attention, "use_xformers", False)
    )


def lean_layer(layer: nn.Module) -> list[Replacement]:
    """For `replaced`, of a layer that is `known`."""
    attention: Any = layer.self_attn
    return [(attention, "forward", functools.partial(_self_attention, attention)), *gelus(layer, gelu_at_once)]


def additive(padding: Tensor, like: Tensor) -> Tensor:
    """What is added to the scores of attention: 0 at real tokens, minus infinity at padding.

    Args:
        padding: [B, T] bool.
        like: has the dtype in which attention works, unless autocast changes it.
    Returns:
        [B, 1, 1, T]
    """
    kind, (batch, length) = padding.device.type, padding.shape
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
    aligned = -(-length // _ALIGNED) * _ALIGNED
    mask = torch.zeros(batch, 1, 1, aligned, dtype=dtype, device=padding.device)[..., :length]
    return mask.masked_fill_(padding[:, None, None, :], float("-inf"))


def _self_attention(
    module: Any, query: Tensor, key: Any = None, value: Any = None, key_padding_mask: Tensor | None = None, **_: Any
) -> tuple[Tensor, None]:
    """As fairseq's MultiheadAttention without weights; [T, B, C] -> [T, B, C]. The mask may be an `additive` one."""
    length, batch, channels = query.shape
    if key_padding_mask is not None and key_padding_mask.dim() == 2:
        key_padding_mask = additive(key_padding_mask.bool(), query)

    def heads(projection: nn.Linear) -> Tensor:  # [T, B, C] -> [B, H, T, C / H]
        projected = nn.functional.linear(query, projection.weight, projection.bias)
        return projected.view(length, batch, module.num_heads, -1).permute(1, 2, 0, 3)

    q, k, v = heads(module.q_proj), heads(module.k_proj), heads(module.v_proj)
    drops = module.training or module.dropout_module.apply_during_inference
    share = module.dropout_module.p if drops else 0.0
    attended = nn.functional.scaled_dot_product_attention(q, k, v, key_padding_mask, share)
    attended = attended.permute(2, 0, 1, 3).reshape(length, batch, channels)
    return nn.functional.linear(attended, module.out_proj.weight, module.out_proj.bias), None
