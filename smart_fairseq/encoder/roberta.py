"""How fairseq's RoBERTa, and every model built on it, takes a perturbation.

``RobertaModel.forward`` accepts ``token_embeddings`` and ignores it (fairseq's R3F fell into that), so a
perturbation enters through a hook on one of these modules.

| --smart-embedding | module of encoder.sentence_encoder | what is perturbed |
| --- | --- | --- |
| token | embed_tokens | the embedding lookup, before BERT's token types, positions and LayerNorm |
| normalized | layernorm_embedding | the sum with positions and token types, as SiFT normalises it (`place`) |
| input | dropout_module | what enters the first layer, after LayerNorm and dropout |
"""

import functools
from functools import cached_property
from typing import Any

from fairseq.models.transformer.transformer_encoder import TransformerEncoderBase
from torch import Tensor, nn

from .base import Encoder, Insides
from .lean import additive, known, lean_layer
from .memory import Replacement

_PLACES = {"token": "embed_tokens", "input": "dropout_module"}


class RobertaEncoder(Encoder):
    """RoBERTa, XLM-R and BERT as fairseq has them."""

    @classmethod
    def fits(cls, model: Any) -> bool:
        inner = getattr(getattr(model, "encoder", None), "sentence_encoder", None)
        return inner is not None and all(hasattr(inner, name) for name in (*_PLACES.values(), "layers"))

    def find_insides(self) -> Insides:
        inner: Any = self.model.encoder.sentence_encoder
        places = {place: getattr(inner, name) for place, name in _PLACES.items()}
        if getattr(inner, "layernorm_embedding", None) is not None:
            places["normalized"] = inner.layernorm_embedding
        # with --encoder-layerdrop a walk through the layers themselves leaves some out
        return Insides(places, list(inner.layers.children()), inner.padding_idx)

    def resting(self, head: str) -> list[str]:
        chosen = self.model.classification_heads[head]
        parts = (self.model.encoder.sentence_encoder, chosen, *getattr(chosen, "borrowed", ()))
        used = {id(weight) for part in parts for weight in part.parameters()}
        return [name for name, w in self.model.named_parameters() if w.requires_grad and id(w) not in used]

    @property
    def lm_head(self) -> nn.Module:
        head: nn.Module | None = getattr(self.model.encoder, "lm_head", None)
        return super().lm_head if head is None else head

    @cached_property
    def lean_parts(self) -> dict[nn.Module, list[Replacement]]:
        inner: Any = self.model.encoder.sentence_encoder
        if type(inner).forward_scriptable is not TransformerEncoderBase.forward_scriptable:
            return {}
        all_known = all(known(layer) for layer in self.insides.layers)
        layers = self.insides.layers if all_known else []
        parts: dict[nn.Module, list[Replacement]] = {layer: lean_layer(layer) for layer in layers}
        parts[inner] = [(inner, "forward_scriptable", functools.partial(_encode, inner, all_known))]
        return parts


def _encode(
    inner: Any,
    lean_layers: bool,
    src_tokens: Tensor,
    src_lengths: Tensor | None = None,
    return_all_hiddens: bool = False,
    token_embeddings: Tensor | None = None,
) -> dict[str, Any]:
    """fairseq's `TransformerEncoderBase.forward_scriptable` without a question to the device at each layer.

    It asks whether there is padding. Off the CPU the mask is used without asking; it masks nothing where there is none.

    Args:
        lean_layers: they take an `additive` mask, which is made once for all of them.
    """
    if return_all_hiddens:
        return type(inner).forward_scriptable(  # type: ignore[no-any-return]
            inner, src_tokens, src_lengths, return_all_hiddens, token_embeddings
        )
    padding = src_tokens.eq(inner.padding_idx)
    x, embedding = inner.forward_embedding(src_tokens, token_embeddings)
    mask = None
    if src_tokens.device.type != "cpu" or padding.any():
        mask = additive(padding, x) if lean_layers else padding
        x = x.masked_fill(padding.unsqueeze(-1), 0)
    x = x.transpose(0, 1)
    for layer in inner.layers:
        output = layer(x, encoder_padding_mask=mask)
        x = output[0] if isinstance(output, tuple) else output
    if inner.layer_norm is not None:
        x = inner.layer_norm(x)
    return {"encoder_out": [x], "encoder_padding_mask": [padding], "encoder_embedding": [embedding]}
