"""IDs of new items: published ones stay, new ones are distinct and as near as there is room."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import numpy as np
import pytest
import torch

from tests.factories import clusters, random_ids
from tiger.core.errors import DataError
from tiger.semantic_ids.assignment import SemanticIds, SemanticIdsConfig, assign
from tiger.semantic_ids.growth import Growth, append_ids
from tiger.tokenizers.append import other_codes
from tiger.tokenizers.base import TokenizerConfig
from tiger.tokenizers.train import encode_dataset, fit_tokenizer

NEAREST_FREE, EXTRA, ERROR = (
    SemanticIdsConfig.model_validate({"collision_policy": policy}) for policy in ("nearest_free", "extra_code", "error")
)


def grow(ids: SemanticIds, nearest: list[list[int]], config: SemanticIdsConfig, costs: np.ndarray) -> Growth:
    """Append items with given costs [n, codes] of the last code; other prefixes are tried in ascending order."""
    codes = np.array(nearest, np.int64).reshape(-1, ids.levels)
    size = ids.level_sizes[ids.levels - 1]

    def elsewhere(item: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for other in range(ids.level_sizes[ids.levels - 2]):
            tried = np.tile(codes[item], (size, 1))
            tried[:, -2], tried[:, -1] = other, np.arange(size)
            yield tried, costs[item]

    return append_ids(ids, codes, config, lambda items: costs[items], elsewhere)


def assert_published_stay(before: SemanticIds, after: Growth, new: int) -> None:
    assert np.array_equal(after.ids.codes[: len(before)], before.codes)
    assert after.ids.level_sizes == before.level_sizes
    assert len(after.ids) == len(before) + new  # SemanticIds refuses equal IDs


def test_free_codes_are_taken_as_they_are() -> None:
    ids = SemanticIds(np.array([[0, 0], [1, 2]], np.int16), (3, 4), 2)
    grown = grow(ids, [[0, 1], [1, 0], [2, 2]], NEAREST_FREE, np.zeros((3, 4)))
    assert_published_stay(ids, grown, 3)
    assert grown.ids.codes[2:].tolist() == [[0, 1], [1, 0], [2, 2]]
    assert not grown.moved.any()


@pytest.mark.parametrize("seed", range(8))
def test_new_items_of_a_prefix_share_its_free_codes_at_minimum_cost(seed: int) -> None:
    """Compared with all assignments."""
    rng = np.random.default_rng(seed)
    published = rng.permutation(6)[:2]
    ids = SemanticIds(np.array([[0, code] for code in published], np.int16), (2, 6), 2)
    costs = rng.random((4, 6))
    nearest = np.zeros((4, 2), int)
    nearest[:, 1] = published[0]
    grown = grow(ids, nearest.tolist(), NEAREST_FREE, costs)
    assert_published_stay(ids, grown, 4)
    free = [code for code in range(6) if code not in published]
    best = min(sum(costs[row, code] for row, code in enumerate(order)) for order in permutations(free, 4))
    assert costs[np.arange(4), grown.ids.codes[2:, 1]].sum() == pytest.approx(best)
    assert grown.moved.all()
    assert grown.displaced == 0


def test_a_full_prefix_sends_items_to_the_nearest_one_with_room() -> None:
    full = [[0, code] for code in range(3)] + [[1, 1]]
    ids = SemanticIds(np.array(full, np.int16), (2, 3), 2)
    costs = np.array([[2.0, 0.0, 1.0], [2.0, 0.0, 1.0]])
    grown = grow(ids, [[0, 1], [0, 0]], NEAREST_FREE, costs)
    assert grown.ids.codes[4:].tolist() == [[1, 2], [1, 0]]
    assert grown.displaced == 2
    with pytest.raises(DataError, match=r"no free semantic ID near the new item 0.*tokenizer.codebook_size"):
        grow(grown.ids, [[0, 1]], NEAREST_FREE, costs)


def test_collision_codes_go_on_behind_the_published_ones() -> None:
    codes = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0]], np.int16)
    ids = SemanticIds(codes, (2, 2, 4), 2)
    grown = grow(ids, [[0, 0], [0, 1], [0, 0], [1, 1]], EXTRA, np.zeros((4, 2)))
    assert_published_stay(ids, grown, 4)
    assert grown.ids.codes[3:].tolist() == [[0, 0, 2], [0, 1, 1], [0, 0, 3], [1, 1, 0]]
    again = grow(grown.ids, [[0, 0]], EXTRA, np.zeros((1, 2)))  # the level has no fifth code: the next tuple has
    assert again.ids.codes[-1].tolist() == [0, 1, 2]


def test_with_the_policy_error_a_taken_id_is_an_error() -> None:
    ids = SemanticIds(np.array([[0, 0]], np.int16), (2, 2), 2)
    assert grow(ids, [[0, 1]], ERROR, np.zeros((1, 2))).ids.codes[-1].tolist() == [0, 1]
    with pytest.raises(DataError, match=r"collision_policy is error; .* new item 1"):
        grow(ids, [[0, 1], [0, 0]], ERROR, np.zeros((2, 2)))


def test_no_new_items_change_nothing() -> None:
    ids = random_ids(np.random.default_rng(0), 20, (3, 4, 5))
    assert np.array_equal(grow(ids, [], NEAREST_FREE, np.zeros((0, 5))).ids.codes, ids.codes)


@pytest.mark.parametrize("policy", ["nearest_free", "extra_code"])
def test_many_appends_to_a_real_tokenizer(policy: str) -> None:
    """Nearly all IDs are used up, append after append; nothing published moves."""
    config = TokenizerConfig.resolve({"kind": "rkmeans", "num_levels": 2, "codebook_size": 16})
    vectors = torch.from_numpy(clusters())[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    tokenizer, _ = fit_tokenizer(config, vectors[:100], device=torch.device("cpu"))
    policy_config = SemanticIdsConfig.model_validate({"collision_policy": policy, "collision_codes": 64})
    codes = encode_dataset(tokenizer, vectors, torch.device("cpu")).numpy()
    costs = tokenizer.assignment_costs(vectors)
    ids = assign(codes[:100], 16, policy_config, costs)
    errors = [float(tokenizer.errors(vectors[:100], torch.from_numpy(ids.codes[:, :2].astype(np.int64))).mean())]
    for begin in range(100, 240, 20):
        rows = np.arange(begin, begin + 20)
        grown = append_ids(
            ids, codes[rows], policy_config, lambda items, rows=rows: costs(rows[items]),
            lambda item, rows=rows: other_codes(tokenizer, vectors[rows[item]], codes[rows[item]]),
        )  # fmt: skip
        assert_published_stay(ids, grown, 20)
        ids = grown.ids
        assigned = torch.from_numpy(ids.codes[-20:, :2].astype(np.int64))
        errors.append(float(tokenizer.errors(vectors[rows], assigned).mean()))
    if policy == "extra_code":
        assert np.array_equal(ids.codes[100:, :2], codes[100:240])
    assert errors[1] < 4 * errors[0]


def test_other_codes_come_in_the_order_of_their_prefixes() -> None:
    config = TokenizerConfig.resolve({"kind": "rkmeans", "num_levels": 3, "codebook_size": 8})
    vectors = torch.from_numpy(clusters())
    tokenizer, _ = fit_tokenizer(config, vectors, device=torch.device("cpu"))
    nearest = tokenizer.encode(vectors[:1])[0].numpy()
    batches = list(other_codes(tokenizer, vectors[0], nearest))
    codes = np.concatenate([codes for codes, _ in batches])
    errors = np.concatenate([errors for _, errors in batches])
    assert len(np.unique(codes, axis=0)) == len(codes) == 7 * 8
    assert (codes[:, 0] == nearest[0]).all()
    assert (codes[:, 1] != nearest[1]).all()
    np.testing.assert_allclose(
        errors, tokenizer.errors(vectors[:1].expand(56, -1), torch.from_numpy(codes)).numpy(), rtol=1e-5
    )
