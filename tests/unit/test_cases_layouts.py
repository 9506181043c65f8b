"""Layouts as users have them: one row per user, long format, filters, folders and globs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.raw_tables import EVENTS, ITEMS, START, TITLES, events_csv, histories, items_csv, put, rows_of, run, truth
from tiger.core import storage
from tiger.core.config import load_plugin
from tiger.core.errors import ConfigError, DataError
from tiger.data.catalog import Catalog
from tiger.data.sources.base import DatasetConfig, RowCounts

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
    fields = {"text_fields": ["title", "maker", "hash"]}
    table = Catalog(run(tmp_path, items, events_csv(tmp_path), fields, **names)).items
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
