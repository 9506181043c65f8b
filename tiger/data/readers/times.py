"""Parsing of times to microseconds since 1970: numbers in a unit, timestamps, ISO 8601 text, strptime formats."""

from __future__ import annotations

import datetime
import functools
import re
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Context, Decimal
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tiger.data.readers.row_counts import InvalidRow
from tiger.data.readers.values import number_text, plain, short, unwrap

PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000, "order": 1}
_UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
_MICRO = 1_000_000
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", re.ASCII)
_LONGEST = 64  # maximum characters of a time
_EXACT = Context(prec=200)
_HINTS = (
    "%m/%d/%Y %I:%M:%S %p", "%m/%d/%Y %H:%M:%S", "%d/%m/%Y %H:%M:%S", "%m/%d/%Y %H:%M", "%d/%m/%Y %H:%M", "%m/%d/%Y",
    "%d/%m/%Y", "%d.%m.%Y %H:%M:%S", "%d.%m.%Y %H:%M", "%d.%m.%Y", "%Y/%m/%d %H:%M:%S", "%Y/%m/%d %H:%M", "%Y/%m/%d",
    "%a %b %d %H:%M:%S %z %Y", "%a %b %d %H:%M:%S %Y", "%a, %d %b %Y %H:%M:%S %z", "%d/%b/%Y:%H:%M:%S %z", "%d-%b-%Y",
    "%d %b %Y", "%b %d, %Y", "%B %d, %Y", "%m %d, %Y", "%m/%d/%y", "%Y%m%d", "%Y%m%d%H%M%S", "%Y-%m", "%Y",
)  # fmt: skip


@dataclass(frozen=True)
class TimeRule:
    """How to parse a time.

    Attributes:
        name: the column, for messages.
        unit: unit of numbers; "order" for numbers without a unit or bounds, only for sorting.
        formats: strptime formats of text; () for ISO 8601.
        years: the first valid year, and the year after the last one.
    """

    name: str
    unit: str = "s"
    formats: tuple[str, ...] = ()
    years: tuple[int, int] = (1990, 2100)

    @functools.cached_property
    def bounds(self) -> tuple[int, int]:
        """Half-open interval of valid times, in microseconds since 1970."""
        if self.unit == "order":
            return -(1 << 63), 1 << 63
        first, last = self.years
        return _micros(datetime.datetime(first, 1, 1)), _micros(datetime.datetime(last, 1, 1))

    @property
    def outside(self) -> str:
        """Reason under which times outside the valid years are counted."""
        first, last = self.years
        return f"{self.name} is outside the years {first} to {last}"


def microseconds(value: Any, rule: TimeRule) -> int:
    """Return the time of one value in microseconds since 1970, rounded down.

    Raises:
        InvalidRow: missing, not a time, or outside the years of the rule; its detail suggests the key that fixes it.
    """
    text = _as_text(value)
    micros = _from_text(text, rule) if text else None
    if micros is None:
        reason = why_not(value, rule)
        raise InvalidRow(reason, explain(value, rule))
    return micros


def unix_micros(value: Any, unit: str) -> int:
    """Return the time of a number, or of a number as text, in `unit` as microseconds since 1970.

    Raises:
        InvalidRow: not a number, or outside the years 1990 to 2100, which means that the unit is wrong.
    """
    text = str(int(value)) if isinstance(value, bool) else _as_text(value)
    if value in (float("inf"), float("-inf")):
        text = None
    if text is None or len(text) > _LONGEST or not _NUMBER.fullmatch(text):
        raise InvalidRow("time is missing or not a number")
    micros = _from_text(text, TimeRule("time", unit))
    if micros is None:
        raise InvalidRow("time is outside the years 1990 to 2100")
    return micros


def _as_text(value: Any) -> str | None:
    """Return a time as text: numbers without exponents, None if missing, `?` if neither text nor a number."""
    value = unwrap(value)
    if value is None or isinstance(value, str):
        return value.strip() or None if value else None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if value.bit_length() < 200 else "9" * _LONGEST
    if isinstance(value, (float, Decimal)):
        return number_text(value) if abs(float(value)) < 1e60 else "9" * _LONGEST if value == value else None
    return "?"


@functools.lru_cache(maxsize=1 << 16)
def _from_text(text: str, rule: TimeRule) -> int | None:
    micros = _parsed(text, rule)
    return micros if micros is not None and rule.bounds[0] <= micros < rule.bounds[1] else None


def _parsed(text: str, rule: TimeRule) -> int | None:
    """Return microseconds since 1970, regardless of the bounds; None if the text is not a time."""
    if not text or len(text) > _LONGEST:
        return None
    if rule.formats:
        return next((micros for each in rule.formats if (micros := _by_format(text, each)) is not None), None)
    if _NUMBER.fullmatch(text):
        return _by_number(Decimal(text), rule.unit)
    return _by_iso(text)


def _by_number(number: Decimal, unit: str) -> int:
    if number and number.adjusted() > 30:  # out of bounds in any unit; the full number may have 10^9 digits
        return 10**40 if number > 0 else -(10**40)
    scaled = _EXACT.divide(_EXACT.multiply(number, Decimal(_MICRO)), Decimal(PER_SECOND[unit]))
    return int(scaled.to_integral_value(ROUND_FLOOR, _EXACT))


def _by_iso(text: str) -> int | None:
    try:
        return _micros(datetime.datetime.fromisoformat(re.sub(r"\s*(UTC|GMT)$", "+00:00", text)))
    except ValueError:
        return None


def _by_format(text: str, form: str) -> int | None:
    try:
        return _micros(datetime.datetime.strptime(text, form))
    except ValueError:
        return None


def _micros(moment: datetime.datetime) -> int:
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return (moment - _EPOCH) // datetime.timedelta(microseconds=1)


def why_not(value: Any, rule: TimeRule) -> str:
    """Return the reason why a value is not a valid time under the rule."""
    text = _as_text(value)
    if not text:
        return f"{rule.name} is missing"
    if _parsed(text, rule) is not None:
        return rule.outside
    return f"{rule.name} does not fit data.time_format" if rule.formats else f"{rule.name} is not a time"


def explain(value: Any, rule: TimeRule) -> str:
    """Describe a value that is not a valid time under the rule, with the key that is likely to fix it."""
    text = _as_text(value)
    if not text or text == "?":
        return short(value) if text else ""
    shown, micros = short(text), _parsed(text, rule)
    if micros is None:
        form = None if rule.formats else _guess(text)
        if form:
            return f'{shown}: data.time_format = "{form}"'
        return shown if rule.formats else f"{shown}; set data.time_format to its strptime format"
    if rule.formats or not _NUMBER.fullmatch(text):
        return f"{shown} is the year {_year(micros)}; data.years sets the bounds"
    hints = [f"{shown} in {_UNIT_NAMES.get(rule.unit, rule.unit)} is the year {_year(micros)}"]
    for unit, name in _UNIT_NAMES.items():
        other = _by_number(Decimal(text), unit)
        if unit != rule.unit and rule.bounds[0] <= other < rule.bounds[1]:
            hints.append(f'in {name} {_year(other)}: data.time_unit = "{unit}"')
    if (date := _guess(text)) is not None:
        hints.append(f'as a date: data.time_format = "{date}"')
    if len(hints) == 1:
        hints.append('other bounds: data.years; a number only for sorting: data.time_unit = "order"')
    return "; ".join(hints)


def _guess(text: str) -> str | None:
    low, high = TimeRule("").bounds
    return next((f for f in _HINTS if (t := _by_format(text, f)) is not None and low <= t < high), None)


def _year(micros: int) -> str:
    try:
        return str((_EPOCH + datetime.timedelta(microseconds=micros)).year)
    except OverflowError:
        return f"{1970 + micros / (365.2425 * 86_400 * _MICRO):.0f}"


# --- columns ----------------------------------------------------------------------------------------------------

_PLAIN_DIGITS = r"^[0-9]{1,18}$"


def column_micros(column: pa.Array, rule: TimeRule) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return (microseconds since 1970, mask of the valid ones) of a column; the vectorized form of `microseconds`."""
    column = plain(column)
    kind = column.type
    if pa.types.is_date(kind):
        column, kind = pc.cast(column, pa.timestamp("s")), pa.timestamp("s")
    if pa.types.is_timestamp(kind):
        return _integer_micros(pc.cast(column, pa.int64()), kind.unit, rule)
    if pa.types.is_integer(kind) and not pa.types.is_uint64(kind) and not rule.formats:
        return _integer_micros(pc.cast(column, pa.int64()), rule.unit, rule)
    if pa.types.is_floating(kind) and not rule.formats:
        return _float_micros(column, rule)
    if pa.types.is_string(kind):
        text = pc.utf8_trim_whitespace(column)
        if rule.formats:
            return _slow(text.to_pylist(), rule)
        digits = pc.fill_null(pc.match_substring_regex(text, _PLAIN_DIGITS), False)
        fast = np.asarray(digits)
        numbers = pc.cast(pc.if_else(digits, text, "0"), pa.int64())
        micros, good = _integer_micros(numbers, rule.unit, rule)
        good &= fast
        if not fast.all():
            rest, usable = _slow(text.filter(pa.array(~fast)).to_pylist(), rule)
            micros[~fast], good[~fast] = rest, usable
        return micros, good
    return _slow(column.to_pylist(), rule)


def _integer_micros(column: pa.Array, unit: str, rule: TimeRule) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    valid = np.asarray(column.is_valid())
    values = column.fill_null(0).to_numpy(zero_copy_only=False)
    factor, divisor = max(_MICRO // PER_SECOND[unit], 1), max(PER_SECOND[unit] // _MICRO, 1)
    fits = (values > -(1 << 62)) & (np.abs(values // divisor) < (1 << 62) // factor)
    micros = np.where(fits, values, 0) // divisor * factor
    low, high = rule.bounds
    return micros, valid & fits & (micros >= low) & (micros <= high - 1)


def _float_micros(column: pa.Array, rule: TimeRule) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    values = column.to_numpy(zero_copy_only=False)
    whole = np.isfinite(values) & (np.abs(values) < 2**53)
    whole[whole] = values[whole] == np.floor(values[whole])
    micros, good = _integer_micros(pa.array(np.where(whole, values, 0).astype(np.int64)), rule.unit, rule)
    good &= whole
    if not whole.all():
        rest, usable = _slow([number_text(value) for value in values[~whole]], rule)
        micros[~whole], good[~whole] = rest, usable
    return micros, good


def _slow(values: list[Any], rule: TimeRule) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    micros = np.zeros(len(values), np.int64)
    good = np.zeros(len(values), bool)
    for index, value in enumerate(values):
        text = _as_text(value)
        found = _from_text(text, rule) if text else None
        if found is not None and -(1 << 62) < found < 1 << 62:
            micros[index], good[index] = found, True
    return micros, good
