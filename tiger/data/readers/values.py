"""Conversion of raw values to ids and texts: the same rule for all formats, applied per value.

An id is its text without surrounding white space. A number is written without an exponent, and without a fraction if it
is whole. A fraction of zeros is removed from text as well, so that `17`, `17.0` and `"17.0"` are one id in CSV, JSON
lines and Parquet, while `017`, `1e5` and `NA` in text are unchanged. Null, NaN, infinity and empty text are missing.
"""

from __future__ import annotations

import ast
import json
import math
import re
import uuid
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiger.data.readers.row_counts import InvalidRow

_ZERO_FRACTION = r"^-?[0-9]+\.0+$"
_zero_fraction = re.compile(_ZERO_FRACTION)
_WRAPPERS = frozenset({"$oid", "$date", "$numberLong", "$numberInt", "$numberDouble", "$numberDecimal", "$uuid"})


def identifier(value: Any, name: str) -> str:
    """Return a user's or item's id as text.

    Raises:
        InvalidRow: missing, empty, longer than 256 characters, or with control characters.
    """
    try:
        text = id_text(value, name)
    except InvalidRow:
        text = None
    if text is None:
        raise InvalidRow(f"no {name}")
    if len(text) > 256 or not text.isprintable():
        raise InvalidRow(f"{name} is too long or unprintable")
    return text


def id_text(value: Any, name: str) -> str | None:
    """Convert a JSON value to an id, None if it is missing.

    Raises:
        InvalidRow: a list, an object, or a Boolean.
    """
    if isinstance(value, dict):
        value = unwrap(value)
    if value is None:
        return None
    if isinstance(value, str):
        text = value.strip()
        return (text.partition(".")[0] if text.endswith("0") and _zero_fraction.match(text) else text) or None
    if isinstance(value, (bool, list, tuple, dict, set, bytes, complex)):
        raise InvalidRow(f"{name} is {_kind(value)}", f"{short(value)}; an id must be text or a number")
    return number_text(value)


def number_text(value: Any) -> str | None:
    """Format a number without an exponent: `17` for 17.0 and 1.7e1; None for NaN and infinity."""
    if isinstance(value, int):
        return str(value)
    if isinstance(value, (float, np.floating)):
        if not math.isfinite(value):
            return None
        return str(int(value)) if value == int(value) else format(Decimal(str(value)), "f")
    text = format(Decimal(value), "f") if Decimal(value).is_finite() else None
    return text.rstrip("0").rstrip(".") if text is not None and "." in text else text


def unwrap(value: Any) -> Any:
    """Unwrap a value of MongoDB's extended JSON: `{"$oid": x}`, `{"$date": {"$numberLong": x}}`, ..."""
    while isinstance(value, dict) and len(value) == 1 and next(iter(value)) in _WRAPPERS:
        value = next(iter(value.values()))
    return value


def _kind(value: Any) -> str:
    kinds = {list: "a list", tuple: "a list", dict: "an object", bool: "true or false", set: "a set"}
    return kinds.get(type(value), f"of type {type(value).__name__}")


def short(value: Any) -> str:
    """Return the repr of a value for a message, truncated to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- fields -----------------------------------------------------------------------------------------------------


def readable(value: Any) -> str | None:
    """Convert any value to readable text: `size: L, color: red` for an object, `a, b` for a list; None if missing."""
    value = unwrap(value)
    if value is None:
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float, Decimal, np.floating)):
        return number_text(value)
    if isinstance(value, dict):
        pairs = ((key, readable(inner)) for key, inner in value.items())
        return ", ".join(f"{key}: {text}" for key, text in pairs if text is not None)
    if isinstance(value, (list, tuple, set, frozenset, np.ndarray)):
        inner_values = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return ", ".join(filter(None, map(readable, inner_values)))
    if isinstance(value, bytes):
        return _bytes_text(value)
    if isinstance(value, uuid.UUID):
        return str(value)
    return str(value)


def depth(value: Any) -> int:
    """Return 0 for a single value, 1 for a list or an object, 2 for a list of lists."""
    value = unwrap(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return 2 if value and all(isinstance(inner, (list, tuple)) for inner in value) else 1
    return 1 if isinstance(value, dict) else 0


def field_value(value: Any, level: int) -> Any:
    """Convert a field to text (level 0), a list of texts (1), or a list of lists (2); objects become `key: value`."""
    value = unwrap(value)
    if value is None:
        return None
    if level == 0:
        return readable(value)
    if level == 2:
        outer = value if depth(value) == 2 else [value]
        return [inner for inner in (field_value(each, 1) for each in outer) if inner is not None]
    if isinstance(value, dict):
        pairs = ((key, readable(inner)) for key, inner in value.items())
        return [f"{key}: {text}" for key, text in pairs if text is not None]
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    if not isinstance(value, (list, tuple)):
        value = [value]
    return [text for text in map(readable, value) if text is not None]


# --- columns of Arrow -------------------------------------------------------------------------------------------


def plain(column: pa.Array) -> pa.Array:
    """Return a column without dictionaries, extension types and views; binary values and UUIDs become text."""
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        column, kind = column.storage, column.type.storage_type
    if pa.types.is_dictionary(kind):
        return pc.take(plain(column.dictionary), column.indices)
    if pa.types.is_large_string(kind) or str(kind) == "string_view":
        return pc.cast(column, pa.string())
    if pa.types.is_fixed_size_binary(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return _binary_text(column)
    if str(kind) == "binary_view":
        return _binary_text(pc.cast(column, pa.binary()))
    return column


def _binary_text(column: pa.Array) -> pa.Array:
    return pa.array([None if value is None else _bytes_text(value) for value in column.to_pylist()], pa.string())


def _bytes_text(value: bytes) -> str:
    """Decode UTF-8; format other bytes in hexadecimal, and 16 bytes that are not printable ASCII as a UUID."""
    try:
        text = value.decode("utf-8")
        if len(value) != 16 or (text.isprintable() and text.isascii()):
            return text
    except UnicodeDecodeError:
        pass
    return str(uuid.UUID(bytes=value)) if len(value) == 16 else value.hex()


def has_id_type(kind: pa.DataType) -> bool:
    """Return whether a column of this type can contain ids."""
    return not (pa.types.is_nested(kind) or pa.types.is_boolean(kind))


def id_texts(column: pa.Array) -> pa.Array:
    """Return a column's ids as text, null if missing; the vectorized form of `id_text`."""
    column = plain(column)
    kind = column.type
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return _number_texts(column)
    text = pc.utf8_trim_whitespace(column if pa.types.is_string(kind) else pc.cast(column, pa.string()))
    if not pa.types.is_integer(kind):
        whole = pc.fill_null(pc.and_(pc.ends_with(text, "0"), pc.match_substring_regex(text, _ZERO_FRACTION)), False)
        if pc.any(whole).as_py():
            text = pc.if_else(whole, pc.replace_substring_regex(text, r"\.0+$", ""), text)
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)


def _number_texts(column: pa.Array) -> pa.Array:
    if pa.types.is_floating(column.type):
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        whole = np.isfinite(values) & (np.abs(values) < 2**63)
        whole[whole] = values[whole] == np.floor(values[whole])
        if (whole | ~np.isfinite(values)).all():
            integers = np.where(whole, values, 0).astype(np.int64)
            return pc.cast(pa.array(integers, mask=~whole), pa.string())
        if not pa.types.is_float64(column.type):  # the shortest text differs: 0.1, not 0.10000000149011612
            numbers: Any = column.to_numpy(zero_copy_only=False)
            return pa.array([number_text(v) if v is not None else None for v in numbers], pa.string())
    return pa.array([None if v is None else number_text(v) for v in column.to_pylist()], pa.string())


def item_type(kind: pa.DataType) -> pa.DataType:
    """Return the type in which a field of this raw type is stored: numbers stay numbers, nested values become text."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        return item_type(kind.value_type)
    if pa.types.is_null(kind) or pa.types.is_boolean(kind):
        return kind
    if pa.types.is_integer(kind):
        return pa.string() if pa.types.is_uint64(kind) else pa.int64()
    if pa.types.is_floating(kind):
        return pa.float64()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = kind.value_type
        if pa.types.is_list(inner) or pa.types.is_large_list(inner):
            return pa.list_(pa.list_(pa.string()))
        if pa.types.is_floating(inner) or pa.types.is_integer(inner):
            return pa.list_(pa.float64() if pa.types.is_floating(inner) else pa.int64())
        return pa.list_(pa.string())
    return pa.list_(pa.string()) if pa.types.is_nested(kind) else pa.string()


def widen(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Return the common type of two types that `item_type` returned."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    levels = max(list_levels(one), list_levels(other))
    if levels == 2:
        return pa.list_(pa.list_(pa.string()))
    if levels == 1:
        return pa.list_(pa.string())
    return pa.string()  # also for integers with floats: 17 and 17.0 are `17`, and long numbers keep all digits


def list_levels(kind: pa.DataType) -> int:
    """Return how deep lists are nested in a type: 0 for a single value."""
    return 1 + list_levels(kind.value_type) if pa.types.is_list(kind) else 0


def as_field(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """Convert a raw column to a type that `item_type` or `widen` returned."""
    if column.type == kind:
        return column
    column = plain(column)
    if column.type == kind:
        return column
    simple = not pa.types.is_nested(column.type)
    if simple and (pa.types.is_null(column.type) or pa.types.is_null(kind)):
        return pa.nulls(len(column), kind)
    if simple and pa.types.is_floating(column.type) and pa.types.is_float64(kind):  # 0.1 stays 0.1 in 64 bits
        return pc.cast(pc.cast(column, pa.string()), kind)
    if simple and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return pc.cast(column, kind)
    written = pa.types.is_integer(column.type) or pa.types.is_temporal(column.type) or pa.types.is_decimal(column.type)
    if pa.types.is_string(kind) and written:
        return pc.cast(column, kind)
    if pa.types.is_list(kind) and not pa.types.is_string(_leaf_category(kind)):
        return pc.cast(column, kind)
    level = list_levels(kind)
    values = _pairs_as_objects(column.type, column.to_pylist())
    return pa.array([field_value(value, level) for value in values], kind)


def _leaf_category(kind: pa.DataType) -> pa.DataType:
    return _leaf_category(kind.value_type) if pa.types.is_list(kind) else kind


def _pairs_as_objects(kind: pa.DataType, values: list[Any]) -> list[Any]:
    """Convert Arrow's maps, which are lists of pairs in Python, to dicts, at any depth."""
    if pa.types.is_map(kind):
        return [None if v is None else {k: _pairs_as_objects(kind.item_type, [x])[0] for k, x in v} for v in values]
    if pa.types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        types = [kind.field(i).type for i in range(kind.num_fields)]
        return [
            None if v is None else {n: _pairs_as_objects(t, [v[n]])[0] for n, t in zip(names, types, strict=True)}
            for v in values
        ]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [None if v is None else _pairs_as_objects(kind.value_type, v) for v in values]
    return values


def split_history(text: str, separator: str | None) -> list[str | None]:
    """Split a text into ids: a JSON or Python list, or ids with separators (None: white space).

    An empty entry is None.

    Raises:
        InvalidRow: an entry is a list, an object, or a Boolean.
    """
    text = text.strip()
    values: list[Any] | None = _list_in(text) if text[:1] in ("[", "(") else None
    if values is None:
        values = text.split(separator)
    return [id_text(value, "an entry") for value in values]


def _list_in(text: str) -> list[Any] | None:
    """Parse a list written as JSON or as a Python literal; None if the text is neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
        if isinstance(value, (list, tuple)):
            return list(value)
    return None
