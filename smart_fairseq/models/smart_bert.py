"""RoBERTa whose LayerNorms take their epsilon from a flag, so that BERT's weights compute what BERT computed.

fairseq hard-codes the epsilon 1e-5 in `fairseq.modules.LayerNorm`; BERT was trained with 1e-12
(Devlin et al., 2019, `layer_norm` of the authors' `modeling.py`, by the default of TensorFlow's contrib.layers).
On MiniLM the difference alone moves the last hidden state by 2.5e-3. Everything else is fairseq's RoBERTa,
heads, hub interface and flags included; `python -m smart_fairseq.export` turns a trained
model into one of `--arch roberta`.
"""

import argparse
import math
from typing import Any

import torch
from fairseq.models import register_model, register_model_architecture
from fairseq.models.roberta.model import RobertaModel, base_architecture, roberta_large_architecture
from fairseq.utils import safe_getattr

from smart_fairseq.errors import require

BERT_LAYER_NORM_EPS = 1e-12


def set_layer_norm_eps(model: torch.nn.Module, eps: float) -> None:
    """Give every LayerNorm inside `model` the epsilon `eps`.

    Found by attribute rather than by class, because fairseq uses apex's fused LayerNorm where that is installed.
    """
    for module in model.modules():
        if hasattr(module, "normalized_shape") and hasattr(module, "eps"):
            setattr(module, "eps", eps)  # noqa: B010  to mypy, a module's attributes are modules or tensors


@register_model("smart_bert")
class SmartBertModel(RobertaModel):
    """fairseq's RoBERTa with `--smart-layer-norm-eps` in place of the hard-coded 1e-5.

    Raises `UsageError` for an epsilon that is not a positive number.
    """

    def __init__(self, args: Any, encoder: torch.nn.Module) -> None:
        super().__init__(args, encoder)
        eps = safe_getattr(args, "smart_layer_norm_eps", BERT_LAYER_NORM_EPS)
        require(math.isfinite(eps) and eps > 0, "--smart-layer-norm-eps", eps, "a positive number, such as 1e-12")
        set_layer_norm_eps(self.encoder, eps)

    @classmethod
    def hub_models(cls) -> dict[str, str]:
        # RobertaModel's archives hold checkpoints of arch roberta
        return {}

    @staticmethod
    def add_args(parser: argparse.ArgumentParser) -> None:
        RobertaModel.add_args(parser)
        about = "epsilon of every LayerNorm (default: 1e-12, BERT's)"
        parser.add_argument("--smart-layer-norm-eps", type=float, metavar="E", help=about)


@register_model_architecture("smart_bert", "smart_bert")
def smart_bert_architecture(args: Any) -> None:
    args.smart_layer_norm_eps = safe_getattr(args, "smart_layer_norm_eps", BERT_LAYER_NORM_EPS)
    base_architecture(args)


@register_model_architecture("smart_bert", "smart_bert_large")
def smart_bert_large_architecture(args: Any) -> None:
    roberta_large_architecture(args)
    smart_bert_architecture(args)


@register_model_architecture("smart_bert", "smart_bert_minilm_l6")
def smart_bert_minilm_l6_architecture(args: Any) -> None:
    for name, size in {"layers": 6, "embed_dim": 384, "ffn_embed_dim": 1536, "attention_heads": 12}.items():
        setattr(args, f"encoder_{name}", safe_getattr(args, f"encoder_{name}", size))
    smart_bert_architecture(args)
