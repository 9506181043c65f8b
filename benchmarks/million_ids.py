"""Unique IDs, the trie, its answers, and whole searches for millions of items: seconds, rates and peak memory.

    uv run python benchmarks/million_ids.py [items=10000000]

Codes are drawn at random from 3 x 256, so that at 10 million items six of ten collide. Searches are by an untrained
model as published (softmax = codes) of the size `small`, 64 histories of 10 items, beams of 50.
"""

from __future__ import annotations

import resource
import sys
import time

import numpy as np
import torch

from tiger.core.config import build
from tiger.models.tiger.beam_search import beam_search
from tiger.models.tiger.config import TigerConfig
from tiger.models.tiger.model import TigerModel
from tiger.semantic_ids.assignment import SemanticIds, SemanticIdsConfig, assign
from tiger.semantic_ids.trie import Trie


def peak_gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def expand_seconds(trie: Trie, level: int, nodes: int, rounds: int = 50) -> float:
    """Median seconds to expand 32 users x 50 beams at a level, at nodes drawn at random."""
    generator = torch.Generator().manual_seed(0)
    times = []
    for _ in range(rounds):
        beams = torch.randint(0, nodes, (32, 50), generator=generator)
        begin = time.perf_counter()
        trie.expand(beams, level)
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def users_per_second(ids: SemanticIds, trie: Trie, rounds: int = 5) -> float:
    torch.manual_seed(0)
    model = TigerModel(build(TigerConfig, {"softmax": "codes"}), trie).eval()
    history = torch.from_numpy(np.random.default_rng(0).integers(0, len(ids), (64, 10)))
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        found, _ = beam_search(model, history, beam=50)
        times.append(time.perf_counter() - begin)
        assert (found >= 0).all(), "a beam that is no item"
    return len(history) / float(np.median(times))


def main() -> None:
    items = int(dict(argument.split("=", 1) for argument in sys.argv[1:]).get("items", 10_000_000))
    codes = np.random.default_rng(0).integers(0, 256, (items, 3), dtype=np.int16)
    before = peak_gigabytes()
    begin = time.perf_counter()
    ids = assign(codes, 256, SemanticIdsConfig(collision_policy="extra_code"))
    seconds = time.perf_counter() - begin
    said = f"{seconds:.1f} s, {items / seconds:,.0f} items/s, peak {peak_gigabytes():.2f} GB ({before:.2f} before)"
    print(f"unique IDs of {items:,} items: {said}")
    begin = time.perf_counter()
    trie = Trie(ids)
    seconds = time.perf_counter() - begin
    print(f"trie: {seconds:.1f} s, {items / seconds:,.0f} items/s, peak {peak_gigabytes():.2f} GB")
    few = assign(codes[:12_000], 256, SemanticIdsConfig(collision_policy="extra_code"))
    small = Trie(few)
    rates = users_per_second(few, small), users_per_second(ids, trie)
    print(
        f"searches: {rates[0]:.0f} users/s with 12,000 items, {rates[1]:.0f} with {items:,}, every result an item; "
        f"peak {peak_gigabytes():.2f} GB"
    )
    for level in range(4):
        counts = [len(each.get_buffer(f"first_child_{level}")) - 1 for each in (small, trie)]
        seconds = [expand_seconds(each, level, count) for each, count in zip((small, trie), counts, strict=True)]
        print(
            f"level {level}: {counts[0]:,} and {counts[1]:,} nodes, at most {small.max_children[level]} and "
            f"{trie.max_children[level]} children, expanding 1,600 beams "
            f"{seconds[0] * 1e3:.2f} and {seconds[1] * 1e3:.2f} ms"
        )


if __name__ == "__main__":
    main()
