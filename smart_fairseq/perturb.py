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

from contextlib import contextmanager
from typing import Any, Dict, Iterator, Optional, Tuple

import torch
from fairseq.models import BaseFairseqModel
from torch import Tensor, nn

from .errors import UsageError

__all__ = ["Forward", "bare", "embedding_weight", "perturbed", "token_mask"]

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


def token_mask(model: nn.Module, src_tokens: Tensor) -> Tensor:
    """1 at real tokens and 0 at padding: [B, T] token ids -> [B, T, 1] float32."""
    return src_tokens.ne(_encoder(model).padding_idx).unsqueeze(-1).float()


@contextmanager
def perturbed(model: nn.Module, perturbation: Tensor, place: str) -> Iterator[None]:
    """Add ``perturbation`` to the embeddings of the one forward that runs inside the block.

    Args:
        perturbation: [B, T, C], float32; gradients reach it.
        place: "token" or "input" (the table above).
    Raises:
        RuntimeError: the block's forward did not pass the perturbed module exactly once.
    """
    calls = 0

    def add(module: nn.Module, args: Tuple[Any, ...], output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        # the sum is taken in the wider precision of the two and rounded once
        return (output + perturbation).to(output.dtype)

    handle = getattr(_encoder(model), _MODULES[place]).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
    if calls != 1:
        raise RuntimeError(f"the perturbation entered the forward {calls} times instead of once")


class Forward:
    """The classification forward of one batch, under weights and with a perturbation of one's choice.

    Passes with ``weights`` run on the bare model by `torch.func.functional_call`: the module's own code
    with other tensors in place of its parameters. Nothing is copied or swapped, and a distributed
    wrapper sees nothing of it.
    """

    def __init__(self, model: nn.Module, net_input: Dict[str, Tensor], head: str, place: str) -> None:
        self.model = model
        self.inputs = {**net_input, "features_only": True, "classification_head_name": head}
        self.place = place

    def __call__(self, weights: Optional[Dict[str, Tensor]] = None, perturbation: Optional[Tensor] = None) -> Tensor:
        """The logits [B, K].

        Args:
            weights: parameter name -> tensor to use in its place; names left out keep the model's own.
                None runs the model as it was given, distributed wrapper included.
            perturbation: [B, T, C], or None.
        """
        if perturbation is not None:
            with perturbed(self.model, perturbation, self.place):
                return self(weights)
        if weights is None:
            logits, _ = self.model(**self.inputs)
        else:
            logits, _ = torch.func.functional_call(bare(self.model), weights, kwargs=self.inputs)
        return logits

    def frozen_weights(self) -> Dict[str, Tensor]:
        """The model's own weights without their gradients: a pass under them keeps no activation for them."""
        return {name: parameter.detach() for name, parameter in bare(self.model).named_parameters()}
