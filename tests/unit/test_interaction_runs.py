"""Runs of interactions: sorted by user, and no larger than their rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tiger.core.external_sort import FolderStore, KeyRange, MemoryStore, TableStore, read_range, write_run
from tiger.core.storage import Folder
from tiger.data.prepare import interactions


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_range_of_a_run_brings_its_own_users_alone(
    in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parquet writes the dictionary of an array into each row group: 15 GB in a task for 10 million interactions."""
    monkeypatch.setattr(interactions, "_GROUP_ROWS", 100)
    rng = np.random.default_rng(0)
    users = [f"user-{number:04d}" for number in rng.integers(0, 2_000, 5_000)]
    item, time = rng.integers(0, 50, 5_000).astype(np.int32), rng.integers(0, 9, 5_000)
    run = interactions._sorted_by_user(pa.chunked_array([users[:1_000], users[1_000:]]), item, time)
    store: TableStore = MemoryStore() if in_memory else FolderStore(Folder(str(tmp_path)))
    written = write_run(store, "run", run, interactions.KEY, 100)
    assert len(written.first) == 50
    keys = KeyRange("user-0500", "user-1500")
    ((_, table),) = read_range(store, [written], keys, interactions.KEY)
    order = sorted(range(5_000), key=lambda row: users[row])  # stable, as the sort must be
    expected = [(users[row], item[row], time[row]) for row in order if "user-0500" <= users[row] < "user-1500"]
    assert list(zip(*(table[name].to_pylist() for name in ("user", "item", "time")), strict=True)) == expected
    entries = sum(len(chunk.dictionary) for chunk in table["user"].chunks)
    assert entries <= len({user for user, *_ in expected}) + 2 * 50
