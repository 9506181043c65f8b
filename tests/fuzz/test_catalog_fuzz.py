"""Random catalogs: the rules against plain Python, and any cut of the raw data and of the work against none at all."""

from __future__ import annotations

import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiger.core import external_sort
from tiger.core.config import build
from tiger.core.errors import DataError
from tiger.core.runner import InProcess
from tiger.core.storage import Folder
from tiger.data import histories as histories_module
from tiger.data import profile
from tiger.data.catalog import CatalogConfig, make
from tiger.data.histories import read_histories
from tiger.data.prepare import build as building
from tiger.data.prepare import interactions
from tiger.data.prepare.raw import Unchecked
from tiger.data.readers.row_counts import RowCounts
from tiger.data.sources.base import INTERACTIONS

Event = tuple[str, str, int]

ITEMS = ["é", "e\u0301", "Z", "a", "10", "9", "漢", "😀", "b ", "x", "\u00e4", "ﬀ", "A", "0"]
USERS = ["u1", "U1", "é", "😀", "10", "9", "z", "w", "u" * 40]
SCHEMA = pa.schema([
    ("source_id", pa.string()), ("title", pa.string()), ("categories", pa.list_(pa.list_(pa.string()))),
    ("price", pa.float64()), ("more", pa.string()),
])  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """Rows of items and events in parts, each in batches."""

    items: list[list[dict[str, Any]]]
    events: list[list[Event]]
    batch: int = 3
    is_here: bool = True

    def num_parts(self, role: str) -> int:
        return len(self.items if role == "items" else self.events)

    def read(self, role: str, part: int, fields: Any) -> tuple[Iterator[pa.RecordBatch], RowCounts]:
        if role == "items":
            rows, schema = self.items[part], SCHEMA
        else:
            rows = [dict(zip(("user", "item", "time"), event, strict=True)) for event in self.events[part]]
            schema = INTERACTIONS
        batches = (
            pa.RecordBatch.from_pylist(rows[begin : begin + self.batch], schema=schema)
            for begin in range(0, len(rows), self.batch)
        )
        return batches, RowCounts(role)


@st.composite
def catalogs(draw: Any) -> tuple[list[dict[str, Any]], list[Event], dict[str, Any]]:
    names = draw(st.lists(st.sampled_from(ITEMS), min_size=1, max_size=16))
    items = [
        {
            "source_id": name,
            "title": draw(st.sampled_from([None, "", "tea", "a  b", f"of {name}"])),
            "categories": draw(st.sampled_from([None, [], [["A", "B"]], [["A"], []]])),
            "price": draw(st.sampled_from([None, 1.5, float("nan"), 0.0])),
            "more": draw(st.sampled_from([None, "m"])),
        }
        for name in names
    ]
    last = draw(st.sampled_from([0, 3, 1000]))
    user = st.sampled_from(USERS[: draw(st.integers(1, len(USERS)))])
    item = st.sampled_from([*names, *["unknown"] * draw(st.integers(0, 1))])
    events = draw(st.lists(st.tuples(user, item, st.integers(1_400_000_000, 1_400_000_000 + last)), max_size=90))
    values = {
        "k_core": draw(st.sampled_from([0, 1, 2, 2, 3, 5])),
        "duplicates": draw(st.sampled_from(["first", "all"])),
        "tie_break": draw(st.sampled_from(["file", "id", "shuffle"])),
        "split": draw(st.sampled_from(["leave-one-out", "temporal"])),
        "text_fields": ["title", "categories", "price"],
        "max_unknown_item_fraction": 1,
    }
    return items, events, values


def plain(names: set[str], events: list[Event], values: dict[str, Any]) -> dict[str, tuple[list[str], int, int]]:
    """User -> (items, end of training, end of validation), by the words of `tiger.data.catalog`."""
    known = [(user, item, time, row) for row, (user, item, time) in enumerate(events) if item in names]
    seen, kept = set(), []
    for user, item, time, row in sorted(known, key=lambda event: (event[2], event[3])):
        key = (user, item) if values["duplicates"] == "first" else (user, item, time)
        if key not in seen:
            seen.add(key)
            kept.append((user, item, time, row))
    while values["k_core"] > 1:
        of_user, of_item = Counter(event[0] for event in kept), Counter(event[1] for event in kept)
        left = [each for each in kept if min(of_user[each[0]], of_item[each[1]]) >= values["k_core"]]
        if len(left) == len(kept):
            break
        kept = left
    histories = defaultdict(list)
    for user, item, time, row in kept:
        histories[user].append((time, item if values["tie_break"] == "id" else row, item))
    times = sorted(event[2] for event in kept)
    found = {}
    for user, history in histories.items():
        own = [(time, item) for time, _, item in sorted(history)]
        ends = (len(own) - 2, len(own) - 1) if len(own) >= 3 else (len(own), len(own))
        if values["split"] == "temporal":
            shares = 1 - 0.1 - 0.1, 1 - 0.1
            cuts = [times[math.ceil(share * (len(times) - 1))] for share in shares]
            ends = (sum(time < cuts[0] for time, _ in own), sum(time < cuts[1] for time, _ in own))
        found[user] = ([item for _, item in own], *ends)
    return found


@settings(max_examples=100, deadline=None)
@given(catalogs())
def test_the_rules_equal_those_in_plain_python(catalog: Any) -> None:
    items, events, values = catalog
    raw = Raw([items], [events])
    expected = plain({item["source_id"] for item in items}, events, values)
    with tempfile.TemporaryDirectory() as path:
        folder = Folder(path)
        try:
            rows = (raw.read(role, 0, None)[0] for role in ("items", "interactions"))
            make(build(CatalogConfig, values), *rows, folder)
        except DataError as error:
            assert not expected or "leaves no" in str(error)
            return
        histories = read_histories(folder)
        names = folder.read_table("items.parquet")["source_id"].to_pylist()
    assert names == sorted({item for history, *_ in expected.values() for item in history})
    assert list(histories.source_ids) == sorted(expected)
    for user, name in enumerate(histories.source_ids):
        found, (history, *ends) = [names[item] for item in histories.of(user)], expected[name]
        if values["tie_break"] != "shuffle":
            assert found == history
        assert sorted(found) == sorted(history)
        begin = histories.offsets[user]
        assert [histories.train_end[user] - begin, histories.valid_end[user] - begin] == ends


def cut(rows: list[Any], places: list[int]) -> list[list[Any]]:
    ends = sorted(min(place, len(rows)) for place in places)
    return [rows[begin:end] for begin, end in zip([0, *ends], [*ends, len(rows)], strict=True)]


@settings(max_examples=60, deadline=None)
@given(catalogs(), st.lists(st.integers(0, 90), max_size=4), st.lists(st.integers(0, 16), max_size=3), st.data())
def test_how_the_work_is_cut_changes_no_byte(catalog: Any, of_events: Any, of_items: Any, data: Any) -> None:
    """Parts of the raw data, runs, row groups and ranges of any size, in files: the files of one range in memory."""
    items, events, values = catalog
    config = build(CatalogConfig, values)
    sizes = building.Sizes(*(data.draw(st.sampled_from([1, 100, 10_000])) for _ in range(4)))
    with tempfile.TemporaryDirectory() as path, pytest.MonkeyPatch.context() as patch:
        patch.setattr(interactions, "_GROUP_ROWS", data.draw(st.sampled_from([1, 5, 1_000])))
        patch.setattr(building, "ITEM_ROW_GROUP", 3)
        patch.setattr(histories_module, "GROUP_USERS", 2)
        patch.setattr(histories_module, "GROUP_EVENTS", 7)
        patch.setattr(profile, "SKETCH", 8)
        results = []
        for name, raw, cut_sizes, store in (
            ("whole", Raw([items], [events], 1_000), building.ONE_RANGE, external_sort.MemoryStore()),
            ("cut", Raw(cut(items, of_items), cut(events, of_events)), sizes,
             external_sort.FolderStore(Folder(f"{path}/scratch"))),
        ):  # fmt: skip
            folder = Folder(f"{path}/{name}")
            try:
                building.build_catalog(config, raw, folder, store=store, runner=InProcess(), sizes=cut_sizes,
                                       reading=Unchecked())  # fmt: skip
            except DataError as error:
                results.append(str(error))
                continue
            results.append([(Path(path) / name / file).read_bytes() for file in sorted(folder.files())])
        assert results[0] == results[1]
