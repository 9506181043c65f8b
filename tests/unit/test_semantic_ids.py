from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiger.core.errors import ArtifactError, DataError
from tiger.core.storage import Folder
from tiger.semantic_ids.assignment import SemanticIds, SemanticIdsConfig, assign, separate


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), items=st.integers(1, 60), levels=st.integers(1, 4))
def test_ids_are_unique_and_numbered_in_item_order(seed: int, items: int, levels: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 3, (items, levels))
    ids = assign(codes, 3, SemanticIdsConfig(collision_policy="extra_code", collision_codes=60))
    seen: dict[tuple[int, ...], int] = {}
    for item, row in enumerate(codes.tolist()):  # the slow truth
        position = seen.get(tuple(row), 0)
        seen[tuple(row)] = position + 1
        assert ids.codes[item].tolist() == [*row, position]
    assert ids.item_of(ids.codes).tolist() == list(range(items))
    assert ids.unique_before.tolist() == [seen[tuple(row)] == 1 for row in codes.tolist()]


def test_unknown_ids_have_no_item() -> None:
    ids = assign(np.array([[0, 1], [2, 2]]), 3, SemanticIdsConfig(collision_policy="extra_code"))
    assert ids.item_of(np.array([[2, 2, 0], [2, 2, 1], [0, 0, 0], [0, 1, 0]])).tolist() == [1, -1, -1, 0]


def test_a_group_that_outgrows_its_level_is_named() -> None:
    codes = np.zeros((300, 3), np.int64)
    codes[0] = 7
    with pytest.raises(DataError, match=r"299 items share.*256 codes.*\(0, 0, 0\).*\[1, 2, 3, 4, 5\]"):
        assign(codes, 8, SemanticIdsConfig(collision_policy="extra_code", collision_codes=256))


def test_written_ids_come_back(tmp_path: Path) -> None:
    ids = assign(
        np.array([[0, 1], [0, 1], [2, 2]]), 3, SemanticIdsConfig(collision_policy="extra_code", collision_codes=5)
    )
    ids.write(Folder(str(tmp_path)), pa.chunked_array([["a", "b", "c"]]))
    again = SemanticIds.read(Folder(str(tmp_path)))
    assert np.array_equal(again.codes, ids.codes)
    assert again.level_sizes == (3, 3, 5)


@pytest.mark.parametrize("codes", [[[0, 1], [0, 1]], [[0, 3], [0, 1]], [[0, -1], [0, 1]]])
def test_doubled_or_impossible_ids_are_refused(codes: list[list[int]]) -> None:
    with pytest.raises(ArtifactError):
        SemanticIds(np.array(codes, np.int16), (3, 3))


def costs_of(table: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda items: table[items]


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), items=st.integers(1, 7), capacity=st.integers(1, 2))
def test_separated_codes_cost_the_least(seed: int, items: int, capacity: int) -> None:
    """Against trying every assignment, one prefix at a time."""
    rng = np.random.default_rng(seed)
    table = rng.random((items, 4))
    codes = np.stack([rng.integers(0, 2, items), table.argmin(1)], axis=1)
    moved = separate(codes, 4, costs_of(table), capacity)
    assert np.array_equal(moved[:, 0], codes[:, 0])
    for prefix in (0, 1):
        group = np.flatnonzero(codes[:, 0] == prefix)
        if len(group) > 4 * capacity:
            continue
        allowed = [c for c in product(range(4), repeat=len(group)) if max(Counter(c).values(), default=0) <= capacity]
        best = min(sum(table[i, c] for i, c in zip(group, choice, strict=True)) for choice in allowed)
        assert table[group, moved[group, 1]].sum() == pytest.approx(best)
        assert max(Counter(moved[group, 1].tolist()).values(), default=0) <= capacity


def test_the_nearest_free_code_needs_no_further_level() -> None:
    table = np.array([[0.0, 1, 5], [0.0, 3, 5], [0.0, 9, 9]])
    codes = np.array([[1, 0], [1, 0], [0, 0]])
    ids = assign(codes, 3, SemanticIdsConfig(collision_policy="nearest_free"), costs_of(table))
    assert ids.codes.tolist() == [[1, 1], [1, 0], [0, 0]]
    assert ids.level_sizes == (3, 3)
    assert ids.unique_before.all()
    assert not ids.collisions.any()


def test_more_items_than_last_codes_get_one_more_level() -> None:
    codes = np.zeros((5, 2), np.int64)
    ids = assign(
        codes, 3, SemanticIdsConfig(collision_policy="nearest_free", collision_codes=9), costs_of(np.zeros((5, 3)))
    )
    assert ids.level_sizes == (3, 3, 9)
    assert len(np.unique(ids.codes[:, :2], axis=0)) == 3
    assert len(np.unique(ids.codes, axis=0)) == 5


@pytest.mark.parametrize("equal", [511, 512, 600, 12_500])
def test_equal_items_up_to_five_percent_are_told_apart(equal: int) -> None:
    """Of 250,000 items 5 % may be without a text; all of these have one vector and one tuple of codes."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (max(12_000, equal), 3))
    codes[:equal] = 7
    last = rng.random(256)
    ids = assign(codes, 256, SemanticIdsConfig(), lambda items: np.tile(last, (len(items), 1)))
    groups = np.unique(ids.codes[:equal, :3], axis=0, return_counts=True)[1]
    assert len(groups) == 256
    assert groups.max() - groups.min() <= 1
    assert len(np.unique(ids.codes, axis=0)) == len(codes)


def test_a_group_that_no_level_holds_has_a_cure() -> None:
    costs = costs_of(np.zeros((9, 2)))
    with pytest.raises(DataError, match="increase semantic_ids.collision_codes or tokenizer.codebook_size"):
        assign(np.zeros((9, 1), int), 2, SemanticIdsConfig(collision_codes=4), costs)
    with pytest.raises(DataError, match="set semantic_ids.collision_policy = nearest_free, or increase"):
        assign(np.zeros((9, 1), int), 2, SemanticIdsConfig(collision_policy="extra_code", collision_codes=4))


def test_collisions_can_be_refused() -> None:
    with pytest.raises(
        DataError, match=r"2 items share .* is error; the largest group is 2 items with \(0, 1\).*\[0, 2\]"
    ):
        assign(np.array([[0, 1], [2, 2], [0, 1]]), 3, SemanticIdsConfig(collision_policy="error"))
    assert assign(np.array([[0, 1], [2, 2]]), 3, SemanticIdsConfig(collision_policy="error")).level_sizes == (3, 3)


@pytest.mark.parametrize("policy", ["extra_code", "nearest_free"])
def test_ids_do_not_depend_on_how_the_codes_were_cut(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    table, codes = rng.random((3000, 8)), rng.integers(0, 8, (3000, 3))
    whole = assign(codes, 8, SemanticIdsConfig(collision_policy=policy), costs_of(table))
    for size in (1, 7, 1000):
        monkeypatch.setattr("tiger.semantic_ids.assignment._COSTS_AT_ONCE", size)
        assert np.array_equal(
            assign(codes, 8, SemanticIdsConfig(collision_policy=policy), costs_of(table)).codes, whole.codes
        )
