"""Every parser under generated input: it ends with a result or with an error of ours, never with anything else."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.corpus import OVERRIDES, joined
from tests.paths import CONFIGS
from tiger.core.artifacts import open_artifact
from tiger.core.config import load
from tiger.core.errors import ArtifactError, ConfigError, DataError, HealthError
from tiger.data.sources.amazon import ITEMS, _item
from tiger.data.sources.base import (
    InvalidRow,
    identifier,
    parse_record,
    unix_micros,
)
from tiger.run import RunConfig

# --- generated input ----------------------------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    [
        "asin",
        "parent_asin",
        "title",
        "brand",
        "store",
        "categories",
        "category",
        "price",
        "description",
        "features",
        "x",
    ]
)


@settings(max_examples=2_000, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_a_record_or_a_bad_row(line: bytes) -> None:
    try:
        assert isinstance(parse_record(line), dict)
    except InvalidRow as error:
        assert str(error)


@settings(max_examples=1_000, deadline=None)
@given(st.dictionaries(FIELDS, PLAIN, max_size=8), st.booleans())
def test_any_record_is_an_item_that_arrow_takes_or_a_bad_row(record: dict[str, Any], literal: bool) -> None:
    line = (repr(record) if literal else json.dumps(record)).encode("utf-8", "surrogatepass")
    try:
        row = _item(parse_record(line))
    except InvalidRow:
        return
    (back,) = pa.Table.from_pylist([row], schema=ITEMS).to_pylist()
    assert back["source_id"].strip()
    assert back["price"] is None or np.isfinite(back["price"])


@settings(max_examples=1_000, deadline=None)
@given(PLAIN, st.sampled_from(["s", "ms", "us", "ns"]))
def test_any_value_is_a_time_and_a_name_or_a_bad_row(value: Any, unit: str) -> None:
    for parser in (lambda: unix_micros(value, unit), lambda: identifier(value, "user")):
        try:
            assert parser() is not None
        except InvalidRow:
            continue


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=60) | st.tuples(st.sampled_from([o for o, _ in OVERRIDES]), st.text(max_size=10)).map("".join))
def test_any_override_is_a_configuration_or_an_error_of_ours(override: str) -> None:
    try:
        load(RunConfig, "sample", [override], CONFIGS)
    except ConfigError as error:
        assert str(error)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=300) | PLAIN.map(lambda value: json.dumps(value).encode()))
def test_any_manifest_is_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("artifact")
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError):
        open_artifact(str(folder))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text(max_size=5) | st.none(), max_size=4),
    st.lists(st.lists(st.floats(width=32) | st.none(), max_size=3) | st.none(), max_size=4),
)
def test_any_vectors_are_embeddings_or_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, names: list[Any], vectors: list[Any]
) -> None:
    size = min(len(names), len(vectors))
    table = pa.table(
        {"item_id": pa.array(names[:size], pa.string()), "vector": pa.array(vectors[:size], pa.list_(pa.float32()))}
    )
    try:
        found = joined(table, tmp_path_factory.mktemp("vectors"))
    except (DataError, HealthError):
        return
    assert sorted(found["item_id"].to_pylist()) == list(range(size))
