"""Faults that public bug reports and reviews found in readers, each recreated with our own input, through `prepare`."""

from __future__ import annotations

import datetime
import gzip
import json
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tiger.core import storage
from tiger.core.artifacts import Artifact
from tiger.core.config import build, load_plugin
from tiger.core.errors import ConfigError, DataError
from tiger.data.catalog import Catalog
from tiger.data.sources.base import DatasetConfig, RowCounts
from tiger.pipeline.prepare import prepare
from tiger.run import RunConfig

ITEMS = [f"p{n:02d}" for n in range(12)]
TITLES = [f"{a} {b}" for a in ("Linen", "Walnut", "Copper", "Slate") for b in ("Bowl", "Stool", "Lamp")]
START = 1_450_000_000
EVENTS = [(f"c{user}", ITEMS[(3 * user + 2 * step) % 12], START + 1000 * user + 60 * step)
          for user in range(8) for step in range(5)]  # fmt: skip


def items_csv(folder: Path, header: str = "item_id,title,maker") -> Path:
    lines = [
        header,
        *(f"{name},{title} no {n},m{n % 3}" for n, (name, title) in enumerate(zip(ITEMS, TITLES, strict=True))),
    ]
    return put(folder / "items.csv", "\n".join(lines) + "\n")


def events_csv(
    folder: Path, rows: Any = EVENTS, header: str = "user_id,item_id,timestamp", name: str = "events.csv"
) -> Path:
    return put(folder / name, "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")


def put(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def run(folder: Path, items: Any, interactions: Any, catalog: dict[str, Any] | None = None, **data: Any) -> Artifact:
    names = {"items": items, "interactions": interactions}
    paths = {
        key: [str(each) for each in (value if isinstance(value, list) else [value])] for key, value in names.items()
    }
    values = {
        "root": str(folder / "runs"),
        "data": {"kind": "tables", **paths, **data},
        "catalog": {"text_fields": ["title", "maker"], "k_core": 0, **(catalog or {})},
    }
    return prepare(build(RunConfig, values))


def histories(artifact: Artifact) -> dict[str, list[str]]:
    catalog = Catalog(artifact)
    names, found = catalog.source_ids, catalog.histories
    return {user: [names[item] for item in found.of(row)] for row, user in enumerate(found.source_ids)}


def truth(rows: Any = EVENTS) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for user, item, _ in sorted(rows, key=lambda row: row[2]):
        found.setdefault(str(user), []).append(item)
    return found


def rows_of(artifact: Artifact, table: str = "interactions") -> dict[str, Any]:
    return artifact.metrics["rows"][table]


# --- 02: quotes ---------------------------------------------------------------------------------------------------


def test_a_stray_quote_spoils_its_own_line_only(tmp_path: Path) -> None:
    lines = events_csv(tmp_path).read_text().splitlines()
    lines[7], lines[22] = '"' + lines[7], '"' + lines[22]
    path = put(tmp_path / "stray.csv", "\n".join(lines) + "\n")
    artifact = run(tmp_path, items_csv(tmp_path), path, max_bad_row_fraction=0.1)
    record = rows_of(artifact)
    assert (record["read"], record["kept"], record["lines"], record["extra_lines"]) == (40, 38, 41, 1)
    assert record["examples"][0].startswith(f"{path}:8: a quote opens here")
    with pytest.raises(DataError, match=r'stray.csv:8: a quote opens here.*"c1.*data.quote = ""'):
        run(tmp_path / "again", items_csv(tmp_path), path)


def test_a_stray_quote_that_closes_thirty_rows_later_swallows_none_of_them(tmp_path: Path) -> None:
    lines = events_csv(tmp_path).read_text().splitlines()
    lines[3] = lines[3].replace(",p", ',"p', 1)
    lines[33] = lines[33].rpartition(",")[0] + '",1'  # closes at the end of an id: the joined row has three fields
    artifact = run(tmp_path, items_csv(tmp_path), put(tmp_path / "e.csv", "\n".join(lines)), max_bad_row_fraction=0.1)
    assert rows_of(artifact)["kept"] == 38


def test_quotes_can_be_text(tmp_path: Path) -> None:
    path = put(tmp_path / "i.csv", 'item_id,title,maker\np00,"Bowl,m\np01,5" pipe,"m"\np02,Lamp,m\np03,Jug,m\n')
    events = events_csv(tmp_path, [("u", f"p0{n}", START + n) for n in range(4)])
    table = Catalog(run(tmp_path, path, events, quote="")).items
    assert table["title"].to_pylist() == ['"Bowl', '5" pipe', "Lamp", "Jug"]


def test_lines_breaks_in_quotes_are_one_row_and_lines_stay_physical(tmp_path: Path) -> None:
    rest = "p01,Lamp\np02,Lamp of tin,m\np03,Jug,m\np04,Pan,m\n"
    path = put(tmp_path / "i.csv", f'item_id,title,maker\np00,"Bowl\nof, oak",m\n\n{rest}')
    events = events_csv(tmp_path, [("u", name, START + n) for n, name in enumerate(["p00", "p02", "p03", "p04"])])
    artifact = run(tmp_path, path, events, max_bad_row_fraction=0.5)
    assert Catalog(artifact).items["title"].to_pylist() == ["Bowl of, oak", "Lamp of tin", "Jug", "Pan"]
    assert rows_of(artifact, "items")["examples"] == [f"{path}:5: 2 columns instead of 3"]


def test_one_undecodable_byte_and_one_overlong_line_are_two_bad_rows(tmp_path: Path) -> None:
    lines = events_csv(tmp_path).read_bytes().splitlines()
    lines[4], lines[9] = lines[4].replace(b"c", b"\xe9"), b"x" * (9 << 20)
    artifact = run(tmp_path, items_csv(tmp_path), put(tmp_path / "e.csv", b"\n".join(lines)), max_bad_row_fraction=0.1)
    assert rows_of(artifact)["skipped"] == {"not UTF-8": 1, "line longer than 8,388,608 bytes": 1}
    assert ":5: not UTF-8" in rows_of(artifact)["examples"][0]
    assert ":10: line longer" in rows_of(artifact)["examples"][1]


def test_a_field_of_three_megabytes_is_read(tmp_path: Path) -> None:
    path = put(
        tmp_path / "i.csv", f'item_id,title,maker\np00,"{"long, " * 500_000}",m\np01,Lamp,m\np02,Jug,m\np03,Pan,m\n'
    )
    events = events_csv(tmp_path, [("u", f"p0{n}", START + n) for n in range(4)])
    assert len(Catalog(run(tmp_path, path, events)).items["title"][0].as_py()) > 2_900_000


# --- 03: times within a second ------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_the_order_within_a_second_is_the_truth(unit: str, tmp_path: Path) -> None:
    scale = {"ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    rows = [(f"c{u}", ITEMS[n], START * scale + (5 * n) % 12 * scale // 20) for u in range(3) for n in range(12)]
    artifact = run(
        tmp_path, items_csv(tmp_path), events_csv(tmp_path, rows), time_unit=unit, catalog={"duplicates": "all"}
    )
    assert histories(artifact) == truth(rows)


def test_plays_within_a_second_are_not_equal(tmp_path: Path) -> None:
    rows = [("c0", ITEMS[0], START * 1000 + 300 * n) for n in range(30)] + [
        ("c1", ITEMS[1], START * 1000 + n) for n in range(5)
    ]
    artifact = run(
        tmp_path, items_csv(tmp_path), events_csv(tmp_path, rows), time_unit="ms", catalog={"duplicates": "all"}
    )
    assert artifact.metrics["interactions"] == 35


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
    table = Catalog(run(tmp_path, parts, events)).items
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


# --- 12: one row per user -----------------------------------------------------------------------------------------


def lists() -> dict[str, list[str]]:
    return truth()


def test_a_history_per_row_in_every_format(tmp_path: Path) -> None:
    users = lists()
    rows = [{"who": user, "seen": items} for user, items in users.items()]
    files = {
        "list.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "text.jsonl": "".join(json.dumps({"who": r["who"], "seen": " ".join(r["seen"])}) + "\n" for r in rows),
        "text.csv": "who,seen\n" + "".join(f"{r['who']},{' '.join(r['seen'])}\n" for r in rows),
        "json.csv": "who;seen\n" + "".join(f"{r['who']};{json.dumps(r['seen'])}\n".replace('"', "'") for r in rows),
        "array.json": json.dumps(rows, indent=1),
        "map.json": json.dumps(users),
        "pretty.json": json.dumps(users, indent=4),
    }
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
    for name, text in files.items():
        put(tmp_path / name, text)
    for name in [*files, "list.parquet"]:
        artifact = run(tmp_path / f"{name}.out", items_csv(tmp_path), tmp_path / name, user_id="who", history="seen")
        assert histories(artifact) == users, name
        assert rows_of(artifact)["read"] == 8


def test_lightgcn_lines(tmp_path: Path) -> None:
    users = lists()
    path = put(tmp_path / "train.txt", "".join(f"{user} {' '.join(items)}\n" for user, items in users.items()) + "c9\n")
    names = {"columns": {"interactions": ["user_id", "history"]}, "history": "history"}
    artifact = run(tmp_path, items_csv(tmp_path), path, **names)
    assert histories(artifact) == users
    assert rows_of(artifact)["left_out"] == {"empty history": 1}


def test_documents_by_id_are_recognized(tmp_path: Path) -> None:
    items = {name: {"title": title, "maker": "m"} for name, title in zip(ITEMS, TITLES, strict=True)}
    inter = put(tmp_path / "inter.json", json.dumps(lists(), indent=2))
    for name, text in (("one.json", json.dumps(items)), ("many.json", json.dumps(items, indent=2))):
        artifact = run(tmp_path / name, put(tmp_path / f"d{name}", text), inter)
        assert histories(artifact) == lists()
        assert Catalog(artifact).items["title"].to_pylist() == TITLES
    broken = put(tmp_path / "broken.json", json.dumps(items, indent=2)[:-40])
    with pytest.raises(DataError, match=r"broken.json:\d+: not a valid JSON document"):
        run(tmp_path, broken, inter)
    with pytest.raises(DataError) as error:
        run(tmp_path, put(tmp_path / "wide.json", json.dumps([{f"k{n}": n for n in range(900)}])), inter)
    assert "and 890 more" in str(error.value)
    assert len(str(error.value)) < 500


# --- 13: text tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", "\t", ";", "|", "::"])
@pytest.mark.parametrize("header", [True, False])
def test_separators_and_headers(separator: str, header: bool, tmp_path: Path) -> None:
    lines = [separator.join(map(str, row)) for row in EVENTS]
    names = ["user_id", "item_id", "timestamp"]
    path = put(tmp_path / "ratings.dat", "\r\n".join([separator.join(names)] * header + lines))
    if header:
        assert histories(run(tmp_path, items_csv(tmp_path), path)) == truth()
        return
    with pytest.raises(DataError, match=r"no column user_id, item_id, timestamp; .*list the names in data.columns"):
        run(tmp_path, items_csv(tmp_path), path)
    assert histories(run(tmp_path, items_csv(tmp_path), path, columns=names)) == truth()


def test_the_error_shows_the_separator(tmp_path: Path) -> None:
    path = put(tmp_path / "items.csv", "id;title;maker\np00;a;b\n")
    with pytest.raises(
        DataError, match=r"""columns found: id, title, maker\. .*contains ';' and no ',': set data.separator = ";".*"""
    ):
        run(tmp_path, path, events_csv(tmp_path))


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-16-le", "utf-8-sig"])
def test_encodings(encoding: str, tmp_path: Path) -> None:
    text = items_csv(tmp_path).read_text().replace("Linen", "Crème")
    path = put(
        tmp_path / "i.csv", gzip.compress(text.encode(encoding)) if encoding == "cp1252" else text.encode(encoding)
    )
    marked = encoding in ("utf-16", "utf-8-sig")  # a byte order mark decides
    events = events_csv(tmp_path)
    artifact = run(tmp_path, path, events, **({} if marked else {"encoding": {"items": encoding}}))
    assert Catalog(artifact).items["title"][0].as_py() == "Crème Bowl no 0"


def test_a_byte_that_is_not_utf8_names_the_key(tmp_path: Path) -> None:
    path = put(tmp_path / "i.csv", items_csv(tmp_path).read_text().replace("Linen", "Crème").encode("latin-1"))
    with pytest.raises(DataError, match=r"i.csv:2: not UTF-8 \(byte 0xe8 in .*data.encoding"):
        run(tmp_path, path, events_csv(tmp_path))


def test_typed_headers_and_quoted_line_breaks(tmp_path: Path) -> None:
    inter = events_csv(tmp_path, header="user_id:token,item_id:token,timestamp:float", name="x.inter")
    assert histories(run(tmp_path, items_csv(tmp_path), inter)) == truth()
    whole = {"user_id": "user_id:token", "item_id": "item_id:token", "items_id": "item_id", "time": "timestamp:float"}
    assert histories(run(tmp_path, items_csv(tmp_path), inter, **whole)) == truth()
    items = items_csv(tmp_path, header='item_id,title,"maker\n(EU)"')
    assert histories(run(tmp_path, items, inter, catalog={"text_fields": ["title", "maker\n(EU)"]})) == truth()


# --- 14: times ----------------------------------------------------------------------------------------------------

FORMS = {
    "%m/%d/%Y %I:%M:%S %p": "%m/%d/%Y %I:%M:%S %p",
    "%a %b %d %H:%M:%S %z %Y": "%a %b %d %H:%M:%S +0000 %Y",
    "%d-%b-%Y": "%d-%b-%Y",
    "%Y/%m/%d %H:%M": "%Y/%m/%d %H:%M",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_time_format(form: str, tmp_path: Path) -> None:
    rows = [
        (user, item, datetime.datetime.fromtimestamp(time, datetime.UTC).strftime(FORMS[form]))
        for user, item, time in EVENTS
    ]
    path = events_csv(tmp_path, rows)
    with pytest.raises(DataError, match=r'data.time_format = "') as error:
        run(tmp_path, items_csv(tmp_path), path)
    assert form in str(error.value)
    assert str(error.value).count("timestamp is not a time") == 2  # the reason, and one example of it
    assert histories(run(tmp_path, items_csv(tmp_path), path, time_format=form)) == truth()


def test_several_formats_and_utc(tmp_path: Path) -> None:
    rows = []
    for n, (user, item, time) in enumerate(EVENTS):
        moment = datetime.datetime.fromtimestamp(time, datetime.UTC)
        rows.append((user, item, moment.strftime("%Y-%m-%d %H:%M:%S UTC" if n % 2 else "%d.%m.%Y %H:%M:%S")))
    path = events_csv(tmp_path, rows)
    formats = ["%d.%m.%Y %H:%M:%S", "%Y-%m-%d %H:%M:%S %Z"]
    assert histories(run(tmp_path, items_csv(tmp_path), path, time_format=formats)) == truth()
    assert histories(run(tmp_path, items_csv(tmp_path), events_csv(tmp_path, rows[1::2]))) == truth(EVENTS[1::2])


def test_ordinals_and_no_time(tmp_path: Path) -> None:
    rows = [(user, item, 4 - step) for step, (user, item, _) in enumerate(EVENTS[:5])]
    rows += [(user, item, step + 0.5) for step, (user, item, _) in enumerate(EVENTS[5:10])]
    path = events_csv(tmp_path, rows)
    assert histories(run(tmp_path, items_csv(tmp_path), path, time_unit="order")) == truth(rows)
    path = events_csv(tmp_path, [row[:2] for row in EVENTS], header="user_id,item_id")
    assert histories(run(tmp_path, items_csv(tmp_path), path, time="")) == truth()
    with pytest.raises(DataError, match="no column timestamp; columns found: user_id, item_id. Set data.time"):
        run(tmp_path, items_csv(tmp_path), path)


@pytest.mark.parametrize(
    ("factor", "hint"),
    [(10**3, '"ms"'), (10**6, '"us"'), (10**9, '"ns"'), (1, "other bounds: data.years")],
)
def test_a_time_out_of_bounds_shows_the_unit_that_fits(factor: int, hint: str, tmp_path: Path) -> None:
    rows = [(user, item, (time if factor > 1 else time - 10**9) * factor) for user, item, time in EVENTS]
    with pytest.raises(
        DataError, match=r"events.csv:2: timestamp is outside the years 1990 to 2100 \('\d+' in seconds is"
    ) as error:
        run(tmp_path, items_csv(tmp_path), events_csv(tmp_path, rows))
    assert hint in str(error.value)
    fix: dict[str, Any] = {"time_unit": hint.strip('"')} if factor > 1 else {"years": [1970, 2000]}
    assert histories(run(tmp_path, items_csv(tmp_path), events_csv(tmp_path, rows), **fix)) == truth()


# --- 15, 18: other names, long format, filters --------------------------------------------------------------------


def test_the_id_may_have_another_name_among_the_items(tmp_path: Path) -> None:
    items = put(
        tmp_path / "i.jsonl",
        "".join(f"{{u'id': u'{i}', u'title': u'{t}', u'maker': u'm'}}\n" for i, t in zip(ITEMS, TITLES, strict=True)),
    )
    events = events_csv(tmp_path, header="user_id,product_id,timestamp")
    with pytest.raises(DataError, match=r"no column product_id; columns found: id, title, maker\. Set .*data.items_id"):
        run(tmp_path, items, events, item_id="product_id")
    assert histories(run(tmp_path, items, events, item_id="product_id", items_id="id")) == truth()


def test_properties_in_long_format(tmp_path: Path) -> None:
    lines = ["timestamp,item_id,key,val"]
    for n, name in enumerate(ITEMS):
        lines += [f"{START},{name},title,old", f"{START + 9},{name},title,{TITLES[n]}", f"{START},{name},maker,m{n}"]
        lines += [f"{START + 1},{name},title,older", f"{START},{name},hash,{n}"]
    items, names = put(tmp_path / "i.csv", "\n".join(lines)), {"property": "key", "value": "val"}
    table = Catalog(run(tmp_path, items, events_csv(tmp_path), **names)).items
    assert table["title"].to_pylist() == TITLES
    assert table["hash"][11].as_py() == "11"
    few = Catalog(run(tmp_path, items, events_csv(tmp_path), **names, properties=["maker", "title"])).items
    assert "hash" not in few.column_names
    with pytest.raises(DataError, match="data.properties contains color; column key has no such value"):
        run(tmp_path, items, events_csv(tmp_path), **names, properties=["color"])


def test_further_rows_of_items_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    items = put(
        tmp_path / "i.csv",
        "item_id,title,maker\n" + "".join(f"{i},{t},{m}\n" for m in "ab" for i, t in zip(ITEMS, TITLES, strict=True)),
    )
    run(tmp_path, items, events_csv(tmp_path))
    assert "12 of 24 item rows are duplicates" in caplog.text


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        (["rating >= 4"], 2), (["rating > 3.5", 'event = "buy"'], 1), (['event in ["buy", "cart"]'], 3),
        (["event != buy"], 2),
        (["rating = 4"], 1), (["`n sold` < 0"], 1),
    ],
)  # fmt: skip
def test_filters(filters: list[str], kept: int, tmp_path: Path) -> None:
    header = "user_id,item_id,timestamp,rating,event,n sold"
    rows = [("a", "p00", START, 5, "buy", 1), ("a", "p01", START + 1, "4.0", "cart", -1),
            ("a", "p02", START + 2, 3, "buy", 2),
            ("b", "p00", START, "", "view", 3), ("b", "p01", START, "1e0", "", "")]  # fmt: skip
    events = events_csv(tmp_path, rows, header)
    values = {"kind": "tables", "items": [str(items_csv(tmp_path))], "interactions": [str(events)], "filters": filters}
    config, source, ledger = (
        DatasetConfig.resolve(values),
        load_plugin("tiger.data.sources", "tables"),
        RowCounts("interactions"),
    )
    read = [
        row
        for batch in source.read_interactions(config, source.locate(config, tmp_path), ledger)
        for row in batch.to_pylist()
    ]
    assert (len(read), ledger.left_out.total(), ledger.skipped.total()) == (kept, 5 - kept, 0)


def test_a_filter_that_cannot_be_parsed_is_refused(tmp_path: Path) -> None:
    for text, message in (
        ("rating", "is not a filter"),
        ("rating > high", "> compares numbers"),
        ("a in 1", "in requires a list"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(tmp_path, items_csv(tmp_path), events_csv(tmp_path), filters=[text])
    with pytest.raises(DataError, match="no column stars; .*data.filters"):
        run(tmp_path, items_csv(tmp_path), events_csv(tmp_path), filters=["stars > 1"])


# --- 20: folders and globs ----------------------------------------------------------------------------------------


def test_folders_of_parts_and_globs(tmp_path: Path) -> None:
    folder = tmp_path / "events.parquet"
    (folder / "day=2").mkdir(parents=True)
    for n in range(4):
        part = folder / (f"day=2/part-{n}.parquet" if n % 2 else f"part-{n}.parquet")
        columns = zip(["user_id", "item_id", "timestamp"], map(list, zip(*EVENTS[n::4], strict=True)), strict=True)
        pq.write_table(pa.table(dict(columns)), part)
    for junk in ("_SUCCESS", ".part-0.parquet.crc", "_temporary/part-9.parquet"):
        put(folder / junk, b"junk")
    assert histories(run(tmp_path, items_csv(tmp_path), folder)) == truth()
    globs = [folder / "part-*.parquet", folder / "day=*/part-?.parquet"]
    assert histories(run(tmp_path, items_csv(tmp_path), globs)) == truth()
    assert histories(run(tmp_path, items_csv(tmp_path), folder / "**/part-*.parquet")) == truth()
    assert histories(run(tmp_path, items_csv(tmp_path), f"file://{folder}")) == truth()
    for name, message in (("none-*.csv", "no file matches .*none.*; correct data.interactions"),
                          ("nowhere.csv", "nowhere.csv does not exist; correct data.interactions"),
                          ("nothing://bucket/x", "cannot be opened: .*; correct data.interactions")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            run(tmp_path, items_csv(tmp_path), name)


def test_raw_files_on_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import fs as pafs

    store = tmp_path / "store"
    text = events_csv(tmp_path).read_bytes().splitlines(keepends=True)
    put(store / "shop/raw/events/part-0.csv", b"".join(text[:21]))
    put(store / "shop/raw/events/part-1.csv.gz", gzip.compress(text[0] + b"".join(text[21:])))
    put(store / "shop/raw/events/_SUCCESS", b"")
    columns = {"item_id": ITEMS, "title": TITLES, "maker": ["m"] * 12}
    pq.write_table(pa.table(columns), put(store / "shop/raw/items.parquet", b""))
    remote = pafs.SubTreeFileSystem(str(store), pafs.LocalFileSystem())
    real = storage._connect
    monkeypatch.setattr(storage, "_connect", lambda uri: (remote, uri[5:]) if uri.startswith("s3://") else real(uri))
    items = "s3://shop/raw/items.parquet"
    for name in ("s3://shop/raw/events", "s3://shop/raw/events/", "s3://shop/raw/events/part-*"):
        artifact = run(tmp_path, items, name)
        assert histories(artifact) == truth()
    assert [each["name"] for each in artifact.manifest["raw_files"]] == ["items.parquet", "part-0.csv", "part-1.csv.gz"]
    with pytest.raises(DataError, match="s3://shop/raw/none.csv does not exist; correct data.interactions"):
        run(tmp_path, items, "s3://shop/raw/none.csv")
    put(store / "shop/raw/odd.csv", b"user_id,item_id,timestamp\nu,p00,soon\n")
    with pytest.raises(DataError, match="s3://shop/raw/odd.csv:2: timestamp is not a time"):
        run(tmp_path, items, "s3://shop/raw/odd.csv")


def test_a_file_is_what_it_holds_not_what_it_is_called(tmp_path: Path) -> None:
    text = events_csv(tmp_path).read_bytes()
    for name in ("events.csv.gz", "events", "events.log", "EVENTS.TXT.GZ"):
        for data in (text, gzip.compress(text)):
            assert histories(run(tmp_path, items_csv(tmp_path), put(tmp_path / "in" / name, data))) == truth()
    with pytest.raises(DataError, match="x.csv: a zip archive or an Excel file, not a text table"):
        run(tmp_path, items_csv(tmp_path), put(tmp_path / "x.csv", b"PK\x03\x04" + text))
    with pytest.raises(DataError, match="x.parquet: not a readable Parquet file"):
        run(tmp_path, items_csv(tmp_path), put(tmp_path / "x.parquet", b"PAR1" + text))


def test_empty_parts_are_passed_over(tmp_path: Path) -> None:
    parts = [put(tmp_path / name, b"") for name in ("a.csv", "b.jsonl")] + [events_csv(tmp_path)]
    parts.append(put(tmp_path / "c.csv", "user_id,item_id,timestamp\n"))
    assert histories(run(tmp_path, items_csv(tmp_path), parts)) == truth()


# --- splits by time -----------------------------------------------------------------------------------------------


def test_a_split_by_time_without_validation_users_is_refused(tmp_path: Path) -> None:
    rows = [(user, item, START + 86_400 * (step % 2)) for step, (user, item, _) in enumerate(EVENTS)]
    with pytest.raises(
        DataError, match='catalog.split = "temporal" leaves no validation users.*catalog.valid_fraction'
    ):
        run(tmp_path, items_csv(tmp_path), events_csv(tmp_path, rows), catalog={"split": "temporal"})
