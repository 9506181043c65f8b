"""Faults that public bug reports and reviews found in readers, each recreated with our own input, through `prepare`."""

from __future__ import annotations

import datetime
import json
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.raw_tables import EVENTS, ITEMS, START, TITLES, events_csv, histories, items_csv, put, rows_of, run
from tiger.core.errors import DataError
from tiger.data.catalog import Catalog

# --- 05 and 17: ids -----------------------------------------------------------------------------------------------


def test_nan_is_no_user_and_big_numbers_are_whole_in_every_part(tmp_path: Path) -> None:
    parts = []
    for part, missing in enumerate((True, False)):
        users = [70_000_000_000.0 + int(user[1:]) for user, _, _ in EVENTS]
        users = [float("nan") if missing and n % 10 == 0 else user for n, user in enumerate(users)]
        columns = {"user_id": users, "item_id": [e[1] for e in EVENTS], "timestamp": [e[2] + part for e in EVENTS]}
        parts.append(tmp_path / f"part-{part}.parquet")
        pq.write_table(pa.table(columns), parts[-1])
    artifact = run(tmp_path, items_csv(tmp_path), parts, max_bad_row_fraction=0.1)
    assert list(histories(artifact)) == [f"7000000000{n}" for n in range(8)]
    assert rows_of(artifact)["skipped"] == {"no user_id or item_id": 4}


def test_a_number_is_one_id_in_every_format(tmp_path: Path) -> None:
    """17 and 17.0 are one id, in text and as numbers; 017, 1e1 and 17.5 are others."""
    csv = events_csv(
        tmp_path, [("7", "17", START), ("7.0", "17.0", START + 1), ("07", "017", START + 2), ("7.5", "1e1", START + 3)]
    )
    lines = [{"user_id": 7, "item_id": 17.0, "timestamp": START + 4},
             {"user_id": "7.0", "item_id": "17", "timestamp": START + 5},
             {"user_id": 7.5, "item_id": "017", "timestamp": START + 6}]  # fmt: skip
    jsonl = put(tmp_path / "e.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    parts = []
    for n, (user, item) in enumerate(((7.0, 17), (7, 17.0), (Decimal("7.00"), "17.0"))):
        parts.append(tmp_path / f"e{n}.parquet")
        pq.write_table(pa.table({"user_id": [user], "item_id": [item], "timestamp": [START + 7 + n]}), parts[-1])
    items = put(tmp_path / "i.csv", "item_id,title,maker\n17.0,Walnut bowl,m\n017,Copper lamp,m\n1e1,Slate stool,m\n")
    artifact = run(tmp_path, items, [csv, jsonl, *parts], catalog={"duplicates": "all"})
    assert histories(artifact) == {"07": ["017"], "7": ["17"] * 7, "7.5": ["1e1", "017"]}


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_na_null_and_nan_are_ids_and_titles_like_any_other(form: str, tmp_path: Path) -> None:
    names = ["NA", "null", "nan", "None", "N/A", "007"]
    items = {"item_id": names, "title": ["NaN", "Null", "n/a", "#N/A", "None", "NULL"], "maker": ["m"] * 6}
    events = {
        "user_id": names * 4,
        "item_id": [name for shift in range(4) for name in names[shift:] + names[:shift]],
        "timestamp": [START + n for n in range(24)],
    }
    paths = []
    for name, columns in (("items", items), ("events", events)):
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        paths.append(tmp_path / f"{name}.{form}")
        if form == "parquet":
            pq.write_table(pa.table(columns), paths[-1])
        elif form == "jsonl":
            put(paths[-1], "".join(json.dumps(row) + "\n" for row in rows))
        else:
            put(paths[-1], "\n".join([",".join(columns), *(",".join(map(str, row.values())) for row in rows)]))
    artifact = run(tmp_path, *paths)
    assert set(histories(artifact)) == set(names)
    assert dict(zip(Catalog(artifact).source_ids, Catalog(artifact).items["title"].to_pylist(), strict=True)) == dict(
        zip(names, items["title"], strict=True)
    )


# --- 08: names of columns -----------------------------------------------------------------------------------------


def test_columns_may_have_the_catalogs_own_names(tmp_path: Path) -> None:
    lines = ["sku,item_id,source_id,text,field_text,maker"]
    lines += [f"{name},x{n},{ITEMS[(n + 1) % 12]},{TITLES[n]},other {n},m" for n, name in enumerate(ITEMS)]
    items = put(tmp_path / "i.csv", "\n".join(lines))
    events = events_csv(tmp_path, header="user_id,sku,timestamp")
    fields = {"text_fields": ["text", "source_id", "item_id", "field_text"]}
    table = Catalog(run(tmp_path, items, events, item_id="sku", catalog=fields)).items
    assert table["source_id"].to_pylist() == ITEMS
    assert table["text"][3].as_py() == f"{TITLES[3]}. p04. x3. other 3"


def test_a_name_that_stands_twice_in_the_header_is_one_line(tmp_path: Path) -> None:
    items = put(tmp_path / "i.csv", "item_id,title,title\np00,a,b\n")
    with pytest.raises(DataError, match=r"i.csv: the header contains title more than once"):
        run(tmp_path, items, events_csv(tmp_path))


# --- 09 and 10: parts and types -----------------------------------------------------------------------------------


def test_parts_are_joined_by_name_and_widened(tmp_path: Path) -> None:
    n = pa.array(range(4))
    tables = [
        pa.table({"item_id": ITEMS[:4], "title": TITLES[:4], "maker": ["m"] * 4, "price": n}),
        pa.table({"price": [0.5] * 4, "maker": pa.nulls(4), "title": TITLES[4:8], "item_id": ITEMS[4:8]}),
        pa.table({"title": TITLES[8:], "item_id": ITEMS[8:], "more": [["a", "b"]] * 4}),
    ]
    parts = [tmp_path / f"part-{i}.parquet" for i in range(3)]
    for path, table in zip(parts, tables, strict=True):
        pq.write_table(table, path)
    parts.append(put(tmp_path / "part-3.jsonl", '{"item_id": "p99", "title": "late", "more": "c"}\n'))
    events = events_csv(tmp_path, [*EVENTS, ("c0", "p99", START)])
    fields = {"text_fields": ["title", "maker", "price", "more"]}
    table = Catalog(run(tmp_path, parts, events, fields)).items
    assert table["source_id"].to_pylist() == [*ITEMS, "p99"]
    assert table["price"].to_pylist() == ["0", "1", "2", "3", *["0.5"] * 4, *[None] * 5]
    assert table["more"].to_pylist()[7:] == [None, *[["a", "b"]] * 4, ["c"]]


def test_arrow_types_of_ids_and_times(tmp_path: Path) -> None:
    keys = [uuid.UUID(int=2**127 + n).bytes for n in range(8)]
    micros = [row[2] * 1_000_000 + 123_456 for row in EVENTS]
    times = [
        pa.array([m * 1000 + 789 for m in micros], pa.timestamp("ns", "UTC")),
        pa.array([Decimal(m) / 1_000_000 for m in micros], pa.decimal128(20, 6)),
        pa.array(micros, pa.timestamp("us", "Asia/Tokyo")),
    ]
    users = [keys[int(row[0][1:])] for row in EVENTS]
    kinds = [
        pa.array(users, pa.binary(16)),
        pa.array(users, pa.uuid()),
        pa.array([str(uuid.UUID(bytes=u)) for u in users]),
    ]
    items = [pa.array([row[1] for row in EVENTS], kind) for kind in (pa.string_view(), pa.large_string(), pa.string())]
    found = []
    for n, columns in enumerate(zip(kinds, items, times, strict=True)):
        path = tmp_path / f"e{n}.parquet"
        pq.write_table(pa.table(dict(zip(["user_id", "item_id", "timestamp"], columns, strict=True))), path)
        artifact = run(tmp_path / str(n), items_csv(tmp_path), path)
        table = artifact.folder.read_table("histories.parquet")
        found.append((table["source_id"].to_pylist(), table["times"].to_pylist(), table["items"].to_pylist()))
    assert found[0] == found[1] == found[2]
    assert found[0][0][0] == str(uuid.UUID(int=2**127))
    assert found[0][1][0][0] == micros[0]


def test_nested_values_become_readable(tmp_path: Path) -> None:
    table = pa.table({
        "item_id": ITEMS,
        "title": TITLES,
        "maker": [{"name": "Fern", "since": {"year": 1990}}] * 12,
        "spec": pa.array([[("size", "L"), ("age", None)]] * 12, pa.map_(pa.string(), pa.string())),
        "parts": [[{"name": "leg", "count": 4}, {"name": "top", "count": 1}]] * 12,
    })  # fmt: skip
    pq.write_table(table, tmp_path / "i.parquet")
    line = {"item_id": "z", "title": True, "maker": {"name": "Fern", "since": {"year": 1990}},
            "spec": {"size": "L", "age": None},
            "parts": [{"name": "leg", "count": 4}, {"name": "top", "count": 1.0}]}  # fmt: skip
    put(tmp_path / "i.jsonl", json.dumps(line) + "\n" + json.dumps(line | {"item_id": "y"}))
    events = events_csv(tmp_path, [*EVENTS, ("c0", "z", START)])
    fields = {"text_fields": ["title", "maker", "spec", "parts"]}
    table = Catalog(run(tmp_path, [tmp_path / "i.parquet", tmp_path / "i.jsonl"], events, catalog=fields)).items
    rest = "name: Fern > since: year: 1990. size: L. name: leg, count: 4 > name: top, count: 1"
    assert [table["text"][0].as_py(), table["text"][12].as_py()] == [f"{TITLES[0]}. {rest}", f"true. {rest}"]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "user_id",
            [["a"]] * 40,
            r"e.parquet: column user_id has type list<.*>; an id must be text or a number. Set data.user_id",
        ),
        ("user_id", [True] * 40, r"column user_id has type bool"),
        ("timestamp", [{"a": 1}] * 40, r"column timestamp has type struct<.*>, not times; set data.time"),
        ("timestamp", ["soon"] * 40, r"e.parquet:1: timestamp is not a time \('soon'; set data.time_format"),
        ("timestamp", [1e300] * 40, r"e.parquet:1: timestamp is outside the years"),
    ],
)
def test_a_column_that_cannot_be_read_is_one_line(column: str, values: list[Any], message: str, tmp_path: Path) -> None:
    columns = dict(zip(["user_id", "item_id", "timestamp"], map(list, zip(*EVENTS, strict=True)), strict=True))
    pq.write_table(pa.table(columns | {column: values}), tmp_path / "e.parquet")
    with pytest.raises(DataError, match=message):
        run(tmp_path, items_csv(tmp_path), tmp_path / "e.parquet")


# --- 11: MongoDB and odd rows -------------------------------------------------------------------------------------


def test_extended_json_is_unwrapped(tmp_path: Path) -> None:
    stamp = datetime.datetime.fromtimestamp
    rows = [
        {"_id": {"$oid": f"{n:024x}"}, "user": {"$numberLong": user[1:]}, "item": {"$oid": item},
         "at": {"$date": stamp(time, datetime.UTC).isoformat() if n % 2 else {"$numberLong": str(time * 1000)}}}
        for n, (user, item, time) in enumerate(EVENTS)
    ]  # fmt: skip
    odd, even = (put(tmp_path / f"e{k}.jsonl", "".join(json.dumps(row) + "\n" for row in rows[k::2])) for k in (1, 0))
    for path, unit in ((odd, "s"), (even, "ms")):
        artifact = run(
            tmp_path,
            items_csv(tmp_path),
            path,
            user_id="user",
            items_id="item_id",
            item_id="item",
            time="at",
            time_unit=unit,
        )
        assert rows_of(artifact)["kept"] == 20


def test_one_odd_row_is_one_bad_row(tmp_path: Path) -> None:
    rows = [dict(zip(["user_id", "item_id", "timestamp"], row, strict=True)) for row in EVENTS]
    rows[5] |= {"item_id": ["p00", "p01"]}
    rows[6] |= {"timestamp": {"at": 1}}
    rows[7] |= {"user_id": False}
    path = put(tmp_path / "e.jsonl", "\ufeff" + "\r".join(json.dumps(row) for row in rows))
    artifact = run(tmp_path, items_csv(tmp_path), path, max_bad_row_fraction=0.1)
    record = rows_of(artifact)
    assert (record["kept"], sum(record["skipped"].values())) == (37, 3)
    assert [example.removeprefix(f"{path}:")[:18] for example in record["examples"]] == [
        "6: item_id is a li", "7: timestamp is an", "8: user_id is true"
    ]  # fmt: skip


# --- splits by time -----------------------------------------------------------------------------------------------


def test_a_split_by_time_without_validation_users_is_refused(tmp_path: Path) -> None:
    rows = [(user, item, START + 86_400 * (step % 2)) for step, (user, item, _) in enumerate(EVENTS)]
    with pytest.raises(
        DataError, match='catalog.split = "temporal" leaves no validation users.*catalog.valid_fraction'
    ):
        run(tmp_path, items_csv(tmp_path), events_csv(tmp_path, rows), catalog={"split": "temporal"})
