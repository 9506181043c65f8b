"""All quantizers and options on one set of embeddings, several seeds each: a Markdown table.

    uv run python benchmarks/quantizers.py data.path=../shared/data/amazon-beauty [seeds=3] [first_seed=0]
        [only=REGEX] [threads=2]

`unique` is the share of distinct tuples of nearest codes, `error` the reconstruction error relative to the variance;
`moved` is the error after `semantic_ids.collision_policy = nearest_free` has made every tuple unique. `overlap` is the
share of an item's ten nearest neighbors (cosine) with the same first code, and with the same first two. Means over
seeds, with the least and the largest where they differ; `objective` is that of `jobs.tune` with its default weights.
"""

from __future__ import annotations

import re
import sys
import time
from typing import Any

import numpy as np
import torch

from tiger.core.config import load
from tiger.embedding.vectors import load_embeddings
from tiger.metrics.codes import code_metrics, gini, nearest_neighbors, neighbor_prefix_agreement
from tiger.pipeline.embed import embed
from tiger.pipeline.prepare import prepare
from tiger.run import CONFIGS, RunConfig
from tiger.semantic_ids.assignment import SemanticIdsConfig, assign, packed
from tiger.tokenizers.base import TokenizerConfig
from tiger.tokenizers.train import encode_dataset, fit_tokenizer
from tiger.tuning import Weights, judge

CPU = torch.device("cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "residual k-means, Euclidean": {"kind": "rkmeans", "distance": "euclidean"},
    "residual k-means, mixed": {"kind": "rkmeans", "distance": "mixed"},
    "residual k-means, cosine": {"kind": "rkmeans", "distance": "cosine"},
    "residual k-means, cosine, Sinkhorn last level": {"kind": "rkmeans", "sinkhorn_last_level": True},
    "OPQ": {"kind": "opq"},
    "**RQ-VAE, the default**": {},
    "RQ-VAE, Euclidean": {"distance": "euclidean"},
    "RQ-VAE, mixed": {"distance": "mixed"},
    "RQ-VAE, codebooks by gradient alone": {"codebook_update": "gradient", "reset_dead_codes": False},
    "RQ-VAE, gradient and dead-code reset": {"codebook_update": "gradient"},
    "RQ-VAE, EMA codebooks": {"codebook_update": "ema"},
    "RQ-VAE, rotation trick": {"gradient_estimator": "rotation"},
    "RQ-VAE, Sinkhorn last level": {"sinkhorn_last_level": True},
    "RQ-VAE, reconstruction averaged over dimensions": {"reconstruction_reduction": "mean"},
    "RQ-VAE, latent 128": {"latent_dim": 128},
    "RQ-VAE, layers 256-128": {"hidden_dims": (256, 128)},
    "RQ-VAE, layers 512-256, latent 256, commitment 0.35 (the winner of an earlier sweep)": {
        "hidden_dims": (512, 256), "latent_dim": 256, "commitment_weight": 0.3526760100985247,
        "training": {"learning_rate": 0.0010098324695192984},
    },
    "RQ-VAE, dropout 0.1": {"dropout": 0.1},
    "RQ-VAE, commitment 1": {"commitment_weight": 1.0},
    "RQ-VAE, no linear path": {"linear_skip": False, "distance": "mixed"},
    "RQ-VAE, no linear path, latent 64, gradient alone": {
        "linear_skip": False, "latent_dim": 64, "codebook_update": "gradient", "reset_dead_codes": False,
        "distance": "euclidean",
    },
}  # fmt: skip


def measure(values: dict[str, Any], vectors: torch.Tensor, neighbors: Any, seed: int) -> dict[str, float]:
    config = TokenizerConfig.resolve(values | {"seed": seed})
    begin = time.perf_counter()
    tokenizer, result = fit_tokenizer(config, vectors, device=CPU)
    seconds = time.perf_counter() - begin
    codes = encode_dataset(tokenizer, vectors, CPU).numpy()
    found = code_metrics(codes, config.codebook_size) | neighbor_prefix_agreement(codes, neighbors)
    for level in range(config.num_levels):
        found[f"gini@{level + 1}"] = gini(np.bincount(codes[:, level], minlength=config.codebook_size))
    found["largest"] = int(np.unique(packed(codes), return_counts=True)[1].max())
    moved = assign(
        codes,
        config.codebook_size,
        SemanticIdsConfig(collision_policy="nearest_free"),
        tokenizer.assignment_costs(vectors),
    )
    errors = tokenizer.errors(vectors, torch.from_numpy(moved.codes[:, : moved.levels]).long())
    found["moved"] = float(errors.mean()) / vectors.shape[1]
    found |= {"error": result.best["reconstruction_error"], "seconds": seconds}
    return found | judge(Weights(), neighbors)(codes, result.best)


def main() -> None:
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
    first, threads = int(settings.pop("first_seed", "0")), int(settings.pop("threads", "2"))
    seeds, only = int(settings.pop("seeds", "3")), re.compile(settings.pop("only", ""))
    run = load(RunConfig, settings.pop("config", "beauty-cpu"), [f"{k}={v}" for k, v in settings.items()], CONFIGS)
    vectors = load_embeddings(embed(run, prepare(run)).folder)
    neighbors = nearest_neighbors(vectors.numpy())
    torch.set_num_threads(threads)
    print(f"{len(vectors):,} vectors of {vectors.shape[1]} dimensions, {seeds} seeds from {first}, {threads} threads\n")
    print("| quantizer | usage | Gini | unique | largest group | error | moved | overlap | objective | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, values in VARIANTS.items():
        if not only.search(name):
            continue
        runs = [measure(values, vectors, neighbors, seed) for seed in range(first, first + seeds)]

        def mean(key: str, digits: int, runs: list[dict[str, float]] = runs) -> str:
            found = [run[key] for run in runs]
            low, value, high = (f"{x:.{digits}f}" for x in (min(found), float(np.mean(found)), max(found)))
            return value if low == high else f"{value} ({low} to {high})"

        levels = [level for level in range(1, 9) if f"usage@{level}" in runs[0]]
        cells = [
            " / ".join(f"{np.mean([run[f'usage@{level}'] for run in runs]):.2f}" for level in levels),
            " / ".join(f"{np.mean([run[f'gini@{level}'] for run in runs]):.2f}" for level in levels),
            mean("unique_ratio", 3),
            mean("largest", 0),
            mean("error", 3),
            mean("moved", 3),
            f"{mean('overlap@1', 3)}; {mean('overlap@2', 3)}",
            mean("objective", 3),
            mean("seconds", 0),
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
