"""Training items per second of the RQ-VAE as it is trained here, and of a plain PyTorch loop without monitoring.

    uv run python benchmarks/quantizer_speed.py [dim=384] [batch=256]

The plain loop is what one would write first: three codebooks of 256, distances as a matrix product, straight-through
gradients, AdamW. Ours has the same dimensions and batch, and all that it does in addition to the step: the check that
gradients are finite, the schedule, k-means refits every other epoch, usage and error every ten epochs. Once with the
dimensions of our default, and once with those that public implementations have: a latent of 64, no linear path. Rounds
of both alternate; the k-means start of ours is left out, the plain loop has none.
"""

from __future__ import annotations

import sys
import time
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tiger.tokenizers.base import TokenizerConfig
from tiger.tokenizers.train import fit_tokenizer
from tiger.training.loop import Callbacks

ROUNDS, ITEMS, EPOCHS = 3, 12_101, 20


def perceptron(*widths: int) -> nn.Sequential:
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Plain(nn.Module):
    def __init__(self, dim: int, hidden: tuple[int, ...], latent: int, linear_skip: bool) -> None:
        super().__init__()
        self.encoder, self.decoder = perceptron(dim, *hidden, latent), perceptron(latent, *hidden[::-1], dim)
        self.codebooks = nn.Parameter(torch.randn(3, 256, latent))
        self.linear_skip = nn.ModuleList([nn.Linear(dim, latent), nn.Linear(latent, dim)]) if linear_skip else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.encoder(x) + (self.linear_skip[0](x) if self.linear_skip else 0)
        rest, total, loss = z, torch.zeros_like(z), torch.zeros(())
        for codebook in self.codebooks:
            code = (codebook.square().sum(1) - 2 * rest.detach() @ codebook.detach().T).argmin(1)
            chosen = codebook[code]
            loss = loss + F.mse_loss(chosen, rest.detach()) + 0.25 * F.mse_loss(rest, chosen.detach())
            total, rest = total + chosen, rest - chosen.detach()
        q = z + (total - z).detach()
        return loss + F.mse_loss(self.decoder(q) + (self.linear_skip[1](q) if self.linear_skip else 0), x)


def plain(vectors: torch.Tensor, hidden: tuple[int, ...], latent: int, batch: int, linear_skip: bool) -> float:
    model = Plain(vectors.shape[1], hidden, latent, linear_skip)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    begin = time.perf_counter()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(vectors)).split(batch):
            loss = model(vectors[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return time.perf_counter() - begin


def ours(vectors: torch.Tensor, hidden: tuple[int, ...], latent: int, batch: int, linear_skip: bool) -> float:
    """Seconds from the look before the first step to the end of training."""
    config = TokenizerConfig.resolve(
        {"hidden_dims": hidden, "latent_dim": latent, "linear_skip": linear_skip, "kmeans_iterations": 1}
        | {"training": {"epochs": EPOCHS, "batch_size": batch}}
    )
    started: list[float] = []
    hooks = Callbacks(report=lambda figures: started.append(time.perf_counter()))
    fit_tokenizer(config, vectors, device=torch.device("cpu"), hooks=hooks)
    return time.perf_counter() - started[0]


def main() -> None:
    settings = {key: int(value) for key, value in (argument.split("=", 1) for argument in sys.argv[1:])}
    dim, batch = settings.get("dim", 384), settings.get("batch", 256)
    torch.set_num_threads(2)
    vectors = torch.randn(ITEMS, dim, generator=torch.Generator().manual_seed(0))
    for hidden, latent, linear_skip in (((512, 256, 128), dim, True), ((512, 256, 128), 64, False)):
        seconds: dict[str, list[float]] = {"plain": [], "ours": []}
        for _ in range(ROUNDS):
            seconds["plain"].append(plain(vectors, hidden, latent, batch, linear_skip))
            seconds["ours"].append(ours(vectors, hidden, latent, batch, linear_skip))
        rates = {name: ITEMS * EPOCHS / np.median(values) for name, values in seconds.items()}
        ratios = np.array(seconds["plain"]) / np.array(seconds["ours"])
        print(
            f"layers {hidden}, latent {latent}, {'with' if linear_skip else 'no'} linear path: plain "
            f"{rates['plain']:,.0f}, ours {rates['ours']:,.0f} items/s; ours / plain {np.median(ratios):.2f} "
            f"({ratios.min():.2f} to {ratios.max():.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
