from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiger.artifacts import Folder
from tiger.errors import ArtifactError, DataError
from tiger.semantic_ids import SemanticIds, SemanticIdsConfig, assign


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), items=st.integers(1, 60), levels=st.integers(1, 4))
def test_ids_are_unique_and_numbered_in_item_order(seed: int, items: int, levels: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 3, (items, levels))
    ids = assign(codes, 3, SemanticIdsConfig(collision_codes=60))
    seen: dict[tuple[int, ...], int] = {}
    for item, row in enumerate(codes.tolist()):  # the slow truth
        position = seen.get(tuple(row), 0)
        seen[tuple(row)] = position + 1
        assert ids.codes[item].tolist() == [*row, position]
    assert ids.item_of(ids.codes).tolist() == list(range(items))
    assert ids.unique_before.tolist() == [seen[tuple(row)] == 1 for row in codes.tolist()]


def test_unknown_ids_have_no_item() -> None:
    ids = assign(np.array([[0, 1], [2, 2]]), 3, SemanticIdsConfig())
    assert ids.item_of(np.array([[2, 2, 0], [2, 2, 1], [0, 0, 0], [0, 1, 0]])).tolist() == [1, -1, -1, 0]


def test_a_group_that_outgrows_its_level_is_named() -> None:
    codes = np.zeros((300, 3), np.int64)
    codes[0] = 7
    with pytest.raises(DataError, match=r"299 items share the codes \(0, 0, 0\).*256 apart.*\[1, 2, 3, 4, 5\]"):
        assign(codes, 8, SemanticIdsConfig(collision_codes=256))


def test_written_ids_come_back(tmp_path: Path) -> None:
    ids = assign(np.array([[0, 1], [0, 1], [2, 2]]), 3, SemanticIdsConfig(collision_codes=5))
    ids.write(Folder(str(tmp_path)), pa.chunked_array([["a", "b", "c"]]))
    again = SemanticIds.read(Folder(str(tmp_path)))
    assert np.array_equal(again.codes, ids.codes)
    assert again.level_sizes == (3, 3, 5)


@pytest.mark.parametrize("codes", [[[0, 1], [0, 1]], [[0, 3], [0, 1]], [[0, -1], [0, 1]]])
def test_doubled_or_impossible_ids_are_refused(codes: list[list[int]]) -> None:
    with pytest.raises(ArtifactError):
        SemanticIds(np.array(codes, np.int16), (3, 3))
