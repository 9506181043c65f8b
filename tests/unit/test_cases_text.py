"""Text tables as users have them: quotes, separators, headers, encodings."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from tests.raw_tables import EVENTS, START, events_csv, histories, items_csv, put, rows_of, run, truth
from tiger.core.errors import DataError
from tiger.data.catalog import Catalog

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
    assert any(":5: not UTF-8" in example for example in rows_of(artifact)["examples"])
    assert ":10: line longer" in rows_of(artifact)["examples"][0]  # reasons as often as each other are by name


def test_a_field_of_three_megabytes_is_read(tmp_path: Path) -> None:
    path = put(
        tmp_path / "i.csv", f'item_id,title,maker\np00,"{"long, " * 500_000}",m\np01,Lamp,m\np02,Jug,m\np03,Pan,m\n'
    )
    events = events_csv(tmp_path, [("u", f"p0{n}", START + n) for n in range(4)])
    assert len(Catalog(run(tmp_path, path, events)).items["title"][0].as_py()) > 2_900_000


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
