"""fairseq's epsilon in the place of another, by a residual stream of another scale.

fairseq's RoBERTa divides by sqrt(variance + 1e-5) in every LayerNorm, `smart_bert` by sqrt(variance + eps). LayerNorm
forgets the scale of its input, apart from epsilon, so the whole residual stream is made larger by a factor s:

    LayerNorm(s x; 1e-5) = LayerNorm(x; 1e-5 / s^2)

Embeddings, the gain and bias of every LayerNorm, and whatever is added to the stream (out_proj, fc2) are
multiplied by s; what reads the stream (the weights of q, k, v and fc1) is divided by s; the last layer's final
LayerNorm keeps its gain and bias, so features and classification heads stay as they are. For eps = 1e-12, s is
2^12 and 1e-5 / s^2 = 6e-13: powers of two cost no precision in float32.

Limits: half precision. Activations are s times as large, beyond float16's 65504 in places: run exported models in
float32 or bfloat16 (float16 weights are written as float32). And the LM head: its LayerNorm follows a gelu, which does
not scale, so that one keeps fairseq's 1e-5; its gain and bias are divided by s when it shares the embeddings, which
leaves the logits as they are apart from that epsilon. Classification does not use it.
"""

import math
import re

from torch import Tensor

from .checkpoint import EMBEDDINGS, LM_HEAD, tied
from .config import FAIRSEQ_LAYER_NORM_EPS

LAYER = re.compile(r"encoder\.sentence_encoder\.layers\.(\d+)\.")
ADDED_TO_STREAM = re.compile(
    r"encoder\.sentence_encoder\.(embed_tokens|embed_positions|layernorm_embedding"
    r"|layers\.\d+\.(\w+_layer_norm|self_attn\.out_proj|fc2))\.(weight|bias)"
)
READS_STREAM = re.compile(LAYER.pattern + r"(self_attn\.[qkv]_proj|fc1)\.weight")


def stream_scale(eps: float) -> float:
    """The factor s with 1e-5 / s^2 = eps, or so close to it that the difference is lost in any variance.

    For small epsilons (up to 1e-10) the nearest power of two: multiplying by it is exact.
    """
    scale = math.sqrt(FAIRSEQ_LAYER_NORM_EPS / eps)
    return 2.0 ** round(math.log2(scale)) if eps <= 1e-10 else scale


def scale_residual_stream(model: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Multiply the residual stream of a post-norm RoBERTa by ``scale``, leaving features and heads unchanged.

    ``model``: state of fairseq's RobertaModel, float32. Tensors that do not change are shared with the new state.
    """
    lm_head_shares = tied(model)
    last = max(int(match[1]) for match in map(LAYER.match, model) if match)
    scaled = dict(model)
    for key, tensor in model.items():
        if key.startswith(f"encoder.sentence_encoder.layers.{last}.final_layer_norm."):
            continue
        if ADDED_TO_STREAM.fullmatch(key):
            scaled[key] = tensor * scale
        elif READS_STREAM.fullmatch(key) or (lm_head_shares and key.startswith("encoder.lm_head.layer_norm.")):
            scaled[key] = tensor * (1 / scale)
    if lm_head_shares:
        scaled[LM_HEAD] = scaled[EMBEDDINGS]  # one tensor in the file
    return scaled
