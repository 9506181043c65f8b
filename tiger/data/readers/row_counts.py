"""Counts of the rows of a raw table: kept, skipped with a reason, or left out on request."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tiger.core.errors import DataError

log = logging.getLogger(__name__)

EXAMPLES = 5
LISTED_NAMES = 10


class InvalidRow(Exception):  # noqa: N818 - a row to skip, not a failure of the program
    """A row that cannot be used; its message is the reason under which it is counted.

    Attributes:
        detail: what was found and how to fix it; logged with the first row of each reason.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


@dataclass
class RowCounts:
    """Count the rows of one raw table: read = kept + skipped + left out.

    Attributes:
        skipped: rows that cannot be used, by reason.
        left_out: rows that the configuration leaves out (`data.filters`, empty histories), by reason.
        table: name of the table in messages.
        kept: rows that are used.
        entries_left_out: entries of lists in rows (`data.history`) that are not used, by reason.
        first: the first row that was skipped for each reason.
        in_order: events whose time is their position in the files.
        lines: physical lines of text tables, to reconcile them with the rows.
        extra_lines: lines that are not rows: headers, blank lines, continuations of quoted fields.
    """

    table: str
    kept: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    entries_left_out: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    in_order: int = 0
    lines: int = 0
    extra_lines: int = 0

    def keep(self, rows: int = 1) -> None:
        """Count rows as kept."""
        self.kept += rows

    def skip(self, path: Any, number: int, reason: str, detail: str = "") -> None:
        """Count row or line `number` (from 1) of `path` as unreadable; the first one of each reason is an example."""
        self.skipped[reason] += 1
        if self.skipped[reason] == 1:
            self.first[reason] = f"{path}:{number}: {reason}" + (f" ({detail})" if detail else "")

    def leave_out(self, rows: int, reason: str) -> None:
        """Count rows as left out on request."""
        if rows:
            self.left_out[reason] += rows

    def leave_out_entries(self, entries: int, reason: str) -> None:
        """Count entries of lists as left out."""
        if entries:
            self.entries_left_out[reason] += entries

    def add(self, other: RowCounts) -> None:
        """Add the counts of rows that follow those of this table."""
        self.skipped.update(other.skipped)
        self.first = other.first | self.first
        self.left_out.update(other.left_out)
        self.entries_left_out.update(other.entries_left_out)
        self.kept += other.kept
        self.in_order += other.in_order
        self.lines += other.lines
        self.extra_lines += other.extra_lines

    @property
    def read(self) -> int:
        """Number of rows read."""
        return self.kept + self.skipped.total() + self.left_out.total()

    def check(self, max_bad_row_fraction: float) -> None:
        """Compare the counts with the limit.

        Args:
            max_bad_row_fraction: maximum fraction of skipped rows.

        Raises:
            DataError: no row was kept, or more than `max_bad_row_fraction` of the rows were skipped.
        """
        bad = self.skipped.total()
        if not self.kept:
            left_out = self._most_common(self.left_out)
            causes = "; ".join(filter(None, (self._most_common(self.skipped), left_out and f"left out: {left_out}")))
            raise DataError(
                f"{self.table}: no row could be used of {self.read:,} read ({causes or 'empty'}){self._first()}"
            )
        if bad > max_bad_row_fraction * self.read:
            raise DataError(
                f"{self.table}: {bad:,} of {self.read:,} rows cannot be read ({bad / self.read:.2%}, allowed: "
                f"{max_bad_row_fraction:.2%}, data.max_bad_row_fraction): {self._most_common(self.skipped)}"
                f"{self._first()}"
            )

    def close(self, max_bad_row_fraction: float) -> None:
        """Log the counts.

        Args:
            max_bad_row_fraction: maximum fraction of skipped rows.

        Raises:
            DataError: see `check`.
        """
        self.check(max_bad_row_fraction)
        bad = self.skipped.total()
        log.info("%s: %s rows read, %s kept, %s skipped", self.table, f"{self.read:,}", f"{self.kept:,}", f"{bad:,}")
        if self.left_out:
            log.info("%s: left out %s", self.table, self._most_common(self.left_out))
        for reason, count in self.entries_left_out.items():
            log.info("%s: left out %s %s", self.table, f"{count:,}", reason)
        if bad:
            log.warning("%s: skipped %s%s", self.table, self._most_common(self.skipped), self._first())

    @property
    def examples(self) -> list[str]:
        """The first row of each of the most common reasons, at most `EXAMPLES`."""
        found = (self.first.get(reason) for reason in _by_count(self.skipped))
        return [example for example in found if example is not None][:EXAMPLES]

    def _first(self) -> str:
        return "; first: " + " | ".join(self.examples) if self.examples else ""

    @staticmethod
    def _most_common(counts: Counter[str]) -> str:
        return ", ".join(f"{count:,} x {reason}" for reason, count in list(_by_count(counts).items())[:EXAMPLES])

    @classmethod
    def from_record(cls, table: str, record: Mapping[str, Any]) -> RowCounts:
        """Return the counts that `record` has written to a manifest."""
        return cls(
            table,
            kept=record["kept"],
            skipped=Counter(record["skipped"]),
            left_out=Counter(record.get("left_out", {})),
            first=dict(zip(record["skipped"], record["examples"], strict=False)),
        )

    def record(self) -> dict[str, Any]:
        """Return the counts as a record for the manifest."""
        record: dict[str, Any] = {"read": self.read, "kept": self.kept, "skipped": _by_count(self.skipped)}
        if self.left_out:
            record["left_out"] = _by_count(self.left_out)
        if self.entries_left_out:
            record["entries_left_out"] = _by_count(self.entries_left_out)
        if self.lines:
            record |= {"lines": self.lines, "extra_lines": self.extra_lines}
        return record | {"examples": self.examples}


def _by_count(counts: Counter[str]) -> dict[str, int]:
    """Return counts by reason, the most common first: an order that does not depend on how the rows were read."""
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def listed(names: Any) -> str:
    """Join at most `LISTED_NAMES` names for a message."""
    names = [str(name) if len(str(name)) <= 60 else f"{str(name)[:57]}..." for name in names]
    more = len(names) - LISTED_NAMES
    return ", ".join(names[:LISTED_NAMES]) + (f" and {more:,} more" if more > 0 else "")
