"""Progress of long tasks with a rate and an ETA: one rewritten line in a terminal, periodic lines in a job log.

Without a terminal, lines go through `logging`, so that a worker's lines are forwarded to the driver with its logs.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator

log = logging.getLogger(__name__)


class Progress:
    """Track progress and log it at most every `interval` seconds."""

    def __init__(
        self, what: str, total: int | None, unit: str, *, done: int = 0, interval: float | None = None
    ) -> None:
        """Start the clock.

        Args:
            what: label of the line, such as the stage's name.
            total: total number of units, None if it is not known.
            unit: plural name of a unit, such as `rows`.
            done: units done by an earlier attempt; included in the count, but not in the rate.
            interval: seconds between two lines; by default 0.2 in a terminal and 10 in a log.
        """
        self.what, self.total, self.unit = what, total, unit
        self.terminal = sys.stderr.isatty()
        self.interval = interval if interval is not None else (0.2 if self.terminal else 10.0)
        self.done = self.before = done
        self.fraction: float | None = None
        self.begin = self.said = time.monotonic()

    @property
    def rate(self) -> float:
        """Units per second in this attempt."""
        return (self.done - self.before) / max(time.monotonic() - self.begin, 1e-9)

    def add(self, amount: int, note: str = "") -> None:
        """Add finished units; log a line, with `note` at its end, if the interval has passed."""
        self.done += amount
        now = time.monotonic()
        if now - self.said >= self.interval:
            self.said = now
            self._say(now, note)

    def at(self, fraction: float) -> None:
        """Set the finished fraction in [0, 1], for a total that is not known in units (bytes read, not rows)."""
        self.fraction = fraction
        self.add(0)

    def close(self, note: str = "") -> None:
        """Log the final line with the elapsed time."""
        self._say(time.monotonic(), note, final=True)

    def _say(self, now: float, note: str, final: bool = False) -> None:
        rate = self.rate
        line = f"{self.what}: {self.done:,}"
        elapsed, fraction = now - self.begin, self.fraction
        if self.total is not None:
            line += f" of {self.total:,}"
        line += f" {self.unit}, {rate:,.1f}/s" if rate >= 0.1 or not rate else f" {self.unit}, {60 * rate:.1f}/min"
        if final:
            line += f", {elapsed:.1f} s"
        elif self.total is not None and rate > 0:
            line += f", ETA {(self.total - self.done) / rate:,.0f} s"
        elif fraction:
            line += f", {fraction:.0%}, ETA {elapsed * (1 - fraction) / fraction:,.0f} s"
        if note:
            line += f"; {note}"
        if not self.terminal:
            log.info("%s", line)
            return
        sys.stderr.write(f"\r\x1b[K{line}" + ("\n" if final else ""))
        sys.stderr.flush()


@contextlib.contextmanager
def timed(what: str, after: float = 10.0) -> Iterator[None]:
    """Log that `what` is in progress after `after` seconds, then at doubling intervals, and finally its duration."""
    begin, done = time.monotonic(), threading.Event()

    def watch() -> None:
        wait = after
        while not done.wait(wait):
            log.info("%s: in progress, %.0f s so far", what, time.monotonic() - begin)
            wait *= 2

    watcher = threading.Thread(target=watch, name=f"timed {what}", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    if (seconds := time.monotonic() - begin) >= after:
        log.info("%s: %.1f s", what, seconds)
