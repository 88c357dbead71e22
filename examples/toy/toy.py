"""The paper's figure 1 on two moons: decision boundaries of plain training, PGD, R3F and SMART, in seconds.

    python examples/toy/toy.py            # prints a table and the path of the picture

A point is an "embedding" of one token with two channels, and a small network the model; the methods are those of
`smart_fairseq.method`, which know nothing of fairseq. Forty points, some on the wrong side, are few enough to overfit.
"""

import argparse
import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

# remarks on tensorboardX and on fonts, of which nothing here is
for chatty in ("fairseq.tasks.text_to_speech", "matplotlib"):
    logging.getLogger(chatty).setLevel(logging.WARNING)

from smart_fairseq.method.adversary import Adversary, ascend, away_from, gradient_of  # noqa: E402
from smart_fairseq.method.divergence import symmetric_kl  # noqa: E402
from smart_fairseq.method.loss import task_loss  # noqa: E402
from smart_fairseq.method.noise import example_noise, uniform_noise  # noqa: E402

RADIUS = 0.3
ADVERSARY = Adversary(radius=RADIUS, step_size=RADIUS, steps=2, norm="l2")
UPDATES = 400
# logits of points: [B, 1, 2] -> [B, 2]
Model = Callable[[Tensor], Tensor]


def two_moons(count: int, seed: int, spread: float = 0.25) -> tuple[Tensor, Tensor]:
    """Points [B, 1, 2] of two interleaved half circles, and their classes, int64 [B]."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(count) % 2
    angle = math.pi * torch.rand(count, generator=generator) + math.pi * classes
    points = torch.stack([angle.cos() + classes, angle.sin() + 0.5 * classes], dim=1)
    return (points + spread * torch.randn(count, 2, generator=generator))[:, None], classes


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(2, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 2))


def plain(model: Model, x: Tensor, y: Tensor, update: int) -> Tensor:
    return task_loss(model(x), y)


def pgd(model: Model, x: Tensor, y: Tensor, update: int) -> Tensor:
    """The task loss at the worst point of the ball (Madry et al. 2018)."""
    start = 0.5 * RADIUS * uniform_noise(torch.arange(len(x)), 1, 2, seed=update)
    gradient = gradient_of(lambda d: model(x + d), lambda outputs: task_loss(outputs, y))
    return task_loss(model(x + ascend(gradient, start, torch.ones(len(x), 1, 1), ADVERSARY)), y)


def r3f(model: Model, x: Tensor, y: Tensor, update: int) -> Tensor:
    """Noise as large as the others' ball must not change the output (Aghajanyan et al. 2020)."""
    noise = example_noise(torch.arange(len(x)), 1, 2, seed=update)
    noise = RADIUS * noise / noise.norm(dim=2, keepdim=True)
    logits = model(x)
    return task_loss(logits, y) + symmetric_kl(model(x + noise), logits)


def smart(model: Model, x: Tensor, y: Tensor, update: int) -> Tensor:
    """The worst perturbation in the ball must not change the output (Jiang et al. 2020, Algorithm 1)."""
    noise = 0.1 * RADIUS * example_noise(torch.arange(len(x)), 1, 2, seed=update)
    logits, mask = model(x), torch.ones(len(x), 1, 1)
    gradient = gradient_of(lambda d: model(x + d), away_from(logits, symmetric_kl))
    found = ascend(gradient, noise, mask, ADVERSARY)
    return task_loss(logits, y) + symmetric_kl(model(x + found), logits)


METHODS = {"plain": plain, "PGD": pgd, "R3F": r3f, "SMART": smart}


def train(method: str, x: Tensor, y: Tensor, updates: int = UPDATES, seed: int = 1) -> nn.Sequential:
    """A network trained on all points at once; the same start for every method."""
    model = network(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for update in range(updates):
        optimizer.zero_grad()
        METHODS[method](model, x, y, update).mean().backward()
        optimizer.step()
    return model


def accuracy(model: nn.Module, x: Tensor, y: Tensor, radius: float = 0.0) -> float:
    """In percent; with a radius, each point moved by ten steps of ascent of its loss within it."""
    if radius:
        adversary = Adversary(radius=radius, step_size=radius / 4, steps=10, norm="l2")
        gradient = gradient_of(lambda d: model(x + d), lambda outputs: task_loss(outputs, y))
        x = x + ascend(gradient, 1e-3 * torch.ones_like(x), torch.ones(len(x), 1, 1), adversary)
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).float().mean())


def picture(models: dict[str, nn.Sequential], x: Tensor, y: Tensor, path: Path) -> None:
    """Probability of class 1 over the plane, the boundary, and the training points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(models), 3.2), layout="constrained")
    across, up = torch.meshgrid(torch.linspace(-2, 3, 200), torch.linspace(-1.6, 2.1, 150), indexing="xy")
    for axes, (name, model) in zip(figure.subplots(1, len(models), sharey=True), models.items()):
        with torch.no_grad():
            grid = torch.stack([across, up], dim=2).view(-1, 1, 2)
            probability = model(grid).softmax(1)[:, 1].view(across.shape)
        axes.contourf(across, up, probability, levels=20, cmap="RdBu_r", alpha=0.7)
        axes.contour(across, up, probability, levels=[0.5], colors="black")
        axes.scatter(*x[:, 0].T, c=y, cmap="RdBu_r", edgecolors="white", s=22)
        axes.set_title(name)
        axes.set_xticks([]), axes.set_yticks([])
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("toy.png"), help="the picture (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the points to average over (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    held_out = two_moons(2000, seed=0)
    print(f"{'':8}train  held out  held out, moved by {RADIUS}  cross entropy")
    models = {}
    for name in METHODS:
        rows = []
        for seed in range(1, args.seeds + 1):
            points = two_moons(40, seed)
            model = train(name, *points, seed=seed)
            models.setdefault(name, model)
            with torch.no_grad():
                loss = float(task_loss(model(held_out[0]), held_out[1]).mean())
            rows.append(
                [accuracy(model, *points), accuracy(model, *held_out), accuracy(model, *held_out, RADIUS), loss]
            )
        means = torch.tensor(rows).mean(0).tolist()
        print(f"{name:8}{means[0]:5.1f}  {means[1]:8.1f}  {means[2]:22.1f}  {means[3]:13.2f}")
    picture(models, *two_moons(40, 1), args.out)
    print(f"means of {args.seeds} draws of 40 points; picture: {args.out}")


if __name__ == "__main__":
    main()
