"""Peak memory of a run on this machine: of this process and all that it has started, such as a local Ray."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SECONDS = 1.0
_PROC = Path("/proc")


class PeakMemory:
    """The largest sum that was seen, in bytes; None on a system without /proc."""

    def __init__(self) -> None:
        self.bytes: int | None = None

    def sample(self) -> None:
        """Add up the memory of the process tree now."""
        used = tree_memory()
        if used is not None:
            self.bytes = max(used, self.bytes or 0)


@contextmanager
def watch_memory(seconds: float = _SECONDS) -> Iterator[PeakMemory]:
    """Sample the memory of this process and its descendants, in a thread, at an interval, while the block runs."""
    peak, done = PeakMemory(), threading.Event()

    def watch() -> None:
        while True:
            peak.sample()
            if done.wait(seconds):
                return

    thread = threading.Thread(target=watch, daemon=True, name="memory")
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def tree_memory() -> int | None:
    """Return the private memory (anonymous resident pages) of this process and its descendants, in bytes.

    Shared pages, such as Ray's object store, are left out: every process that maps them would count them again.
    """
    if not (_PROC / "self" / "status").exists():
        return None
    parents, memory = {}, {}
    for folder in _PROC.iterdir():
        if folder.name.isdigit():
            try:
                status = (folder / "status").read_text()
            except OSError:  # it has ended
                continue
            fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            parents[int(folder.name)] = int(fields["PPid"])
            memory[int(folder.name)] = int(fields.get("RssAnon", "0 kB").split()[0]) * 1024
    own = int((_PROC / "self").resolve().name)
    family = {own}
    while found := {process for process, parent in parents.items() if parent in family} - family:
        family |= found
    return sum(memory.get(process, 0) for process in family)
