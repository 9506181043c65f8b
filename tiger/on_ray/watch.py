"""Stall reports: a stage on Ray that makes no progress logs what it waits for, and which log file explains it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
import ray.exceptions

from tiger.core.errors import ResourceError
from tiger.core.storage import Folder
from tiger.on_ray import cluster

log = logging.getLogger(__name__)

SILENT_SECONDS = 60.0
"""Interval in seconds between log lines while there is no progress."""


class Watch:
    """Time of the last progress of a stage."""

    def __init__(self, what: str, details: Callable[[], str]) -> None:
        self.what, self.details = what, details
        self.begin = self.last = time.monotonic()
        self.over = threading.Event()

    def progress(self) -> None:
        """Record progress."""
        self.last = time.monotonic()

    def run(self, storage: Folder | None, seconds: float) -> None:
        """Log a line after every `seconds` without progress; check nodes that join against `storage`."""
        reported, known = self.begin, _alive()
        while not self.over.wait(min(seconds, 5.0)):
            now = time.monotonic()
            if now - max(self.last, reported) >= seconds:
                reported = now
                log.info(
                    "%s: no progress for %.0f s; %s; %s", self.what, now - self.last, cluster.demand(), self.details()
                )
            if storage is not None and (alive := _alive()) - known:
                known = alive
                _inspect(storage)


def _alive() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _inspect(storage: Folder) -> None:
    try:
        cluster.inspect_new_nodes(storage)
    except ResourceError as error:  # the next stage fails on it; this one may not need the node
        log.warning("a node that joined cannot be used for this run: %s", error)
    except (OSError, ray.exceptions.RayError) as error:
        log.debug("nodes that joined were not inspected: %r", error)


@contextmanager
def watching(
    what: str,
    log_file: str,
    *,
    details: Callable[[], str] | None = None,
    storage: Folder | None = None,
    seconds: float = SILENT_SECONDS,
) -> Iterator[Watch]:
    """Watch a block of code that waits for Ray; the block calls `progress` on the yielded object.

    Args:
        what: the stage, for log lines.
        log_file: file or folder in the session's logs that explains a stall.
        details: returns what is in progress; called when a line is logged.
        storage: nodes that join while the block runs are checked against it.
        seconds: interval between log lines without progress.
    """
    where = f"see {cluster.log_folder()}/{log_file}"
    watch = Watch(what, lambda: f"{details()}; {where}" if details else where)
    thread = threading.Thread(target=watch.run, args=(storage, seconds), name=f"watch {what}", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.over.set()
        thread.join()
