"""Tokenizers on a large catalog: seconds, items a second and peak memory, each in a process of its own.

    uv run python benchmarks/large_catalog.py [items=259000] [dim=384] [epochs=4]

Vectors are drawn around 20,000 centers, as products stand around kinds of products. The RQ-VAE's epochs are fewer than
on Beauty because one has twenty times as many steps.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from typing import Any

import torch

from tiger.metrics.codes import code_metrics
from tiger.semantic_ids.assignment import SemanticIdsConfig, assign
from tiger.tokenizers.base import TokenizerConfig
from tiger.tokenizers.train import encode_dataset, fit_tokenizer

CPU = torch.device("cpu")


def measure(name: str, values: dict[str, Any], items: int, dim: int) -> None:
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(20_000, dim, generator=generator)
    vectors = centers[torch.randint(0, 20_000, (items,), generator=generator)]
    vectors += 0.7 * torch.randn(items, dim, generator=generator)
    config = TokenizerConfig.resolve(values)
    begin = time.perf_counter()
    tokenizer, result = fit_tokenizer(config, vectors, device=CPU)
    trained = time.perf_counter() - begin
    codes = encode_dataset(tokenizer, vectors, CPU).numpy()
    encoded = time.perf_counter() - begin - trained
    costs = tokenizer.assignment_costs(vectors)
    assign(codes, 256, SemanticIdsConfig(collision_policy="nearest_free", collision_codes=32_767), costs)
    assigned = time.perf_counter() - begin - trained - encoded
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figures = code_metrics(codes, 256)
    usage = " / ".join(f"{figures[f'usage@{level}']:.2f}" for level in (1, 2, 3))
    print(
        f"{name}: trained in {trained:.0f} s ({items / trained:,.0f} items/s over all), encoded in {encoded:.1f} s, "
        f"unique IDs in {assigned:.1f} s, peak {peak:.2f} GB; usage {usage}, unique {figures['unique_ratio']:.3f}, "
        f"error {result.best['reconstruction_error']:.3f}",
        flush=True,
    )


def main() -> None:
    settings = {key: int(value) for key, value in (argument.split("=", 1) for argument in sys.argv[1:])}
    items, dim, epochs = settings.get("items", 259_000), settings.get("dim", 384), settings.get("epochs", 4)
    for name, values in {
        "residual k-means": {"kind": "rkmeans"},
        "RQ-VAE": {"kind": "rqvae", "training": {"epochs": epochs, "validate_every_epochs": 1.0}},
    }.items():
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(name, values, items, dim))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{name} ended with exit code {process.exitcode}")


if __name__ == "__main__":
    main()
