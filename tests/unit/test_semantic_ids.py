from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiger.core import row_groups
from tiger.core.errors import ArtifactError, DataError
from tiger.core.row_groups import read_row_groups
from tiger.core.storage import Folder
from tiger.metrics.codes import code_metrics, unique_ratio
from tiger.semantic_ids import assignment
from tiger.semantic_ids.assignment import SemanticIds, SemanticIdsConfig, assign, packed, separate, sorted_keys


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
    ids.write(Folder(str(tmp_path)), [pa.table({"source_id": ["a", "b"]}), pa.table({"source_id": ["c"]})])
    again = SemanticIds.read(Folder(str(tmp_path)))
    assert np.array_equal(again.codes, ids.codes)
    assert again.level_sizes == (3, 3, 5)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([[2, 2], [0, 1], [1, 1], [0, 1]], r"items 1 and 3 share the semantic ID \[0, 1\]"),
        ([[0, 3], [0, 1]], r"of item 0, \[0, 3\], is out of range"),
        ([[0, 2], [0, -1]], r"of item 1, \[0, -1\], is out of range"),
        ([[0, 1, 1]], "have 3 codes, and sizes of 2 levels"),
    ],
)
def test_doubled_or_impossible_ids_are_refused(codes: list[list[int]], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        SemanticIds(np.array(codes, np.int16), (3, 3))


@pytest.mark.parametrize("size", [3, 2_000])  # keys of 4 and of 8 bytes
def test_what_is_said_of_codes_equals_plain_python(size: int) -> None:
    codes = np.random.default_rng(0).integers(0, size, (5_000, 3)).astype(np.int16)
    codes[2_000:4_000] = codes[:2_000]
    kind = np.int32 if size == 3 else np.int64
    assert sorted_keys(codes, (size,) * 3).dtype == kind
    assert sorted_keys(codes, (size,) * 3).tolist() == sorted(packed(codes, (size,) * 3).tolist())
    rows = [tuple(row) for row in codes.tolist()]
    found = code_metrics(codes, size)
    for level in range(3):
        assert found[f"unique@{level + 1}"] == len({row[: level + 1] for row in rows}) / 5_000
        assert found[f"usage@{level + 1}"] == len({row[level] for row in rows}) / size
    assert found["unique_ratio"] == unique_ratio(codes) == len(set(rows)) / 5_000


@pytest.mark.parametrize("level_sizes", [(50, 50, 300), (4, 4, 300)])
def test_ids_of_any_number_of_row_groups_are_one_file(
    level_sizes: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = np.random.default_rng(0).integers(0, level_sizes[0], (2_000, 2))
    ids = assign(codes, level_sizes[0], SemanticIdsConfig(collision_policy="extra_code", collision_codes=300))
    counts = Counter(map(tuple, codes.tolist()))
    names = pa.table({"source_id": [f"item-{number}" for number in range(2_000)]})
    folder = Folder(str(tmp_path))
    folder.write_table("items.parquet", names, row_group_size=7)
    monkeypatch.setattr(assignment, "_GROUP_ROWS", 300)
    monkeypatch.setattr(row_groups, "_GROUPS_AT_ONCE", 10)
    ids.write(folder, read_row_groups(folder, "items.parquet", ["source_id"]))
    table = folder.read_table("ids.parquet")
    assert table["source_id"].to_pylist() == names["source_id"].to_pylist()
    assert table["unique"].to_pylist() == [counts[tuple(row)] == 1 for row in codes.tolist()]
    assert [row[:2] for row in table["codes"].to_pylist()] == codes.tolist()
    assert pq.ParquetFile(tmp_path / "ids.parquet").num_row_groups == 7


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
