"""BERT (Devlin et al., 2019): fairseq's RoBERTa with the three things that it leaves out.

- **Token types.** The second text of a pair, [CLS] a [SEP] b [SEP], is what stands behind the first separator, which is
  how fairseq's `sentence_prediction` joins the two with --init-token 0 and without --separator-token. A type is added
  to each looked-up embedding, behind the lookup that is perturbed and before positions and LayerNorm, as BERT does.
- **The pooler**, BERT's dense layer and tanh over [CLS], is the first layer of fairseq's classification head: a head
  that a checkpoint does not hold starts from the pooler that the checkpoint does.
- **The epsilon** of LayerNorm, 1e-12 (the authors' `modeling.py`, by the default of TensorFlow's contrib.layers), where
  fairseq hard-codes 1e-5 in `fairseq.modules.LayerNorm`. On MiniLM that alone moves the last hidden state by 2.5e-3.

A checkpoint without token types, such as a RoBERTa's of another epsilon or one that this package imported before it
knew them, stays the model that it is: no parameter is added to it. Heads, hub interface and flags are fairseq's;
`python -m smart_fairseq.export` says what of a trained model plain fairseq can hold.
"""

import argparse
import contextlib
import logging
import math
from typing import Any

import torch
from fairseq.models import register_model, register_model_architecture
from fairseq.models.roberta.model import (
    RobertaClassificationHead,
    RobertaEncoder,
    RobertaModel,
    base_architecture,
    roberta_large_architecture,
)
from fairseq.models.transformer import TransformerEncoder
from fairseq.modules.transformer_sentence_encoder import init_bert_params
from fairseq.utils import safe_getattr
from omegaconf import OmegaConf, open_dict
from torch import Tensor, nn

from smart_fairseq.errors import require

logger = logging.getLogger(__name__)

BERT_LAYER_NORM_EPS = 1e-12


def in_second_text(src_tokens: Tensor, separator: int) -> Tensor:
    """Whether a token stands behind the first separator of its row: [B, T] ids -> [B, T] bool.

    Padding behind the only separator counts; nothing is computed from it.

    >>> in_second_text(torch.tensor([[0, 5, 2, 6, 2], [0, 5, 6, 7, 2]]), 2).int().tolist()
    [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    """
    ends = src_tokens.eq(separator)
    return ends.cumsum(dim=1).gt(ends)


class BertSentenceEncoder(TransformerEncoder):
    """fairseq's encoder with ``token_types``, [2, C]: a row for each text of a pair; None where it goes without."""

    token_types: nn.Parameter | None

    def __init__(self, args: Any, dictionary: Any, embed_tokens: nn.Module) -> None:
        super().__init__(args, dictionary, embed_tokens)
        # zeros: nothing is drawn for it, so that all else starts as it does without
        self.token_types = nn.Parameter(torch.zeros(2, args.encoder_embed_dim))

    def forward_embedding(self, src_tokens: Tensor, token_embedding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lookup = self.embed_tokens(src_tokens) if token_embedding is None else token_embedding
        if self.token_types is not None:
            first, second = self.token_types
            lookup = lookup + torch.where(in_second_text(src_tokens, self.dictionary.eos())[..., None], second, first)
        return super().forward_embedding(src_tokens, lookup)  # type: ignore[no-any-return]

    def upgrade_state_dict_named(self, state_dict: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        if self.token_types is not None and f"{name}.token_types" not in state_dict:
            self.token_types = None  # before there is an optimizer: fairseq builds it after loading
            logger.info(
                "the checkpoint holds no token types, and the model goes without: separators alone tell the texts of a "
                "pair apart (for BERT's types, import the encoder again)"
            )
        return super().upgrade_state_dict_named(state_dict, name)  # type: ignore[no-any-return]


def never_trained(pooler_bias: Tensor) -> bool:
    """Whether BERT's pooler is as it was drawn, with biases [C] of 0, as in encoders made to be averaged."""
    return not pooler_bias.any()


class BertEncoder(RobertaEncoder):
    """fairseq's RoBERTa encoder around `BertSentenceEncoder`."""

    def build_encoder(self, args: Any, dictionary: Any, embed_tokens: nn.Module) -> nn.Module:
        encoder = BertSentenceEncoder(args, dictionary, embed_tokens)
        encoder.apply(init_bert_params)
        return encoder


@register_model("smart_bert")
class SmartBertModel(RobertaModel):
    """fairseq's RobertaModel with BERT's token types, pooler, and `--smart-layer-norm-eps`.

    Raises `UsageError` for an epsilon that is not a positive number.
    """

    def __init__(self, args: Any, encoder: nn.Module) -> None:
        super().__init__(args, encoder)
        eps = safe_getattr(args, "smart_layer_norm_eps", BERT_LAYER_NORM_EPS)
        require(math.isfinite(eps) and eps > 0, "--smart-layer-norm-eps", eps, "a positive number, such as 1e-12")
        for module in self.encoder.modules():
            # not by class: fairseq uses apex's fused LayerNorm where that is installed
            if hasattr(module, "normalized_shape") and hasattr(module, "eps"):
                module.eps = eps
        self.pooler: dict[str, Tensor] = {}  # weight [C, C] and bias [C], once a checkpoint brought them

    @classmethod
    def build_model(cls, args: Any, task: Any) -> "SmartBertModel":
        if safe_getattr(getattr(task, "cfg", None), "separator_token") is not None:
            logger.warning(
                "--separator-token puts a second [SEP] between the texts of a pair, where BERT has one; leave it out"
            )
        with open_dict(args) if OmegaConf.is_config(args) else contextlib.nullcontext():
            base_architecture(args)
            if safe_getattr(args, "max_positions") is None:
                args.max_positions = safe_getattr(args, "tokens_per_sample") or task.max_positions()
            return cls(args, BertEncoder(args, task.source_dictionary))

    @classmethod
    def hub_models(cls) -> dict[str, str]:
        # RobertaModel's archives hold checkpoints of arch roberta
        return {}

    @staticmethod
    def add_args(parser: argparse.ArgumentParser) -> None:
        RobertaModel.add_args(parser)
        about = "epsilon of every LayerNorm (default: 1e-12, BERT's)"
        parser.add_argument("--smart-layer-norm-eps", type=float, metavar="E", help=about)

    def register_classification_head(
        self, name: str, num_classes: int | None = None, inner_dim: int | None = None, **kwargs: Any
    ) -> None:
        super().register_classification_head(name, num_classes, inner_dim, **kwargs)
        self._start_from_pooler(name)

    def upgrade_state_dict_named(self, state_dict: dict[str, Tensor], name: str) -> None:
        start = f"{name}." if name else ""
        pooler = f"{start}pooler."
        keys = [key for key in state_dict if key.startswith(pooler)]
        self.pooler = {key.removeprefix(pooler): state_dict.pop(key) for key in keys} or self.pooler
        for head in self.classification_heads:
            if f"{start}classification_heads.{head}.dense.weight" not in state_dict:
                self._start_from_pooler(head)
        super().upgrade_state_dict_named(state_dict, name)  # gives the state what those heads hold

    def _start_from_pooler(self, head: str) -> None:
        """Of fairseq's own heads alone: what another kind of head calls ``dense`` is no pooler."""
        found: Any = self.classification_heads[head]
        known = isinstance(found, RobertaClassificationHead)
        if self.pooler and known and found.dense.weight.shape == self.pooler["weight"].shape:
            found.dense.load_state_dict(self.pooler)
            untrained = " (never trained: its biases are 0)" if never_trained(self.pooler["bias"]) else ""
            logger.info(f"the classification head {head} starts from BERT's pooler{untrained}")


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
