"""The contract, held over every file in tiger/datasets, and what the readers make of good and bad lines."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest

from tests.raw_data import EXAMPLES, ITEMS, REVIEWS, amazon_folder, read, tables, write
from tiger.core.config import load_plugin, shipped_plugins
from tiger.core.errors import ConfigError, DataError
from tiger.data.sources import synthetic
from tiger.data.sources.base import (
    INTERACTIONS,
    MAX_LINE_BYTES,
    DatasetConfig,
    InvalidRow,
    lines,
    parse_record,
)

KINDS = shipped_plugins("tiger.data.sources")


@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind: str, tmp_path: Path) -> None:
    items, events, item_ledger, event_ledger = read(EXAMPLES[kind](tmp_path), tmp_path / "cache")
    assert items.schema.field("source_id").type == pa.string()
    assert len(items.column_names) > 1
    assert events.schema == INTERACTIONS
    assert items["source_id"].null_count == events["user"].null_count == 0
    assert item_ledger.kept == item_ledger.read == len(items)
    assert event_ledger.kept == event_ledger.read == len(events)
    assert set(events["item"].to_pylist()) <= set(items["source_id"].to_pylist())


def test_every_kind_has_an_example() -> None:
    assert set(EXAMPLES) == set(KINDS)


def test_an_unknown_kind_names_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match="amazon, synthetic, tables"):
        DatasetConfig.resolve({"kind": "amazn"})


# --- Amazon -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("form", ["json", "literal"])
def test_amazon_2014(form: str, compress: bool, tmp_path: Path) -> None:
    items, events, *_ = read(amazon_folder(tmp_path, form, compress), tmp_path)
    first, second = items.to_pylist()
    assert first["categories"] == [["Beauty", "Bath"], ["Home"]]
    assert (first["price"], first["brand"], second["brand"]) == (9.99, "Fern", None)
    assert second["description"] == "Plain 'soap'."
    assert events.to_pylist()[0] == {"user": "U1", "item": "B1", "time": 1_400_000_000_000_000}


def test_amazon_2018_and_2023_have_other_fields(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write(
        tmp_path / "a/meta_X.json.gz",
        [
            {
                "asin": "B1",
                "title": "T",
                "category": ["A", "B"],
                "price": "$1,299.50",
                "description": ["d1", "d2"],
                "feature": ["f"],
            }
        ],
    )
    write(tmp_path / "a/X_5.json.gz", [{"reviewerID": "U", "asin": "B1", "unixReviewTime": 1_400_000_000}])
    write(
        tmp_path / "b/meta_X.jsonl",
        [
            {
                "parent_asin": "B1",
                "title": "T",
                "store": "S",
                "categories": ["A", "B"],
                "price": None,
                "features": ["f"],
                "description": [],
            }
        ],
        compress=False,
    )
    write(
        tmp_path / "b/X.jsonl",
        [{"user_id": "U", "asin": "V9", "parent_asin": "B1", "timestamp": 1_400_000_000_999}],
        compress=False,
    )
    a, a_events, *_ = read({"kind": "amazon", "path": str(tmp_path / "a")}, tmp_path)
    b, b_events, *_ = read({"kind": "amazon", "path": str(tmp_path / "b")}, tmp_path)
    assert a.to_pylist() == [
        {
            "source_id": "B1",
            "title": "T",
            "brand": None,
            "categories": [["A", "B"]],
            "price": 1299.5,
            "description": "d1 d2",
            "features": ["f"],
        }
    ]
    assert b.to_pylist() == [
        {
            "source_id": "B1",
            "title": "T",
            "brand": "S",
            "categories": [["A", "B"]],
            "price": None,
            "description": None,
            "features": ["f"],
        }
    ]
    assert a_events.to_pylist() == [{"user": "U", "item": "B1", "time": 1_400_000_000_000_000}]
    assert b_events.to_pylist() == [{"user": "U", "item": "B1", "time": 1_400_000_000_999_000}]


BAD_LINES = {
    "{'asin': 'B1', 'title': open('x')}": "neither JSON nor a Python literal",
    "{'asin': 'B1', 'title': __import__('os')}": "neither JSON nor a Python literal",
    "{'asin': 'B1', 'n': 9**9**9}": "neither JSON nor a Python literal",
    "[" * 5000: "neither JSON nor a Python literal",
    "-" * 100_000 + "1": "neither JSON nor a Python literal",
    "{'asin': 'B1'": "neither JSON nor a Python literal",
    "['asin', 'B1']": "a list, not an object",
    '{"asin": "B1", "title": "\\ud800"}': "lone surrogate in a string",
    "{'asin': '" + "x" * (MAX_LINE_BYTES + 10) + "'}": f"line longer than {MAX_LINE_BYTES:,} bytes",
    "{'title': 'no id'}": "no asin or parent_asin",
    "{'asin': ''}": "no asin or parent_asin",
    "{'asin': ['B1']}": "no asin or parent_asin",
    "{'asin': 'B\\x001'}": "asin or parent_asin is too long or unprintable",
}  # fmt: skip


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_bad_lines_are_counted_with_file_line_and_reason(line: str, reason: str, tmp_path: Path) -> None:
    amazon_folder(tmp_path)
    path = write(tmp_path / "meta_X.json.gz", [ITEMS[0], line, ITEMS[1]], "literal")
    items, _, ledger, _ = read({"kind": "amazon", "path": str(tmp_path)}, tmp_path)
    assert items["source_id"].to_pylist() == ["B1", "B2"]
    assert ledger.record() == {"read": 3, "kept": 2, "skipped": {reason: 1}, "examples": [f"{path}:2: {reason}"]}
    with pytest.raises(DataError, match=r"1 of 3 rows .*33.33%.*meta_X.json.gz:2"):
        ledger.close(0.01)
    ledger.close(0.5)


def test_invalid_utf8_bom_crlf_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": "\xff"}\n{"a": 2}')
    found = []
    for number, line in lines(path):
        try:
            found.append((number, parse_record(line)["a"]))
        except InvalidRow as reason:
            found.append((number, str(reason)))
    assert found == [(1, 1), (3, "not UTF-8"), (4, 2)]


def test_a_time_in_the_wrong_unit_is_no_time(tmp_path: Path) -> None:
    amazon_folder(tmp_path)
    write(
        tmp_path / "reviews_X_5.json.gz",
        [*REVIEWS, REVIEWS[0] | {"unixReviewTime": 1_400_000_000_000}, {"reviewerID": "U", "asin": "B1"}],
    )
    _, events, _, ledger = read({"kind": "amazon", "path": str(tmp_path)}, tmp_path)
    assert len(events) == 2
    assert ledger.skipped == {"time is outside the years 1990 to 2100": 1, "time is missing or not a number": 1}


@pytest.mark.parametrize("cut", [20, 60, -4])
def test_a_truncated_or_damaged_gzip_file_is_named(cut: int, tmp_path: Path) -> None:
    amazon_folder(tmp_path)
    path = tmp_path / "meta_X.json.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    with pytest.raises(DataError, match="meta_X.json.gz: the gzip file is (truncated|damaged)"):
        read({"kind": "amazon", "path": str(tmp_path)}, tmp_path)
    path.write_bytes(whole[:40] + bytes([whole[40] ^ 255]) + whole[41:])
    with pytest.raises(DataError, match="meta_X.json.gz: the gzip file is (truncated|damaged)"):
        read({"kind": "amazon", "path": str(tmp_path)}, tmp_path)


def test_members_of_a_gzip_file_follow_each_other(tmp_path: Path) -> None:
    amazon_folder(tmp_path)
    path = tmp_path / "meta_X.json.gz"
    path.write_bytes(path.read_bytes() + gzip.compress(b"{'asin': 'B3', 'title': 'third'}\n"))
    items, *_ = read({"kind": "amazon", "path": str(tmp_path)}, tmp_path)
    assert items["source_id"].to_pylist() == ["B1", "B2", "B3"]


def test_no_usable_field_names_the_fields_found(tmp_path: Path) -> None:
    amazon_folder(tmp_path)
    write(tmp_path / "meta_X.json.gz", [{"asin": "B1", "nom": "savon", "marque": "F"}])
    with pytest.raises(DataError, match=r"fields found: asin \(1\), nom \(1\), marque \(1\).*data.kind=tables"):
        read({"kind": "amazon", "path": str(tmp_path)}, tmp_path)


def test_a_folder_without_the_files_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"needs meta_.*it contains notes.txt"):
        read({"kind": "amazon", "path": str(tmp_path)}, tmp_path)
    with pytest.raises(DataError, match="does not exist; correct data.path"):
        read({"kind": "amazon", "path": str(tmp_path / "nowhere")}, tmp_path)


def test_a_5_core_file_hides_the_reviews_of_its_own_category_only(tmp_path: Path, caplog: Any) -> None:
    write(tmp_path / "meta_X.json.gz", [{"asin": "B1", "title": "T"}])
    for name, item in (("reviews_X_5", "B1"), ("reviews_X", "B2"), ("reviews_Y", "B3"), ("Z_5", "B4"), ("Z", "B5")):
        row = {"reviewerID": "U", "asin": item, "unixReviewTime": 1_400_000_000}
        write(tmp_path / f"{name}.json.gz", [row])
    with caplog.at_level("INFO"):
        _, events, *_ = read({"kind": "amazon", "path": str(tmp_path)}, tmp_path)
    assert sorted(events["item"].to_pylist()) == ["B1", "B3", "B4"]
    assert f"interactions: {tmp_path / 'reviews_Y.json.gz'} (" in caplog.text  # the files that are read, with sizes


# --- tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["parquet", "csv", "csv.gz", "jsonl", "jsonl.gz"])
def test_tables_of_every_format_read_alike(form: str, tmp_path: Path) -> None:
    items = pa.table({"sku": ["1", "2", None], "name": ["x, y", "z\n", "no id"], "price": ["1.5", None, None]})
    events = pa.table(
        {"who": ["u", "v", None], "sku": ["1", "2", "2"], "at": ["1400000000", "2014-05-13T16:53:21", "1400000000"]}
    )
    paths = []
    for name, table in (("items", items), ("events", events)):
        path = tmp_path / f"{name}.{form}"
        if form == "parquet":
            pq.write_table(table, path)
        elif form.startswith("csv"):
            sink = pa.BufferOutputStream()
            pcsv.write_csv(table, sink)
            data = sink.getvalue().to_pybytes()
            path.write_bytes(gzip.compress(data) if form.endswith("gz") else data)
        else:
            write(path, table.to_pylist(), compress=form.endswith("gz"))
        paths.append([str(path)])
    names = {"item_id": "sku", "user_id": "who", "time": "at"}
    read_items, read_events, item_ledger, event_ledger = read(
        {"kind": "tables", "items": paths[0], "interactions": paths[1], **names}, tmp_path
    )
    assert [row["source_id"] for row in read_items.to_pylist()] == ["1", "2"]
    assert [row["name"].strip() for row in read_items.to_pylist()] == ["x, y", "z"]
    assert read_events.to_pylist() == [
        {"user": "u", "item": "1", "time": 1_400_000_000_000_000},
        {"user": "v", "item": "2", "time": 1_400_000_001_000_000},
    ]
    assert (item_ledger.kept, item_ledger.skipped.total()) == (2, 1)
    assert (event_ledger.kept, event_ledger.skipped.total()) == (2, 1)
    line = 4 if form.startswith("csv") else 3  # the header is a line, too
    assert event_ledger.examples[0].endswith(f"events.{form}:{line}: no who or sku")


def test_a_missing_column_names_those_that_are_there(tmp_path: Path) -> None:
    values = tables(tmp_path) | {"time": "when"}
    with pytest.raises(DataError, match=r"no column when; columns found: user_id, item_id, timestamp"):
        read(values, tmp_path)


def test_lists_and_nested_objects_in_json_lines(tmp_path: Path) -> None:
    values = tables(tmp_path)
    write(
        tmp_path / "items.jsonl",
        [{"item_id": 7, "tags": ["a", "b"], "spec": {"size": "L"}}, {"item_id": 8, "tags": "c"}],
        compress=False,
    )
    items, *_ = read(values | {"items": [str(tmp_path / "items.jsonl")]}, tmp_path)
    assert items.to_pylist() == [
        {"source_id": "7", "tags": ["a", "b"], "spec": ["size: L"]},
        {"source_id": "8", "tags": ["c"], "spec": None},
    ]


def test_csv_rows_with_too_many_columns_are_counted(tmp_path: Path) -> None:
    values = tables(tmp_path)
    (tmp_path / "items.csv").write_text("item_id,name\na,x\nb,y,z\n")
    items, _, ledger, _ = read(values | {"items": [str(tmp_path / "items.csv")]}, tmp_path)
    assert items["source_id"].to_pylist() == ["a"]
    assert ledger.skipped == {"3 columns instead of 2": 1}


def test_milliseconds_and_parquet_timestamps(tmp_path: Path) -> None:
    values = tables(tmp_path)
    stamps = pa.array([1_400_000_000_500, 1_400_000_001_500], pa.int64())
    for column, unit in ((stamps, "ms"), (stamps.cast(pa.timestamp("ms")), "s")):
        pq.write_table(
            pa.table({"user_id": ["u", "u"], "item_id": ["a", "b"], "timestamp": column}), tmp_path / "events.parquet"
        )
        _, events, *_ = read(values | {"time_unit": unit}, tmp_path)
        assert events["time"].to_pylist() == [1_400_000_000_500_000, 1_400_000_001_500_000]


def test_an_unknown_suffix_or_missing_file_is_refused(tmp_path: Path) -> None:
    values = tables(tmp_path)
    (tmp_path / "items.xlsx").touch()
    (tmp_path / "items.xlsx").write_bytes(b"PK\x03\x04...")
    with pytest.raises(DataError, match="items.xlsx: a zip archive or an Excel file"):
        read(values | {"items": [str(tmp_path / "items.xlsx")]}, tmp_path)
    with pytest.raises(DataError, match="correct data.items"):
        read(values | {"items": [str(tmp_path / "no.csv")]}, tmp_path)


# --- synthetic --------------------------------------------------------------------------------------------------


def test_synthetic_data_are_a_function_of_the_config(tmp_path: Path) -> None:
    values = {"kind": "synthetic", "items": 300, "users": 100}
    config, module = DatasetConfig.resolve(values), load_plugin("tiger.data.sources", "synthetic")
    first, again = (module.locate(config, tmp_path / name) for name in ("a", "b"))
    other = module.locate(DatasetConfig.resolve(values | {"seed": 1}), tmp_path / "a")
    assert first.items[0].read_bytes() == again.items[0].read_bytes()
    assert first.interactions[0].read_bytes() == again.interactions[0].read_bytes()
    assert first.interactions[0].read_bytes() != other.interactions[0].read_bytes()


def test_synthetic_titles_are_distinct_and_the_metadata_are_no_json(tmp_path: Path) -> None:
    values = {"kind": "synthetic", "items": 20_000, "users": 50}
    items, *_ = read(values, tmp_path)
    assert len(set(items["title"].to_pylist())) == 20_000
    path = load_plugin("tiger.data.sources", "synthetic").locate(DatasetConfig.resolve(values), tmp_path).items[0]
    with pytest.raises(json.JSONDecodeError):
        json.loads(next(lines(path))[1] or b"")


def _shop(folder: Path, **values: object) -> tuple[synthetic.Shop, list[str], list[list[int]], list[list[int]]]:
    """Return a shop, the titles of its items, and items and days of every customer."""
    config = DatasetConfig.resolve({"kind": "synthetic", **values})
    assert isinstance(config, synthetic.Config)
    table, events, *_ = read({"kind": "synthetic", **values}, folder)
    items: dict[str, list[int]] = {}
    days: dict[str, list[int]] = {}
    for user, item, time in zip(*(events[name].to_pylist() for name in ("user", "item", "time")), strict=True):
        items.setdefault(user, []).append(int(item[1:]))
        days.setdefault(user, []).append((time // 1_000_000 - synthetic._START) // synthetic._DAY)
    return synthetic.Shop.generate(config), table["title"].to_pylist(), list(items.values()), list(days.values())


def test_synthetic_customers_follow_a_routine_by_what_titles_say(tmp_path: Path) -> None:
    """Without noise the type of a purchase is the routine's next one, and properties that matter agree with the taste.

    Slow truth: one value of brand, scent, skin and size per customer explains all purchases.
    """
    shop, titles, histories, _ = _shop(tmp_path, items=2000, users=200, noise=0.0)
    agree = total = 0
    for history in histories:
        kinds = shop.kind[history]
        for before, after in itertools.pairwise(kinds.tolist()):
            assert after % 6 == (before + 1) % 6
            assert after // 6 == before // 6 or before % 6 == 5  # another department only after the last step
        told: dict[int, set[int]] = {}
        for item in history:
            for matter in synthetic._MATTERS[shop.kind[item] % 6]:
                told.setdefault(int(matter), set()).add(int(shop.values[matter, item]))
        agree += sum(len(values) == 1 for values in told.values())
        total += len(told)
    assert agree / total > 0.8  # others met a type of which no item agrees with the taste
    for item, title in enumerate(titles):
        assert synthetic._SCENTS[shop.values[1, item]] in title
        assert synthetic._SIZES[shop.values[3, item]] in title


def test_synthetic_new_items_are_not_bought_before_their_launch(tmp_path: Path) -> None:
    shop, _, histories, days = _shop(tmp_path, items=2000, users=2000)
    bought = [(item, day) for history, at in zip(histories, days, strict=True)
              for item, day in zip(history, at, strict=True)]  # fmt: skip
    assert all(shop.launch[item] <= day for item, day in bought)
    new = shop.launch > 0
    assert 0.03 < new.mean() < 0.07
    assert sum(new[item] for item, _ in bought) > 50
    counts = np.sort(np.bincount([item for item, _ in bought], minlength=2000))
    assert counts[-200:].sum() > 2.5 * counts[:600].sum()  # a tenth of the items, and the long tail


def test_synthetic_pure_noise_has_no_routine(tmp_path: Path) -> None:
    shop, _, histories, _ = _shop(tmp_path, items=600, users=1000, noise=1.0)
    steps = [pair for history in histories for pair in itertools.pairwise(history)]
    routine = np.mean([shop.kind[b] % 6 == (shop.kind[a] + 1) % 6 for a, b in steps])
    assert 0.12 < routine < 0.22  # one of six
