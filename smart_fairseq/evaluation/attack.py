"""Attacks in embedding space: projected gradient ascent from a random start, in units of each example's embeddings.

| source | here |
| --- | --- |
| Madry et al. (2018), section 2.1 | signed steps in a ball of norm inf, a random start, the worst point seen counts |
| Jiang et al. (2020), section 3.1 | the divergence that is ascended for R_s, and the place: the embedding lookup |

A perturbation is d = r u with r the root mean square of the example's own embeddings over its real tokens, so the ball
|u| <= 0.1 is 10 % of the embeddings' size whatever the model. Start and random signs belong to the example, not to the
batch. Each radius begins at the worst point of the one before, which lies in its ball: damage can only grow.

Temperature: signed steps see of the logits the direction of the gradient in them alone. With two classes that is
(1, -1) at any temperature, with more it leans to other classes: on a model of five, with gaps of 6 between logits, T
from 0.1 to 3 moved the cross entropy under attack by less than 5 %. Beyond a gap of 17 float32 rounds the gold class's
part away, and with it the direction. So damage is that of the calibrated logits / T.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..encoder import Forward, encoder_of
from ..inference import Model
from ..method.adversary import Adversary, LogitsFn, ascend, away_from, gradient_of
from ..method.divergence import Divergence, squared_error, symmetric_kl
from ..method.loss import task_loss
from ..method.noise import example_noise
from ..method.relative import unit_of
from ..progress import Progress

STEPS = 10
PLACE = "token"
KINDS = ("loss", "divergence")  # of damage


def worst_point(
    outputs_fn: LogitsFn,
    clean: Tensor,
    damage: Divergence,
    start: Tensor,
    mask: Tensor,
    radius: float,
) -> tuple[Tensor, Tensor]:
    """The point with the largest damage on the way of the ascent.

    Args:
        outputs_fn: u [B, T, C] -> outputs [B, K], differentiable.
        clean: [B, K], outputs at u = 0.
        damage: of outputs and clean ones, one number per example.
        start: [B, T, C] within the ball, where the way begins.
        mask: [B, T, 1], 1 at real tokens, 0 at padding, which is never perturbed.
        radius: of the ball of norm inf around 0; a step is 2.5 radius / `STEPS`, so the far side can be reached.
    Returns:
        u [B, T, C] and the outputs there [B, K], detached.
    """
    seen: list[Tensor] = []

    def noted(point: Tensor) -> Tensor:
        outputs = outputs_fn(point)
        here = [damage(outputs.detach(), clean), point.detach(), outputs.detach()]
        better = here[0] > seen[0] if seen else torch.ones_like(here[0], dtype=torch.bool)
        before = seen or here
        seen[:] = [torch.where(better.view(-1, *[1] * (n.dim() - 1)), n, b) for n, b in zip(here, before)]
        return outputs

    adversary = Adversary(radius=radius, step_size=2.5 * radius / STEPS, steps=STEPS, signed=True)
    last = ascend(gradient_of(noted, away_from(clean, damage)), start, mask, adversary)
    with torch.no_grad():
        noted(last)
    return seen[1], seen[2]


def attack(
    forward: Forward,
    tokens: Tensor,
    ids: Tensor,
    gold: Tensor,
    radii: Sequence[float],
    temperature: float = 1.0,
    seed: int = 1,
    kinds: Sequence[str] = KINDS,
) -> dict[str, Tensor]:
    """One batch under attack; its model must be in evaluation mode.

    Args:
        tokens: int64 [B, T], those of ``forward``.
        ids: int64 [B], the examples' numbers, to which the random start belongs.
        gold: the classes, int64 [B], or targets [B, 1] of a regression.
        radii: rising, as shares of r.
        temperature: by which logits are divided before damage is measured.
        kinds: of damage.
    Returns:
        Outputs by radius, [R, B, K] each: ``loss`` and ``divergence`` (from the clean outputs) at the worst points that
        were found for them, ``random`` at random corners of the ball.
    """
    encoder, weights = forward.encoder, forward.encoder.frozen_weights()
    mask = encoder.mask(tokens)
    with torch.no_grad(), encoder.captured(PLACE) as entered:
        clean = forward(weights).float()
    scale = unit_of(entered[0], mask, Adversary())
    noise = example_noise(ids, mask.shape[1], entered[0].shape[2], seed=seed) * mask

    def outputs_fn(point: Tensor) -> Tensor:
        return forward(weights, scale * point).float()

    def loss(outputs: Tensor, _: Tensor) -> Tensor:
        return task_loss(outputs if gold.is_floating_point() else outputs / temperature, gold)

    def divergence(outputs: Tensor, reference: Tensor) -> Tensor:
        if gold.dim() == 2:
            return squared_error(outputs, reference)
        return symmetric_kl(outputs / temperature, reference / temperature)

    damages: dict[str, Divergence] = {"loss": loss, "divergence": divergence}
    found = {}
    for kind in kinds:
        point = radii[0] * torch.erf(noise / math.sqrt(2))  # uniform in the first ball
        outputs = []
        for radius in radii:
            point, reached = worst_point(outputs_fn, clean, damages[kind], point, mask, radius)
            outputs.append(reached)
        found[kind] = torch.stack(outputs)
    with torch.no_grad():
        found["random"] = torch.stack([outputs_fn(radius * noise.sign()) for radius in radii])
    return found


def attacked_outputs(
    model: Model,
    split: str,
    gold: np.ndarray,
    chosen: np.ndarray,
    temperature: float,
    max_tokens: int,
    seed: int,
    radii: Sequence[float],
    kinds: Sequence[str] = KINDS,
) -> dict[str, np.ndarray]:
    """The ``chosen`` rows (bool [N]) of a split under attack: the kinds and random, each [radii, N, K].

    ``gold``: classes int64 [N], or targets [N] of a regression. Rows that were not chosen are nan.
    """
    encoder = encoder_of(model.model)
    found = {name: np.full((len(radii), len(gold), model.task.num_classes), np.nan) for name in (*kinds, "random")}
    progress = Progress(int(chosen.sum()), f"{model.task.name} {split} under attack")
    targets = torch.from_numpy(gold[:, None].astype(np.float32) if model.task.regression else gold)
    for rows, sample in model.samples(split, max_tokens, np.flatnonzero(chosen)):
        forward = Forward(encoder, model.model, sample["net_input"], model.head, PLACE)
        tokens, numbers = sample["net_input"]["src_tokens"], torch.tensor(rows)
        ids, answers = numbers.to(tokens.device), targets[numbers].to(tokens.device)
        result = attack(forward, tokens, ids, answers, radii, temperature, seed=seed, kinds=kinds)
        for name, outputs in found.items():
            outputs[:, rows] = result[name].cpu().numpy()
        progress.advance(len(rows))
    progress.close(" attacked")
    return found
