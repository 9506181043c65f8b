"""Histories of users from files of events, compared with plain Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tiger.core.errors import DataError
from tiger.core.storage import Folder
from tiger.data import texts
from tiger.data.catalog import CatalogConfig
from tiger.data.history_files import SPILL_BYTES, HistoryFiles
from tiger.data.item_names import ItemNames
from tiger.data.sources.base import INTERACTIONS
from tiger.serving.items import ItemTable

Event = tuple[str, str, int]


def names(folder: Path, count: int = 30) -> ItemNames:
    Folder(str(folder)).write_table("items.parquet", pa.table({"source_id": [f"i{n:02d}" for n in range(count)]}))
    return ItemNames(Folder(str(folder)))


def batches(events: list[Event], size: int = 50) -> list[pa.RecordBatch]:
    rows = [dict(zip(("user", "item", "time"), event, strict=True)) for event in events]
    return [
        pa.RecordBatch.from_pylist(rows[first : first + size], schema=INTERACTIONS)
        for first in range(0, len(rows), size)
    ]


def truth(events: list[Event], known: int, **catalog: Any) -> dict[str, list[int]]:
    found: dict[str, list[tuple[int, int, int]]] = {}
    for order, (user, item, time) in enumerate(events):
        number = int(item[1:])
        own = found.setdefault(user, [])
        if number < known:
            tie = number if catalog.get("tie_break") == "id" else order
            own.append((time, tie, number))
    histories = {}
    for user, own in found.items():
        kept: list[tuple[int, int]] = []
        for time, _, item in sorted(own):
            if catalog.get("duplicates") == "all":
                repeated = (time, item) in kept
            else:
                repeated = item in [before for _, before in kept]
            if not repeated:
                kept.append((time, item))
        histories[user] = [item for _, item in kept]
    return histories


@pytest.mark.parametrize("spills", [1, 5])
@pytest.mark.parametrize("catalog", [{}, {"duplicates": "all"}, {"tie_break": "id"}])
def test_against_plain_python(
    tmp_path: Path, spills: int, catalog: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiger.data.history_files._EVENTS_AT_ONCE", 120)
    rng = np.random.default_rng(0)
    events = [
        (f"user {rng.integers(40)}", f"i{rng.integers(35):02d}", int(rng.integers(60))) for _ in range(1000)
    ]  # 30 of 35 items are known
    events += [("nobody", "i33", 1), ("nobody", "i34", 2)]
    files = HistoryFiles(
        names(tmp_path), CatalogConfig.model_validate(catalog), Folder(f"{tmp_path}/spills"), (spills - 1) * SPILL_BYTES
    )
    files.read(batches(events))
    tables = list(files.users())
    assert len(tables) == spills
    table = pa.concat_tables(tables)
    found = dict(zip(table["source_id"].to_pylist(), table["history"].to_pylist(), strict=True))
    assert found == truth(events, 30, **catalog)
    assert table["user_id"].to_pylist() == list(range(41))
    assert len(set(table["source_id"].to_pylist())) == 41  # each user once
    counts = files.counts
    unknown = sum(int(item[1:]) >= 30 for _, item, _ in events)
    assert (counts.users, counts.events, counts.unknown, counts.users_without_items) == (41, 1002, unknown, 1)
    assert counts.repeated == 1002 - unknown - sum(map(len, found.values()))
    assert set(counts.unknown_examples) <= {f"i{n}" for n in range(30, 35)}


def test_only_unknown_items_are_an_error_that_shows_both_kinds_of_ids(tmp_path: Path) -> None:
    files = HistoryFiles(names(tmp_path), CatalogConfig(), Folder(f"{tmp_path}/spills"), 0)
    with pytest.raises(DataError, match=r"none of the 2 interactions .* such as i77, the catalog's .* i00, i01, i02"):
        files.read(batches([("a", "i77", 1), ("b", "i77", 2)]))
    with pytest.raises(DataError, match="no interactions"):
        HistoryFiles(names(tmp_path), CatalogConfig(), Folder(f"{tmp_path}/spills"), 0).read([])


def test_names_are_titles_else_texts_else_ids(tmp_path: Path) -> None:
    """In lists of recommendations and in the service; titles of other types read as in the texts."""
    folder = Folder(str(tmp_path))
    rows = {"source_id": list("abcd"), "text": ["x", None, "z", None], "title": [["A", "1"], [], [""], None]}
    for changed, shown in (({}, ["A > 1", "b", "z", "d"]), ({"title": [7, None, 9, 8]}, ["7", "b", "9", "8"])):
        folder.write_table("items.parquet", pa.table(rows | changed), row_group_size=3)
        assert ItemNames(folder).titles.to_pylist() == ItemTable.read(folder).titles == shown
    rows = {"source_id": ["a", "b", "c", "d"], "text": ["x" * 99, "y" * 99, "", None], "title": ["T", "", None, ""]}
    folder.write_table("items.parquet", pa.table(rows))
    assert ItemNames(folder).titles.to_pylist() == ["T", "y" * 80, "c", "d"]
    folder.write_table("items.parquet", pa.table({"source_id": ["a"], "text": ["words"]}))
    assert ItemNames(folder).titles.to_pylist() == ["words"]
    folder.write_table("items.parquet", pa.table({"source_id": ["z", "a"]}))
    assert ItemNames(folder).titles.to_pylist() == ["z", "a"]
    folder.write_table("items.parquet", pa.table({"source_id": ["a"], "text": ["words"]}))
    assert ItemNames(folder).indices(pa.array(["z", "a", None])).to_pylist() == [None, 0, None]


@pytest.mark.parametrize("rows", [[], ["a"], ["", "", "abc", "x" * 25, "", "yy", "z" * 10, "q"]], ids=len)
def test_texts_become_arrow_strings_in_chunks_of_bounded_size(rows: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_CHUNK_BYTES", 10)
    column = pa.chunked_array([pa.array(rows, pa.large_string()), pa.array(rows[1:], pa.large_string())])
    for begin in (0, 1):
        strings = texts.TextColumn(column.slice(begin)).strings()
        strings.validate(full=True)
        assert strings.type == pa.string()
        assert strings.to_pylist() == column.slice(begin).to_pylist()
        assert all(sum(map(len, chunk.to_pylist()[1:])) < 10 for chunk in strings.chunks)
