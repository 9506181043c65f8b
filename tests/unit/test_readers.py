"""Raw files at the limits of what can be read: separators of one table, files that vanish, numbers without end."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import LocalFileSystem

from tests.raw_tables import EVENTS, ITEMS, TITLES, events_csv, histories, items_csv, put, rows_of, run, truth
from tiger.core.artifacts import Artifact
from tiger.core.config import build
from tiger.core.errors import DataError
from tiger.core.storage import Folder
from tiger.data.catalog import Catalog, CatalogConfig, make
from tiger.data.histories import read_histories
from tiger.data.readers import json_table
from tiger.data.readers.formats import find_format
from tiger.data.readers.lines import lines, text_blocks
from tiger.data.readers.parquet import ParquetTable
from tiger.data.readers.raw_files import RawFile, expand
from tiger.data.readers.table import Wanted
from tiger.data.readers.values import id_texts
from tiger.data.sources.base import INTERACTIONS
from tiger.embedding.encoder import EmbeddingConfig
from tiger.embedding.external import VectorJoin, own_item_ids

# --- settings of one table ----------------------------------------------------------------------------------------


def test_a_separator_of_one_table_is_not_asked_of_the_other(tmp_path: Path) -> None:
    """Each message names the setting that works; following them one after another ends."""
    items = put(tmp_path / "items.csv", items_csv(tmp_path).read_text().replace(",", "|"))
    ratings = put(tmp_path / "ratings.dat", "\n".join("::".join(map(str, row)) for row in EVENTS))
    names = ["user_id", "item_id", "timestamp"]
    with pytest.raises(DataError, match=r"""items.csv: .*contains '\|' and no '::': set data.separator={inter""") as e:
        run(tmp_path, items, ratings, separator="::")
    assert 'set data.separator={interactions="::"}; if' in str(e.value)
    assert "list the names in data.columns={items=[...]}" in str(e.value)
    with pytest.raises(DataError, match=r"ratings.dat: .*list the names in data.columns=\{interactions=\[...\]\}"):
        run(tmp_path, items, ratings, separator={"interactions": "::"})
    right = {"separator": {"interactions": "::"}, "columns": {"interactions": names}}
    assert histories(run(tmp_path, items, ratings, **right)) == truth()


def test_a_separator_of_the_items_is_not_asked_of_the_interactions(tmp_path: Path) -> None:
    items = put(tmp_path / "items.csv", items_csv(tmp_path).read_text().replace(",", "^"))
    with pytest.raises(
        DataError, match=r'events.csv: .*contains \',\' and no \'\^\': set data.separator=\{items="\^"\}'
    ):
        run(tmp_path, items, events_csv(tmp_path), separator="^")
    assert histories(run(tmp_path, items, events_csv(tmp_path), separator={"items": "^"})) == truth()


def test_a_wrong_separator_of_one_table_keeps_that_of_the_other(tmp_path: Path) -> None:
    items = put(tmp_path / "items.csv", items_csv(tmp_path).read_text().replace(",", "|"))
    events = put(tmp_path / "e.csv", events_csv(tmp_path).read_text().replace(",", "^"))
    wrong = {"items": "~", "interactions": "^"}
    with pytest.raises(DataError, match=r'set data.separator=\{items="\|", interactions="\^"\}'):
        run(tmp_path, items, events, separator=wrong)
    assert histories(run(tmp_path, items, events, separator=wrong | {"items": "|"})) == truth()


def test_names_of_headerless_interactions_do_not_hide_the_separator_of_the_items(tmp_path: Path) -> None:
    names = ["user_id", "item_id", "timestamp"]
    ratings = put(tmp_path / "ratings.dat", "\n".join("::".join(map(str, row)) for row in EVENTS))
    with pytest.raises(
        DataError, match=r"items.csv: the first line has 1 .*data.columns=\{items=\[...\]\} or set data"
    ):
        run(tmp_path, items_csv(tmp_path, header="sku,title,maker"), ratings, separator="::", columns=names)


# --- limits of a catalog that is reused ---------------------------------------------------------------------------


def test_a_lower_limit_of_bad_rows_holds_for_a_finished_catalog(tmp_path: Path) -> None:
    """It is not made again, and a limit that it meets uses it."""
    events = events_csv(tmp_path, [*EVENTS, ("c0", "p00", "soon"), ("", "p01", "1450000000")])
    first = run(tmp_path, items_csv(tmp_path), events, max_bad_row_fraction=0.5)
    message = (
        r"interactions: 2 of 42 rows cannot be read \(4.76%, allowed: 1.00%, data.max_bad_row_fraction\): .*'soon'"
    )
    for _ in range(2):
        with pytest.raises(DataError, match=message):
            run(tmp_path, items_csv(tmp_path), events)
    again = run(tmp_path, items_csv(tmp_path), events, max_bad_row_fraction=0.05)
    assert again.manifest == first.manifest


@pytest.mark.parametrize("catalog", [{"k_core": 0}, {"k_core": 2}, {"duplicates": "all"}])
def test_a_lower_limit_of_unknown_items_holds_for_a_finished_catalog(catalog: dict[str, Any], tmp_path: Path) -> None:
    rows = [*EVENTS, *EVENTS[:3], ("c1", "p00", 1_450_000_007), ("c0", "who", 1_450_000_001)]
    events = events_csv(tmp_path, rows)

    def made(limit: float) -> Artifact:
        return run(tmp_path, items_csv(tmp_path), events, catalog=catalog | {"max_unknown_item_fraction": limit})

    first = made(0.5)
    with pytest.raises(DataError, match=r"1 of 45 interactions .*catalog.max_unknown_item_fraction = 0.0"):
        made(0.0)
    assert made(0.03).manifest == first.manifest


# --- files that cannot be read ------------------------------------------------------------------------------------


def test_a_file_of_the_file_system_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    """A folder, a vanished file, and a path through a file; in every function that reads the beginning of one."""
    (tmp_path / "file").touch()
    reasons = {
        tmp_path: "Is a directory; remove that folder, or choose another one",
        tmp_path / "gone.csv": "No such file or directory; check the path",
        tmp_path / "file/x.csv": "Not a directory; a component of this path is a file; remove it, or choose another",
    }
    for path, reason in reasons.items():
        file = RawFile(LocalFileSystem(), str(path), "x.csv", "data.items")
        reads: list[Callable[[], Any]] = [
            lambda file=file: list(text_blocks(file)),
            lambda file=file: list(lines(file)),
            lambda file=file: find_format(file, "utf-8"),
            lambda file=file: ParquetTable(file, Wanted({})),
            lambda file=file: own_item_ids([file], EmbeddingConfig()),
            file.digest,
        ]
        for read in reads:
            with pytest.raises(DataError, match=rf"x.csv: cannot be read: {reason}") as error:
                read()
            assert str(error.value).endswith("; or correct data.items")


def test_a_disk_that_fails_while_a_file_is_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 0 or size == 4:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(2)

    monkeypatch.setattr(RawFile, "open", lambda file: Failing(b"user_id,item_id\n"))
    file = RawFile.local(tmp_path / "x.csv")
    for read in (lambda: list(text_blocks(file)), lambda: find_format(file, "utf-8"), file.digest):
        with pytest.raises(DataError, match=r"x.csv: cannot be read: Input/output error; "):
            read()


@pytest.mark.skipif(os.geteuid() == 0, reason="the super-user may read everything")
def test_a_file_without_permission_is_one_line(tmp_path: Path) -> None:
    path = items_csv(tmp_path)
    path.chmod(0)
    with pytest.raises(DataError, match=r"items.csv: cannot be read: Permission denied; grant this user access"):
        list(text_blocks(path))


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"\x93NUMPY\x01\0" + bytes(200), "a NumPy array"), (b"PK\x03\x04" + bytes(200), "a zip archive or an Excel file"),
     (b"\x89HDF\r\n\x1a\n" + bytes(200), "an HDF5 file"), (b"ARROW1\0\0" + bytes(200), "an Arrow file")],
)  # fmt: skip
def test_formats_that_are_not_read_are_named(content: bytes, what: str, tmp_path: Path) -> None:
    path = put(tmp_path / "v.npy", content)
    with pytest.raises(DataError, match=rf"v.npy: {what}, not a text table; .* CSV, JSON lines or Parquet"):
        run(tmp_path, path, events_csv(tmp_path))
    with pytest.raises(DataError, match=rf"v.npy: {what}; own vectors are a Parquet file with the columns item_id and"):
        own_item_ids([RawFile.local(path)], EmbeddingConfig())


def test_an_absolute_path_is_not_looked_for_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"item_id": ["a"], "vector": [[1.0]]}), tmp_path / "v-of-the-test.parquet")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^/v-of-the-test.parquet does not exist; correct embedding.import_path"):
        expand(["/v-of-the-test.parquet"], "embedding.import_path")
    assert [str(file) for file in expand(["v-of-the-test.parquet"], "x")] == ["v-of-the-test.parquet"]


# --- sizes --------------------------------------------------------------------------------------------------------


def test_a_json_document_beyond_its_limit_says_so_and_json_lines_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_table, "DOCUMENT_CAP", 300)
    rows = [dict(zip(["user_id", "item_id", "timestamp"], event, strict=True)) for event in EVENTS]
    document = put(tmp_path / "e.json", json.dumps(rows, indent=1))
    with pytest.raises(DataError, match=r"e.json: one JSON document of more than 300 bytes; write one object per line"):
        run(tmp_path, items_csv(tmp_path), document)
    of_lines = put(tmp_path / "e.jsonl", "\n".join(map(json.dumps, rows)))
    assert histories(run(tmp_path, items_csv(tmp_path), of_lines)) == truth()


@pytest.mark.parametrize("is_bomb", [False, True])
def test_a_gzip_file_that_expands_to_many_times_its_size_takes_little_memory(is_bomb: bool, tmp_path: Path) -> None:
    """More than 202:1, of a constant field, is data and read in blocks; 1,000:1, of zeros, is a bomb."""
    rows = (json.dumps({"user": f"u{n}", "note": "n/a " * 1_000}).encode() + b"\n" for n in range(10_000))
    content = bytes(64 << 20) if is_bomb else b"".join(rows)
    path = put(tmp_path / "x.jsonl.gz", gzip.compress(content, 9))
    size, ratio = len(content), len(content) / path.stat().st_size
    del content
    tracemalloc.start()
    try:
        if is_bomb:
            with pytest.raises(DataError, match=r"x.jsonl.gz: the gzip file expands to more than 900 times its size"):
                for _ in text_blocks(path):
                    pass
        else:
            assert ratio > 202
            assert sum(map(len, text_blocks(path))) == size > 2 * (16 << 20)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_own_vectors_of_more_than_2_to_the_31_numbers_are_joined(tmp_path: Path) -> None:
    """600,000 lists of 3,600 numbers in one row group, as pandas and polars write them: list<int8>, 2.16e9 values."""
    rows, width, repeats = 6_000, 3_600, 100
    values = pa.array(np.ones(rows * width, np.int8))
    lists = pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * width), values)
    assert rows * width * repeats > 1 << 31
    path = tmp_path / "v.parquet"
    table = pa.table({"item_id": np.arange(rows * repeats), "vector": pa.chunked_array([lists] * repeats)})
    pq.write_table(table, path, row_group_size=rows * repeats)
    assert pq.read_metadata(path).num_row_groups == 1
    found = 0
    for joined in VectorJoin([str(n) for n in range(rows * repeats)], EmbeddingConfig()).tables([RawFile.local(path)]):
        items = np.asarray(joined["item_id"])
        np.testing.assert_array_equal(items, np.arange(found, found + len(items)))
        found += len(items)
        assert joined["vector"][-1].as_py() == [1.0] * width
    assert found == rows * repeats


@pytest.mark.slow
def test_user_names_of_more_than_2_gib_are_a_catalog(tmp_path: Path) -> None:
    """2,200 users with names of 1 MiB: 2.3 GB in one column, in which a chunk of text has room for 2 GiB."""
    users, length = 2_200, 1 << 20
    items = pa.RecordBatch.from_pydict({"source_id": ITEMS, "title": TITLES})

    def events() -> Any:
        for begin in range(0, users, 20):
            names = [f"{user:05d}{'x' * length}" for user in range(begin, begin + 20) for _ in range(3)]
            steps = [ITEMS[step] for _ in range(20) for step in range(3)]
            columns = [pa.array(names), pa.array(steps), pa.array(list(range(3)) * 20, pa.int64())]
            yield pa.RecordBatch.from_arrays(columns, schema=INTERACTIONS)

    assert users * length > 1 << 31
    config = build(CatalogConfig, {"text_fields": ["title"], "k_core": 0})
    folder = Folder(str(tmp_path))
    profile = make(config, [items], events(), folder)
    assert (profile["users"], profile["interactions"], profile["test_users"]) == (users, 3 * users, users)
    parquet = pq.ParquetFile(tmp_path / "histories.parquet")
    beginnings = [
        text
        for batch in parquet.iter_batches(100, columns=["source_id"])
        for text in pc.utf8_slice_codeunits(batch["source_id"], 0, 5).to_pylist()
    ]
    assert beginnings == [f"{user:05d}" for user in range(users)]
    histories = read_histories(folder)
    assert len(histories) == users
    assert {len(name) for name in histories.source_ids} == {5 + length}
    assert histories.items.tolist() == [0, 1, 2] * users


# --- ids and texts as they are ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32()])
def test_infinite_ids_are_missing_and_huge_ones_are_exact(kind: pa.DataType, tmp_path: Path) -> None:
    """In every batch; a float has no more digits than it has, but they are written without an exponent."""
    users = [float("inf"), float("-inf"), float("nan"), 1e20, 2.0**70, -(2.0**64), 0.5, 3.0]
    texts = id_texts(pa.array(users, kind)).to_pylist()
    assert texts == [None, None, None, str(int(np.array(1e20, kind.to_pandas_dtype()))), str(2**70), str(-(2**64)),
                     "0.5", "3"]  # fmt: skip
    columns = dict(zip(["user_id", "item_id", "timestamp"], map(list, zip(*EVENTS, strict=True)), strict=True))
    given = pa.array([float("inf")] + [1e20] * 20 + [2.0**70] * 19, kind)
    pq.write_table(pa.table(columns | {"user_id": given}), tmp_path / "e.parquet")
    artifact = run(tmp_path, items_csv(tmp_path), tmp_path / "e.parquet", max_bad_row_fraction=0.1)
    assert set(histories(artifact)) == {texts[3], texts[4]}
    assert rows_of(artifact)["skipped"] == {"no user_id or item_id": 1}
    with pytest.raises(DataError, match=r"1 of 40 rows cannot be read .*e.parquet:1: no user_id or item_id"):
        run(tmp_path, items_csv(tmp_path), tmp_path / "e.parquet")


def test_a_separator_of_several_characters_in_a_quoted_field_is_text(tmp_path: Path) -> None:
    rows = [f'{name}::"{title}::{n}"::m' for n, (name, title) in enumerate(zip(ITEMS, TITLES, strict=True))]
    items = put(tmp_path / "items.dat", "\n".join(["item_id::title::maker", *rows]))
    titles = Catalog(run(tmp_path, items, events_csv(tmp_path))).items["title"].to_pylist()
    assert titles == [f"{title}::{n}" for n, title in enumerate(TITLES)]


@pytest.mark.parametrize("cut", [1, 3])
def test_half_a_character_at_the_end_is_not_dropped(cut: int, tmp_path: Path) -> None:
    """A UTF-16 file that was cut: without its last byte, the last user would be read without its last letter."""
    rows = [(time, item, f"{user}é") for user, item, time in EVENTS]
    text = events_csv(tmp_path, rows, "timestamp,item_id,user_id").read_text().rstrip("\n")
    path = put(tmp_path / "e.csv", text.encode("utf-16-le")[:-cut])
    artifact = run(
        tmp_path, items_csv(tmp_path), path, encoding={"interactions": "utf-16-le"}, max_bad_row_fraction=0.1
    )
    assert rows_of(artifact)["skipped"] == {"not UTF-16-LE": 1}
    assert set(histories(artifact)) == {f"c{n}é" for n in range(8)}


def test_a_byte_of_a_json_document_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    """Not another character: two ids could become one."""
    rows = [dict(zip(["user_id", "item_id", "timestamp"], event, strict=True)) for event in EVENTS]
    odd = json.dumps([*rows, rows[0] | {"user_id": "c0?"}, rows[1] | {"user_id": "c0!"}]).encode()
    path = put(tmp_path / "e.json", odd.replace(b"c0?", b"c0\xe9").replace(b"c0!", b"c0\xe8"))
    artifact = run(tmp_path, items_csv(tmp_path), path, max_bad_row_fraction=0.1)
    assert histories(artifact) == truth()
    assert rows_of(artifact)["skipped"] == {"not UTF-8": 2}
    assert "not UTF-8 (byte 0xe9; set data.encoding)" in rows_of(artifact)["examples"][0]
    latin = run(tmp_path, items_csv(tmp_path), path, encoding={"interactions": "latin-1"})
    assert {"c0é", "c0è"} < set(histories(latin))


@pytest.mark.parametrize("last", [True, False])
def test_lists_in_quoted_fields_are_read_wherever_their_column_is(last: bool, tmp_path: Path) -> None:
    """Also over several lines; an entry without an id, and a list of what are no ids, are counted."""
    written = [
        '[""p00"", ""p03"", null, ""p04"", 7]',
        "['p00', 'p03',\n 'p04']",
        "[True, 'p01']",
        "[['p02']]",
        "[{'a': 1}]",
    ]
    lists = [f'"{text}"' for text in written] + ["p00;p03;;p04", '"p00;p04;p05"']
    rows = [f"c{n},{text}" if last else f"{text},c{n}" for n, text in enumerate(lists)]
    path = put(tmp_path / "h.csv", "\n".join(["user_id,items" if last else "items,user_id", *rows]) + "\n")
    items = put(tmp_path / "items.csv", items_csv(tmp_path).read_text() + "7,seven,m\n")
    artifact = run(tmp_path, items, path, history="items", history_separator=";", max_bad_row_fraction=0.5)
    assert histories(artifact) == {
        "c0": ["p00", "p03", "p04", "7"], "c1": ["p00", "p03", "p04"], "c5": ["p00", "p03", "p04"],
        "c6": ["p00", "p04", "p05"],
    }  # fmt: skip
    counts = rows_of(artifact)
    assert counts["skipped"] == {
        "items: an entry is true or false": 1, "items: an entry is a list": 1, "items: an entry is an object": 1,
    }  # fmt: skip
    assert counts["entries_left_out"] == {"entries of items without an id": 2}
    assert (counts["read"], counts["kept"], counts["lines"]) == (7, 4, 9)


def test_a_property_whose_time_cannot_be_read_is_not_the_latest_by_chance(tmp_path: Path) -> None:
    rows = [f"{name},{key},{value},{time}" for name, title in zip(ITEMS, TITLES, strict=True)
            for key, value, time in (("title", title, 1_450_000_005), ("title", "old", 1_450_000_000),
                                     ("maker", "m", ""), ("title", "odd", "soon"))]  # fmt: skip
    path = put(tmp_path / "p.csv", "\n".join(["item_id,property,value,timestamp", *rows]))
    options = {"property": "property", "value": "value"}
    artifact = run(tmp_path, path, events_csv(tmp_path), max_bad_row_fraction=0.5, **options)
    assert Catalog(artifact).items["title"].to_pylist() == TITLES
    assert rows_of(artifact, "items")["skipped"] == {"timestamp is not a time": 12}
    milliseconds = put(tmp_path / "ms.csv", path.read_text().replace("1450000005", "1450000005000"))
    with pytest.raises(DataError, match=r'timestamp is outside the years .*data.time_unit = "ms"'):
        run(tmp_path, milliseconds, events_csv(tmp_path), max_bad_row_fraction=0.3, **options)
