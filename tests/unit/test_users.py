"""Users block after block, compared with all histories in memory."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.factories import toy_histories
from tiger.core.storage import Folder
from tiger.data.histories import Histories, history_table, sample_users
from tiger.data.history_blocks import SPLITS, read_blocks, slices, training_counts
from tiger.data.user_tables import (
    TARGETS,
    USERS,
    catalog_users,
    evaluation_users,
    shard_files,
    take_test_users,
    write_users,
)
from tiger.models.markov_chain import count_transitions

ITEMS = 25


@pytest.fixture(scope="module")
def histories() -> Histories:
    return toy_histories(np.random.default_rng(0), 500, ITEMS, longest=9)


@pytest.fixture(scope="module")
def catalog(histories: Histories, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    folder = Folder(str(tmp_path_factory.mktemp("catalog")))
    times = np.arange(len(histories.items), dtype=np.int64)
    folder.write_table("histories.parquet", history_table(histories, times), row_group_size=70)
    return folder


def test_blocks_are_the_histories_in_order(histories: Histories, catalog: Folder) -> None:
    blocks = list(read_blocks(catalog, with_ids=True, block_users=33))
    assert max(len(block.histories) for block in blocks) <= 33
    found = [block.histories.of(user).tolist() for block in blocks for user in range(len(block.histories))]
    assert found == [histories.of(user).tolist() for user in range(500)]
    assert list(chain.from_iterable(block.source_ids.to_pylist() for block in blocks)) == histories.source_ids
    assert [block.first_user for block in blocks] == np.cumsum([0, *(len(b.histories) for b in blocks[:-1])]).tolist()


def test_counts_and_transitions_add_up_over_blocks(histories: Histories, catalog: Folder) -> None:
    blocks = [block.histories for block in read_blocks(catalog, block_users=40)]
    assert np.array_equal(training_counts(blocks, ITEMS), histories.training_counts(ITEMS))
    expected = np.zeros((ITEMS, ITEMS), np.int64)
    for user in range(500):
        training = histories.of(user)[:-2]
        np.add.at(expected, (training[:-1], training[1:]), 1)
    assert np.array_equal(count_transitions(blocks, ITEMS).toarray(), expected)


def test_transitions_do_not_depend_on_how_many_are_added_at_a_time(
    histories: Histories, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = count_transitions([histories], ITEMS).toarray()
    monkeypatch.setattr("tiger.models.markov_chain._PAIRS_AT_ONCE", 1)
    assert np.array_equal(count_transitions([histories, histories], ITEMS).toarray(), 2 * whole)


@pytest.mark.parametrize("maximum", [None, 60, 10_000])
def test_users_to_evaluate_are_those_of_the_splits(
    histories: Histories, catalog: Folder, tmp_path: Path, maximum: int | None
) -> None:
    sizes, tables = evaluation_users(catalog, maximum, seed=3)
    folder = Folder(str(tmp_path))
    write_users(folder, "users.parquet", tables, sum(sizes.values()), TARGETS)
    table = folder.read_table("users.parquet")
    assert table.schema == TARGETS
    begin = 0
    for number, split in enumerate(SPLITS):
        expected = sample_users(histories.evaluation(split), maximum, 3)
        own = table.slice(begin, begin := begin + sizes[split])
        own = own.slice(0, sizes[split])
        assert own["user_id"].to_pylist() == expected.users.tolist()
        assert own["source_id"].to_pylist() == [histories.source_ids[user] for user in expected.users]
        assert own["history"].to_pylist() == [history.tolist() for history in expected.histories()]
        assert own["target"].to_pylist() == expected.targets.tolist()
        assert set(own["split"].to_pylist()) == {number}
    test_users = table.slice(sizes["valid"])
    wanted = sample_users(sample_users(histories.evaluation("test"), maximum, 3), 20, 5)
    found = take_test_users(folder, "users.parquet", sizes["test"], 20, 5)
    assert found["user_id"].to_pylist() == wanted.users.tolist()
    assert [row.tolist() for row in slices(found["history"])] == [row.tolist() for row in wanted.histories()]
    assert len(take_test_users(folder, "users.parquet", sizes["test"], len(test_users), 5)) == len(test_users)


@pytest.mark.parametrize("at_most", [1, 33, 500])
def test_the_first_users_of_a_catalog(histories: Histories, catalog: Folder, tmp_path: Path, at_most: int) -> None:
    folder = Folder(str(tmp_path))
    write_users(folder, "users.parquet", catalog_users(catalog, at_most), at_most, USERS)
    table = folder.read_table("users.parquet")
    assert table["user_id"].to_pylist() == list(range(at_most))
    assert table["source_id"].to_pylist() == histories.source_ids[:at_most]
    assert table["history"].to_pylist() == [histories.of(user).tolist() for user in range(at_most)]


def test_row_groups_are_of_equal_size_whatever_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiger.data.user_tables.SHARD_USERS", 7)
    rows = pa.table(
        {"user_id": range(23), "source_id": [str(n) for n in range(23)], "history": [[n] for n in range(23)]}
    )
    folder = Folder(str(tmp_path))
    write_users(folder, "u.parquet", iter([rows.slice(0, 2), rows.slice(2, 15), rows.slice(17)]), 23, USERS)
    metadata = pq.read_metadata(tmp_path / "u.parquet")
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [7, 7, 7, 2]
    assert folder.read_table("u.parquet")["source_id"].to_pylist() == rows["source_id"].to_pylist()


def test_files_of_shards_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (100_000, 2, 99_999, 10):
        (tmp_path / f"part-{number:05d}.parquet").touch()
    (tmp_path / "part-00003.parquet.12.partial").touch()
    assert [name[5:-8] for name in shard_files(Folder(str(tmp_path)))] == ["00002", "00010", "99999", "100000"]
