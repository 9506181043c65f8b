"""Row filters of the configuration: `rating >= 4`, `event = "transaction"`, `event in ["buy", "cart"]`."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tiger.data.readers.values import plain, readable

_FORM = re.compile(r"\s*(?P<column>`[^`]+`|\S(?:.*?\S)?)\s*(?P<op>>=|<=|!=|==|=|>|<|\s+in\s+)\s*(?P<value>\S.*?)\s*")
_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


@dataclass(frozen=True)
class Filter:
    """Keep rows for which the comparison `op` of `column` with `values` is true.

    Attributes:
        text: the filter as written.
        column: name of the column.
        op: `=`, `!=`, `<`, `<=`, `>`, `>=` or `in`.
        values: one value, or several for `in`.
    """

    text: str
    column: str
    op: str
    values: tuple[str | float, ...]

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Parse a filter.

        Raises:
            ValueError: not a filter; the message shows the expected form.
        """
        match = _FORM.fullmatch(text)
        if match is None:
            raise ValueError(f'{text!r} is not a filter; write one such as rating >= 4 or event = "transaction"')
        column, op = match["column"].strip("`"), match["op"].strip().replace("==", "=")
        try:
            value = json.loads(match["value"])
        except ValueError:
            value = match["value"].strip("'")
        values = value if isinstance(value, list) else [value]
        if op == "in" and not isinstance(value, list):
            raise ValueError(f'{text!r}: in requires a list, such as event in ["buy", "cart"]')
        if op != "in" and len(values) != 1:
            raise ValueError(f"{text!r}: a list requires in: {column} in {match['value']}")
        plain_values = [str(each).lower() if isinstance(each, bool) else each for each in values]
        if not all(isinstance(each, (str, int, float)) for each in plain_values):
            raise ValueError(f"{text!r}: compare with text or a number")
        if op in _ORDER and not all(_number(each) is not None for each in plain_values):
            raise ValueError(f"{text!r}: {op} compares numbers")
        return cls(text, column, op, tuple(plain_values))

    def __call__(self, value: Any) -> bool | None:
        """Return whether a value passes; None if it is not a number and the comparison requires one."""
        text = readable(value)
        if text is None or not text.strip():
            return False
        number = _number(text.strip())
        if self.op in _ORDER:
            return None if number is None else _ORDER[self.op](number, _number(self.values[0]))
        equal = any(
            text.strip() == str(each) or (number is not None and number == _number(each)) for each in self.values
        )
        return equal != (self.op == "!=")

    def mask(self, column: pa.Array) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Return (passes, cannot be compared) for every row."""
        coded = plain(column).dictionary_encode()
        outcomes = [self(value) for value in coded.dictionary.to_pylist()]
        codes = coded.indices.fill_null(len(outcomes)).to_numpy(zero_copy_only=False)
        passes = np.array([outcome is True for outcome in outcomes] + [False])
        bad = np.array([outcome is None for outcome in outcomes] + [False])
        return passes[codes], bad[codes]


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number == number else None
