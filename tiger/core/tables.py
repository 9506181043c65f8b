"""Text tables for logs and the console."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines of text, with columns of equal width, aligned to the right.

    Args:
        rows: rows of equal length; the first one is usually the header.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
