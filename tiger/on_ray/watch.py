"""No silence: a stage on Ray that makes no progress says what it waits for, and which log explains it."""

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
"""Seconds without progress after which a line is logged, and again after as many more."""


class Watch:
    """Knows when a stage last made progress."""

    def __init__(self, what: str, details: Callable[[], str]) -> None:
        self.what, self.details = what, details
        self.begin = self.last = time.monotonic()
        self.over = threading.Event()

    def progress(self) -> None:
        """Note that something was done."""
        self.last = time.monotonic()

    def run(self, storage: Folder | None, seconds: float) -> None:
        """Log a line whenever `seconds` passed without progress, and what nodes that joined meanwhile lack."""
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
    except ResourceError as error:  # the next stage stops there; this one may do without the node
        log.warning("a node that joined is not fit for this run: %s", error)
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
    """Watch a block of code that waits for Ray; call `progress` on what this yields whenever something was done.

    Args:
        what: the stage, for the lines.
        log_file: file or folder below the session's logs that explains a stall.
        details: more about what is in progress, asked for when a line is logged.
        storage: nodes that join while the block runs are checked against it.
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
