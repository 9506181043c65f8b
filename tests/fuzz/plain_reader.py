"""The rules of the readers in plain Python, a value and a character at a time: the slow truth of test_reader_fuzz."""

from __future__ import annotations

import datetime
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
LOW, HIGH = 631_152_000 * 10**6, 4_102_444_800 * 10**6


def plain_id(value: Any) -> str | None:
    """An id as documented: text as it is, numbers in full, a fraction of zeros dropped; None where missing."""
    if value is None or isinstance(value, (list, dict, bool)):
        return None
    if isinstance(value, str):
        text = value.strip()
        head, dot, tail = text.partition(".")
        digits = head.removeprefix("-")
        if dot and tail and set(tail) == {"0"} and digits and all(c in "0123456789" for c in digits):
            return head
        return text or None
    if isinstance(value, float):
        if math.isnan(value) or math.isinf(value):
            return None
        return str(int(value)) if value == int(value) else format(Decimal(repr(value)), "f")
    if isinstance(value, Decimal):
        text = format(value, "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    return str(value)


def plain_time(value: Any, unit: str) -> int | None:
    """A time as documented, in microseconds, rounded down; None where it is not usable."""
    if value is None or isinstance(value, (list, dict, bool)):
        return None
    if isinstance(value, datetime.datetime):
        moment = value if value.tzinfo else value.replace(tzinfo=datetime.UTC)
        micros = (moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(microseconds=1)
        return micros if LOW <= micros < HIGH else None
    if isinstance(value, float):
        if math.isnan(value) or math.isinf(value):
            return None
        value = int(value) if value == int(value) else repr(value)
    text = str(value).strip()
    try:
        number = Fraction(text) if all(c in "0123456789+-.eE" for c in text) and text else None
    except ValueError:
        number = None
    if number is not None:
        micros = math.floor(number * 10**6 / UNITS[unit])
        return micros if LOW <= micros < HIGH else None
    try:
        return plain_time(datetime.datetime.fromisoformat(text), unit)
    except ValueError:
        return None


def plain_csv(data: bytes, width: int) -> tuple[list[list[str]], int]:
    """Rows of `width` fields, and the number of bad ones, a character at a time. The first row is the header."""
    lines = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    rows: list[list[str]] = []
    bad = at = 0
    while at < len(lines):
        if not lines[at]:
            at += 1
            continue
        fields, used = plain_record(lines, at)
        if fields is None:
            bad, at = bad + 1, at + 1
            continue
        raw = b"\n".join(lines[at : at + used])
        at += used
        try:
            raw.decode()
        except UnicodeDecodeError:
            bad += 1
            continue
        if len(fields) != width:
            bad += 1
            continue
        rows.append([field.decode() for field in fields])
    return rows, bad


def plain_record(lines: list[bytes], at: int) -> tuple[list[bytes] | None, int]:
    """Fields of the record that begins on line `at`, and its lines; None if its quotes do not fit."""
    text = b"\n".join(lines[at:])
    fields, place = [], 0
    while True:
        if text[place : place + 1] == b'"':
            place, field = place + 1, b""
            while True:
                end = text.find(b'"', place)
                if end < 0:
                    return None, 1
                field += text[place:end]
                place = end + 1
                if text[place : place + 1] != b'"':
                    break
                field, place = field + b'"', place + 1
            if text[place : place + 1] not in (b",", b"\n", b""):
                return None, 1
        else:
            ends = [end for end in (text.find(b",", place), text.find(b"\n", place)) if end >= 0]
            end = min(ends, default=len(text))
            field, place = text[place:end], end
        fields.append(field)
        if text[place : place + 1] != b",":
            used = text[:place].count(b"\n") + 1
            return (None, 1) if joins_rows(fields, lines[at : at + used]) else (fields, used)
        place += 1


def joins_rows(fields: list[bytes], lines: list[bytes]) -> bool:
    """A quoted "field" over several lines that holds ids or times, or whose lines are all rows of numbers."""
    return any(b"\n" in field for field in fields[:3])
