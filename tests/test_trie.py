from __future__ import annotations

import numpy as np
import torch
from conftest import random_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from tiger.semantic_ids.assignment import SemanticIds
from tiger.semantic_ids.trie import Trie


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), items=st.integers(1, 80))
def test_children_are_exactly_the_codes_that_follow(seed: int, items: int) -> None:
    """Walks the whole tree and compares every node with the set of prefixes."""
    ids = random_ids(np.random.default_rng(seed), items, (5, 4, 6))
    trie = Trie(ids)
    rows = [tuple(row.tolist()) for row in ids.codes]
    frontier: dict[int, tuple[int, ...]] = {0: ()}
    for level in range(3):
        following: dict[int, tuple[int, ...]] = {}
        for node, prefix in frontier.items():
            children, codes, exists = trie.expand(torch.tensor([node]), level)
            found = {int(c): int(k) for c, k, e in zip(children[0], codes[0], exists[0], strict=True) if e}
            assert set(found.values()) == {row[level] for row in rows if row[:level] == prefix}
            following |= {child: (*prefix, code) for child, code in found.items()}
        frontier = following
    assert {prefix: int(trie.leaf_items[leaf]) for leaf, prefix in frontier.items()} == {
        row: item for item, row in enumerate(rows)
    }


def test_one_item() -> None:
    trie = Trie(SemanticIds(np.array([[3, 0]], np.int16), (4, 1)))
    assert trie.widest == [1, 1]
    assert trie.leaf_items.tolist() == [0]
