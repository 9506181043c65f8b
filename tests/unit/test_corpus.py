"""Malformed lines, files, configurations, vectors, artifacts and requests, each with the outcome that is promised; and
every parser under generated input: it ends with a result or with an error of ours, never with anything else."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.corpus import OVERRIDES, Knobs, _fill, joined
from tests.factories import model_of_random_ids
from tests.paths import CONFIGS
from tiger.core.artifacts import build, open_artifact
from tiger.core.config import load
from tiger.core.errors import ArtifactError, ConfigError, DataError, HealthError, TigerError
from tiger.data.sources.amazon import ITEMS, _interaction, _item
from tiger.data.sources.base import (
    MAX_LINE_BYTES,
    DatasetConfig,
    InvalidRow,
    RowCounts,
    lines,
    parse_record,
)
from tiger.models.tiger.recommender import TigerRecommender
from tiger.run import RunConfig

NEITHER, NOT_UTF8, SURROGATE = "neither JSON nor a Python literal", "not UTF-8", "lone surrogate in a string"
NO_ID, BAD_ID = "no asin or parent_asin", "asin or parent_asin is too long or unprintable"


# --- lines of items -----------------------------------------------------------------------------------------------

ITEM_LINES: list[tuple[bytes, str]] = [
    *[(text.encode(), NEITHER) for text in (
        "x", "{", "}", "{}}", "{'a': }", "{'a' 1}", "{'asin': B1}", "{asin: 'B1'}", '{"asin": "B1",,}', "{'asin': 'B1'",
        '{"asin": "B1"', "{'asin': f'B1'}", "{'asin': b}", "{'asin': 'B1'.upper()}", "{'asin': ('B' 1)}",
        "{'asin': lambda: 1}", "{'asin': [i for i in (1,)]}", "{'asin': 'B1' if 1 else 2}", "{'asin': __name__}",
        "{'asin': eval('1')}", "{'asin': open('/tmp/x', 'w')}", "{'asin': __import__('os').system('true')}",
        "{'asin': 'B1', 'n': 9**9**9}", "{'asin': 'B1', 'n': 1<<99}", "{'asin': 'B1', 'n': not 1}", "import os",
        "{'asin': 'B1'}; import os", "{'asin': 'B1'} {'asin': 'B2'}", "{['a']: 1}", "{{}: 1}", "{'a': {[]}}",
        "[" * 201, "[" * 5_000, "(" * 300, "-" * 100_000 + "1", "+".join("1" * 20_000), "{'a': " * 400, "\\",
        "{'asin': '\\x'}", "{'asin': '\\N{NO SUCH NAME}'}", "{'asin': 'B\n1'}", "'" * 5, '"""',
        "{'n': " + "9" * 5_000 + "}",
        "\u2028", "{'asin'\u200b: 'B1'", "…", "#", "", "NULL", "undefined", "TRUE", "{'a': 0777}",
    ) if text],
    *[(text.encode(), f"a {kind}, not an object") for text, kind in (
        ("[]", "list"), ("['asin', 'B1']", "list"), ("('asin', 'B1')", "tuple"), ("'B1'", "str"), ('"B1"', "str"),
        ("1", "int"), ("1.5", "float"), ("null", "NoneType"), ("None", "NoneType"), ("true", "bool"), ("True", "bool"),
        ("{'asin', 'B1'}", "set"), ("NaN", "float"), ("-Infinity", "float"), ("b'B1'", "bytes"), ("1+2j", "complex"),
    )],
    *[(line, NOT_UTF8) for line in (
        b'{"asin": "\xff"}', b'{"asin": "\xc3"}', b'{"asin": "\xc0\x80"}', b'{"asin": "\xed\xa0\x80"}', b"\x80",
        '{"asin": "é"}'.encode("latin-1"), b'\xff\xfe{\x00"\x00', b'{"asin": "\xf8\x88\x80\x80\x80"}',
    )],
    *[(line, SURROGATE) for line in (
        b'{"asin": "B1", "title": "\\ud800"}', b'{"asin": "B1", "title": "\\uDFFF"}',
        b"{'asin': 'B1', 'a': ['\\ud83d']}", b'{"asin": "B1", "\\udead": 1}',
        b"{'asin': 'B1', 'title': '\\U0000d800'}", b"{'asin': 'B1', 'title': '\\ud800'}",
    )],
    (b"{'asin': 'B1', 'title': 0x" + b"f" * 5_000 + b"}", "a number of thousands of digits"),
    *[(text.encode(), NO_ID) for text in (
        "{}", '{"asin": null}', '{"asin": ""}', '{"asin": "  "}', '{"asin": []}', '{"asin": {}}', '{"asin": true}',
        '{"ASIN": "B1"}', '{"asins": "B1"}', '{"title": "no id"}', "{'asin': None}", '{"asin": "\\t"}', '{"asin": NaN}',
        '{"asin": Infinity}', "{'asin': (1, 2)}", "{'asin': b'B1'}",
    )],
    *[(text.encode(), BAD_ID) for text in (
        '{"asin": "B\\u00001"}', '{"asin": "' + "B" * 257 + '"}', '{"asin": "B\\u001b[31m1"}', '{"asin": "B\\n1"}',
        '{"asin": "B\\u202e1"}', '{"asin": "\\ufeffB"}',
    )],
    (b"{'asin': '" + b"x" * (MAX_LINE_BYTES + 10) + b"'}", f"line longer than {MAX_LINE_BYTES:,} bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "reason"), ITEM_LINES, ids=range(len(ITEM_LINES)))
def test_a_bad_line_has_its_reason(line: bytes, reason: str) -> None:
    with pytest.raises(InvalidRow) as error:
        _item(parse_record(None if len(line) > MAX_LINE_BYTES else line))
    assert str(error.value) == reason


ODD_LINES = [
    b'{"asin": "B1", "price": "$9.99"}', b'{"asin": "B1", "price": ["9"]}', b'{"asin": "B1", "price": NaN}',
    b'{"asin": "B1", "price": "free"}', b'{"asin": "B1", "title": null}', b'{"asin": "B1", "title": 7}',
    b'{"asin": "B1", "title": ["a", null]}', b'{"asin": "B1", "description": {"a": "b"}}',
    b'{"asin": "../../etc/passwd"}',
    b'{"asin": "B1", "categories": "Soap"}', b'{"asin": "B1", "categories": [[1, null], []]}', b"{'asin': 0o17}",
    b'{"asin": "B1", "categories": [null, [["deep"]]]}', b'{"asin": 1, "asin": "B2"}', b'{"asin": "\xf0\x9f\x92\x84"}',
    b'{"asin": "B1", "price": 1e999}', b'{"asin": "B1", "price": -Infinity}', b'{"asin": "B1", "title": "</s><pad>"}',
]  # fmt: skip


@pytest.mark.parametrize("line", ODD_LINES, ids=range(len(ODD_LINES)))
def test_an_odd_line_becomes_an_item_that_arrow_takes(line: bytes) -> None:
    row = _item(parse_record(line))
    (back,) = pa.Table.from_pylist([row], schema=ITEMS).to_pylist()
    assert back["price"] is None or np.isfinite(back["price"])
    assert back["title"] != "None"


TIMES: list[tuple[Any, str]] = [
    *[(value, "time is missing or not a number") for value in (None, "", "soon", [], {}, "1e", "0x10", b"1", float("nan"))],
    *[(value, "time is outside the years 1990 to 2100") for value in (
        0, -1, 1_400_000_000_000, "1400000000000", 10**30, 4_102_444_800, 631_151_999, True, "-5", 1e18,
    )],
    (float("inf"), "time is missing or not a number"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "reason"), TIMES, ids=range(len(TIMES)))
def test_a_bad_time_has_its_reason(value: Any, reason: str) -> None:
    with pytest.raises(InvalidRow) as error:
        _interaction({"reviewerID": "U", "asin": "B1", "unixReviewTime": value})
    assert str(error.value) == reason


# --- files --------------------------------------------------------------------------------------------------------

GOOD = b'{"asin": "B1", "title": "T"}\n' * 50
ZIPPED = gzip.compress(GOOD)
FILES: list[tuple[bytes, str]] = [
    *[
        (ZIPPED[:cut], "the gzip file is (truncated|damaged)")
        for cut in (3, 9, 11, 20, len(ZIPPED) // 2, -9, -8, -5, -1)
    ],
    (ZIPPED[:-8] + b"\0\0\0\0" + ZIPPED[-4:], "the gzip file is damaged"),  # checksum
    (ZIPPED[:-4] + b"\1\0\0\0", "the gzip file is damaged"),  # length
    (ZIPPED + b"trailing garbage", "the gzip file is damaged"),
    (ZIPPED + ZIPPED[:15], "the gzip file is truncated"),
    (b"\x1f\x8b", "the gzip file is truncated"),
    (b"\x1f\x8b\x07" + bytes(20), "the gzip file is damaged"),
    (gzip.compress(bytes(30_000_000)), "the gzip file expands to more than 900 times its size"),
]


@pytest.mark.parametrize(("content", "message"), FILES, ids=range(len(FILES)))
def test_a_bad_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "meta_X.json.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path}: {message}"):
        list(lines(path))


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\r\n", b"\xef\xbb\xbf", gzip.compress(b"", mtime=0)])
def test_an_empty_file_has_no_lines_and_closes_with_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    assert list(lines(path)) == []
    with pytest.raises(DataError, match=r"no row could be used of 0 read \(empty\)"):
        RowCounts("items").close(0.5)


# --- configurations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("override", "message"), OVERRIDES, ids=[override or "empty" for override, _ in OVERRIDES])
def test_a_bad_override_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(RunConfig, "sample", [override], CONFIGS)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"root = ", b"[model\n", b"root = 'a'\nroot = 'b'\n", b"\xff", b"a.b = 1\na = 2\n", b"[[x]]\n[x]\n", b"x = 1e"],
)
def test_a_bad_configuration_file_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"mine.toml: not valid TOML"):
        load(RunConfig, str(path), [], CONFIGS)


# --- vectors from elsewhere ---------------------------------------------------------------------------------------

V = [[1.0, 2.0], [3.0, 4.0]]
VECTORS: list[tuple[dict[str, Any], type[TigerError], str]] = [
    ({"id": ["a", "b"], "vector": V}, DataError, "no column item_id; columns found: id, vector"),
    ({"item_id": ["a", "b"], "embedding": V}, DataError, "no column vector"),
    ({"item_id": ["a", "a"], "vector": V}, DataError, "1 duplicate items: a"),
    ({"item_id": ["a", None], "vector": V}, DataError, "1 rows without item_id"),
    ({"item_id": ["a", "b"], "vector": [[1.0], None]}, DataError, "1 rows without vector, for items b"),
    (
        {"item_id": ["a", "b"], "vector": [[1.0], [1.0, 2.0]]},
        DataError,
        "a vector has 2 dimensions, the previous ones .* have 1",
    ),
    ({"item_id": ["a", "b"], "vector": pa.array([[], []], pa.list_(pa.float32()))}, DataError, "vectors are empty"),
    ({"item_id": ["a", "b"], "vector": [[1.0, None], [1.0, 2.0]]}, HealthError, "NaN, infinite or zero"),
    ({"item_id": ["a", "b"], "vector": ["x", "y"]}, DataError, "vector has type string, not lists of numbers"),
    ({"item_id": ["a", "b"], "vector": [["x"], ["y"]]}, DataError, "not lists of numbers"),
    ({"item_id": [["a"], ["b"]], "vector": V}, DataError, "item_id has type list"),
    ({"item_id": ["a", "b"], "vector": [[1.0, float("nan")], [1.0, 2.0]]}, HealthError, r"of 1 items .*: a"),
    ({"item_id": ["a", "b"], "vector": [[1.0, float("inf")], [1.0, 2.0]]}, HealthError, "NaN, infinite or zero"),
    ({"item_id": ["a", "b"], "vector": [[0.0, 0.0], [1.0, 2.0]]}, HealthError, "NaN, infinite or zero"),
    ({"item_id": pa.array([], pa.string()), "vector": pa.array([], pa.list_(pa.float32()))}, DataError, "has no rows"),
]


@pytest.mark.parametrize(("columns", "kind", "message"), VECTORS, ids=range(len(VECTORS)))
def test_bad_vectors_are_named(columns: dict[str, Any], kind: type[TigerError], message: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=f"mine.parquet: .*{message}"):
        joined(pa.table(columns), tmp_path)


# --- artifacts ----------------------------------------------------------------------------------------------------

MANIFESTS: list[Any] = [
    b"", b"{", b"null", b"[]", b"1", b'"x"', b"{}", b"\xff\xfe", b"[" * 3_000, b"\x00" * 100,
    {"files": None}, {"files": []}, {"files": {"table.parquet": {}}}, {"files": {"table.parquet": None}},
    {"files": {"table.parquet": {"bytes": "many", "sha256": ""}}}, {"files": {}}, {"schema_version": "2"}, {"schema_version": 1},
    {"schema_version": 99}, {"kind": "model"}, {"metrics": {"rows": 3}}, {"inputs": {"catalog": "../../etc"}}, {"digest": "0" * 64},
]  # fmt: skip


@pytest.mark.parametrize("content", MANIFESTS, ids=range(len(MANIFESTS)))
def test_a_bad_manifest_is_refused(content: Any, tmp_path: Path) -> None:
    artifact = build(str(tmp_path), "catalog", Knobs(), {}, _fill)
    path = Path(artifact.folder.uri, "manifest.json")
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(artifact.manifest | content).encode())
    with pytest.raises(ArtifactError, match=path.parent.name):
        open_artifact(str(path.parent), expected_kind="catalog")


# --- requests -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recommender() -> TigerRecommender:
    return TigerRecommender(model_of_random_ids(40), device="cpu")


REQUESTS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([[1]], {"new_item_boost": float("nan")}, ConfigError, "decoding.new_item_boost = nan"),
    ([[1]], {"new_item_boost": float("inf")}, ConfigError, "decoding.new_item_boost = inf"),
    ([[40]], {}, DataError, "history 0 holds an item outside of 0 .. 39"),
    ([[0], [1], [-1]], {}, DataError, "history 2 holds an item outside"),
    ([[2**40]], {}, DataError, "outside"),
    ([[1.5]], {}, DataError, "neither an item id nor an index"),
    ([["B1"]], {}, DataError, "neither an item id nor an index"),
    ([[None]], {}, DataError, "neither an item id nor an index"),
    ([[[1, 2]]], {}, DataError, "neither an item id nor an index"),
    ([[float("nan")]], {}, DataError, "neither an item id nor an index"),
    ([[True]], {}, DataError, "neither an item id nor an index"),
    ([[1]], {"k": 0}, ConfigError, "decoding.k = 0"),
    ([[1]], {"k": -3}, ConfigError, "decoding.k = -3"),
    ([[1]], {"beam": 0}, ConfigError, "decoding.beam = 0"),
    ([[1]], {"temperature": -1.0}, ConfigError, "decoding.temperature = -1"),
    ([[1]], {"temperature": float("nan")}, ConfigError, "decoding.temperature = nan"),
    ([[1]], {"allowed_items": np.ones(39, bool)}, DataError, "40 items"),
    ([[1]], {"users": ["a", "b"]}, ValueError, "2 users for 1 histories"),
]


@pytest.mark.parametrize(("histories", "arguments", "kind", "message"), REQUESTS, ids=range(len(REQUESTS)))
def test_a_bad_request_is_refused(
    histories: Any, arguments: dict[str, Any], kind: type[Exception], message: str, recommender: TigerRecommender
) -> None:
    with pytest.raises(kind, match=message):
        recommender.recommend(histories, **{"k": 3, **arguments})


def test_the_corpus_is_as_large_as_promised() -> None:
    parts = (ITEM_LINES, ODD_LINES, TIMES, FILES, OVERRIDES, VECTORS, MANIFESTS, REQUESTS)
    assert sum(map(len, parts)) >= 150


# --- generated input ----------------------------------------------------------------------------------------------


def test_every_kind_of_data_has_its_configuration_checked() -> None:
    with pytest.raises(ConfigError, match="there is no module"):
        DatasetConfig.resolve({"kind": "nothing"})
