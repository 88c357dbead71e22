"""How fairseq's RoBERTa, and every model built on it, takes a perturbation.

``RobertaModel.forward`` accepts ``token_embeddings`` and ignores it (fairseq's R3F fell into that), so a
perturbation enters through a forward hook on the module whose output is perturbed.

| --smart-embedding | module of encoder.sentence_encoder | what is perturbed |
| --- | --- | --- |
| token | embed_tokens | the embedding lookup, before BERT's token types, positions and LayerNorm |
| input | dropout_module | what enters the first layer, after LayerNorm and dropout |
"""

from typing import Any

from .base import Encoder, Insides

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
        return Insides(places, list(inner.layers), inner.padding_idx)
