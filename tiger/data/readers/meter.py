"""Progress of reading raw files as a fraction of their bytes on disk, which gives an ETA for any format.

Readers of all formats report their position in the file; in a gzip file, the position in the compressed bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import TypeVar

from tiger.core.progress import Progress
from tiger.data.readers.raw_files import RawFile

_Rows = TypeVar("_Rows")


class Meter:
    """Position in a list of files that are read one after another."""

    def __init__(self, files: Sequence[tuple[RawFile, int]], progress: Progress) -> None:
        """Add up the sizes.

        Args:
            files: every file with its size in bytes, in reading order.
            progress: logs the fraction.
        """
        self.begin: dict[tuple[str, str], int] = {}
        self.progress, self.total, self.done = progress, 0, 0
        for file, size in files:
            self.begin.setdefault((file.label, file.path), self.total)
            self.total += size

    def at(self, file: RawFile, position: int) -> None:
        """Record that `file` has been read up to byte `position`."""
        begin = self.begin.get((file.label, file.path))
        if begin is None or not self.total:
            return
        self.done = max(self.done, begin + position)
        self.progress.at(self.done / self.total)


_current: ContextVar[Meter | None] = ContextVar("meter", default=None)


def report(file: RawFile, position: int) -> None:
    """Report the position in `file`, in bytes, to the current meter, if there is one."""
    if (meter := _current.get()) is not None:
        meter.at(file, position)


def metered(rows: Iterator[_Rows], meter: Meter) -> Iterator[_Rows]:
    """Yield `rows`, with `meter` as the current meter while they are read."""
    while True:
        token = _current.set(meter)  # for this step only: a generator shares the context of its caller
        try:
            row = next(rows)
        except StopIteration:
            return
        finally:
            _current.reset(token)
        yield row


@contextlib.contextmanager
def paused_meter(file: RawFile | None = None) -> Iterator[None]:
    """Suspend the current meter inside the block; if `file` is given, log the progress of reading it instead."""
    meter = Meter([(file, file.size())], Progress(f"find the fields of {file}", None, "rows")) if file else None
    token = _current.set(meter)
    try:
        yield
    finally:
        _current.reset(token)
