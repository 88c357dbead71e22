"""A slow, literal Algorithm 1, written from the paper's definitions alone; it shares no code with the package.

Everything is spelled out example by example in float64, with the model taken as a function from embeddings
to output. Only the starting noise is handed in, because any Gaussian sample is a valid one. The first step may
follow the gradient of the linearised model f(x) + J d, with the whole Jacobian J, instead of the model's own.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def as_function_of_embeddings(model: Any, tokens: Tensor, place: str) -> Callable[[Tensor], Tensor]:
    """One example's output as a function of its embeddings, by the encoder's own parts and no hook."""
    head = model.classification_heads["sentence_classification_head"]
    encoder = model.encoder.sentence_encoder

    def from_token_embeddings(x: Tensor) -> Tensor:
        features, _ = model.encoder.extract_features(tokens[None], token_embeddings=x[None])
        return head(features)[0]

    def from_layer_input(x: Tensor) -> Tensor:
        padding = tokens[None].eq(encoder.padding_idx)
        hidden = (x * ~padding[0][:, None]).unsqueeze(1)
        for layer in encoder.layers:
            hidden = layer(hidden, encoder_padding_mask=padding if padding.any() else None)
        if encoder.layer_norm is not None:  # pre-norm
            hidden = encoder.layer_norm(hidden)
        return head(hidden.transpose(0, 1))[0]

    def from_normalized(x: Tensor) -> Tensor:
        # the own LayerNorm of s x + u, of which s and u cancel but for its epsilon
        _, deviation = before_layer_norm(model, tokens)
        own = encoder.layernorm_embedding
        centred = x - x.mean(-1, keepdim=True)
        size = (centred.square().mean(-1, keepdim=True) + own.eps / deviation**2).sqrt()
        return from_layer_input(centred / size * own.weight + own.bias)

    return {"token": from_token_embeddings, "normalized": from_normalized, "input": from_layer_input}[place]


def before_layer_norm(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What a LayerNorm without parameters makes of the sum with the positions, and by what it divides."""
    encoder = model.encoder.sentence_encoder
    x = encoder.embed_tokens(tokens) + encoder.embed_positions(tokens[None])[0]
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 1e-7).sqrt()
    return centred / deviation, deviation


def embeddings_of(model: Any, tokens: Tensor, place: str) -> Tensor:
    encoder = model.encoder.sentence_encoder
    if place == "normalized":
        return before_layer_norm(model, tokens)[0]
    return encoder.embed_tokens(tokens) if place == "token" else encoder.forward_embedding(tokens[None])[0][0]


def divergence(p_logits: Tensor, q_logits: Tensor, regression: bool) -> Tensor:
    """l_s of one example: KL(P, Q) + KL(Q, P), or (p - q)^2."""
    if regression:
        return (p_logits[0] - q_logits[0]) ** 2
    p, q = torch.softmax(p_logits, 0), torch.softmax(q_logits, 0)
    return (p * (p / q).log()).sum() + (q * (q / p).log()).sum()


def size(vector: Tensor, norm: str) -> float:
    entries = vector.flatten().tolist()
    return max(abs(x) for x in entries) if norm == "inf" else math.sqrt(sum(x * x for x in entries))


def pieces(tensor: Tensor, length: int, scope: str) -> list[Tensor]:
    """The parts of one example's [T, C] over which a norm is taken; views, so that they can be written to."""
    return [tensor[:length]] if scope == "example" else [tensor[t] for t in range(length)]


def perturb(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    length: int,
    noise: Tensor,
    *,
    radius: float,
    step_size: float,
    steps: int,
    norm: str,
    scope: str,
    projection: str,
    regression: bool,
    first_step: str = "literal",
    relative: bool = False,
) -> Tensor:
    """Lines 3 to 8 for one example: x [T, C] with ``length`` real tokens -> x~ [T, C].

    ``first_step``: "literal", or "linearised" for the gradient of l_s(f(x) + J d, f(x)) at the noise d.
    ``relative``: radius and step are shares of the embeddings' root mean square (norm "inf") or length ("l2"), the
    noise's standard deviation one of their root mean square.
    """
    clean = f(x).detach()
    lengths = [size(part, "l2") for part in pieces(x, length, scope)]
    means = [part_length / math.sqrt(part.numel()) for part_length, part in zip(lengths, pieces(x, length, scope))]
    if not relative:
        lengths = means = [1.0] * len(means)
    units = means if norm == "inf" else lengths
    x_tilde = x.clone()
    for part, n, mean in zip(pieces(x_tilde, length, scope), pieces(noise, length, scope), means):
        part += n * mean
    if first_step == "linearised":
        jacobian = torch.autograd.functional.jacobian(f, x).flatten(1)  # [K, T C]
    for step in range(steps):
        x_tilde = x_tilde.detach().requires_grad_()
        if step == 0 and first_step == "linearised":
            output = clean + jacobian @ (x_tilde - x).flatten()
        else:
            output = f(x_tilde)
        gradient = torch.autograd.grad(divergence(output, clean, regression), x_tilde)[0]
        x_tilde = x_tilde.detach()
        for part, g, unit in zip(pieces(x_tilde, length, scope), pieces(gradient, length, scope), units):
            part += step_size * unit * g / size(g, norm)
        offset = x_tilde - x
        for part, unit in zip(pieces(offset, length, scope), units):
            limit = radius * unit
            if projection == "normalize":
                part *= unit / size(part, norm)
            elif norm == "inf":
                entries = [max(-limit, min(limit, entry)) for entry in part.flatten().tolist()]
                part.copy_(torch.tensor(entries, dtype=part.dtype).view_as(part))
            elif size(part, norm) > limit:
                part *= limit / size(part, norm)
        x_tilde = x + offset
    return x_tilde


def objective(
    student: Callable[[Tensor], Tensor],
    teacher: Callable[[Tensor], Tensor],
    embeddings: list[Tensor],
    perturbed: list[Tensor],
    targets: Tensor,
    regression: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """L, R_s and D_Breg, each a mean over the examples."""
    task, smooth, bregman = [], [], []
    for x, x_tilde, target in zip(embeddings, perturbed, targets):
        output = student(x)
        if regression:
            task.append((output[0] - target) ** 2)
        else:
            task.append(-torch.softmax(output, 0)[int(target)].log())
        # x~ is held fixed, as an offset: the embedding weights below it are still trained
        smooth.append(divergence(student(x + (x_tilde - x).detach()), output, regression))
        bregman.append(divergence(output, teacher(x).detach(), regression))
    mean = lambda terms: torch.stack(terms).mean()  # noqa: E731
    return mean(task), mean(smooth), mean(bregman)
