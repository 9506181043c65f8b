from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import random_ids
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
            children, exists = trie.expand(torch.tensor([node]), level)
            codes = trie.node_codes(level)[children]
            found = {int(c): int(k) for c, k, e in zip(children[0], codes[0], exists[0], strict=True) if e}
            assert set(found.values()) == {row[level] for row in rows if row[:level] == prefix}
            following |= {child: (*prefix, code) for child, code in found.items()}
        frontier = following
    assert {prefix: int(trie.leaf_items[leaf]) for leaf, prefix in frontier.items()} == {
        row: item for item, row in enumerate(rows)
    }


def test_one_item() -> None:
    trie = Trie(SemanticIds(np.array([[3, 0]], np.int16), (4, 1)))
    assert trie.max_children == [1, 1]
    assert trie.leaf_items.tolist() == [0]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), items=st.integers(1, 80))
def test_paths_sums_and_siblings_equal_plain_python(seed: int, items: int) -> None:
    rng = np.random.default_rng(seed)
    ids = random_ids(rng, items, (5, 4, 6))
    trie, rows = Trie(ids), [tuple(row.tolist()) for row in ids.codes]
    prefixes = [sorted({row[: level + 1] for row in rows}) for level in range(3)]
    for level in range(3):
        assert [prefixes[level][node] for node in trie.paths[:, level].tolist()] == [row[: level + 1] for row in rows]
    values, vectors = torch.from_numpy(rng.integers(0, 9, items)), torch.from_numpy(rng.normal(size=(items, 3)))
    sums = trie.sum_below(values)
    known_items = rng.random(items) < 0.6
    known = [mask.numpy() for mask in trie.allowed_nodes(torch.from_numpy(known_items))]
    for level in range(3):
        below = [[i for i, row in enumerate(rows) if row[: level + 1] == prefix] for prefix in prefixes[level]]
        assert sums[level].tolist() == [int(values[each].sum()) for each in below]
        assert known[level].tolist() == [bool(known_items[each].any()) for each in below]
        assert trie.num_items_below(level).tolist() == [len(each) for each in below]
        expected = torch.stack([vectors[each].mean(0) for each in below]).float()
        torch.testing.assert_close(trie.mean_below(vectors, level), expected)
    if not known_items.any():
        return
    targets = rng.choice(np.flatnonzero(known_items), 30)
    for level, among in enumerate(trie.siblings(targets, known), 1):
        for target, item in enumerate(targets.tolist()):
            pairs = (among.targets == target).nonzero().squeeze(1)
            found = among.nodes[among.positions[pairs]].tolist()
            parent = rows[item][:level]
            expected = [n for n, prefix in enumerate(prefixes[level]) if prefix[:-1] == parent and known[level][n]]
            assert found == expected
            assert prefixes[level][among.nodes[among.positions[among.labels[target]]]] == rows[item][: level + 1]
            assert among.targets[among.labels[target]] == target
