"""Publishing of finished artifacts: two runs of one stage never write to each other's files.

- On a local or mounted disk a run holds a lock (`flock`) from before its first file until after the manifest. A
  concurrent run gets a `ResourceError`. The lock is released when its process exits, and the next run continues with
  the files that it finds. File locks must be visible to all machines that mount the disk, as with NFS 4.
- An object store has no lock. There each run writes below a private prefix, `<kind>-<fingerprint>/attempt-<id>/`, and
  the common manifest, next to the attempts, names the valid one. The order of requests makes that safe without any
  clock, if the store has read-after-write consistency, as S3 and Google Cloud Storage have: a run (1) writes the
  manifest into its own attempt, (2) checks for the common manifest, (3) writes it only if there was none. A run that
  has written it removes other attempts only if they have no manifest of their own. So a run whose attempt is removed
  while it still works finds the common manifest at step 2 and never names its attempt. If two runs pass step 2 at the
  same time, the later common manifest replaces the earlier one, and both attempts are kept: whichever manifest a reader
  has read, it names a complete attempt, and `verify` passes. An attempt that is complete but not named (its run was
  killed between steps 1 and 3, or was replaced) is removed by a later run, once neither it nor the common manifest has
  changed for a week by the store's clock: by then no live run can be between steps 1 and 3, which take a moment and are
  covered by the heartbeat, and no reader of a replaced attempt is left. No request is conditional: pyarrow offers none,
  and S3-compatible stores differ in their support.
- A run that finds a killed attempt copies its files and continues with the copies; it never writes to that attempt.
  A heartbeat decides whether an attempt was killed; a wrong decision costs duplicate work, not correctness.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pyarrow import fs as pafs

from tiger.core.errors import ResourceError
from tiger.core.storage import MANIFEST, PARTIAL, SCRATCH, Folder, in_one_line

log = logging.getLogger(__name__)

ATTEMPT = "attempt-"  # a run's private prefix on an object store
_ALIVE, _BEGUN = f"{SCRATCH}/alive.json", f"{SCRATCH}/begun.json"
_CLOCK = f"{SCRATCH}/clock.json"  # written to learn the store's time
_BEAT_SECONDS, _SILENT_SECONDS = 10.0, 60.0  # heartbeat interval; silence after which an attempt counts as killed
_SETTLE_SECONDS = 2.0  # longer than a live run takes from checking for the common manifest to having written it
_KEPT_SECONDS = 7 * 86_400.0  # longer than any run reads an artifact; see the top of this file
_COPIES = 16  # requests in flight while a killed attempt is copied

Fill = Callable[[Folder, str | None], dict[str, Any]]
"""Writes an artifact's files to a folder (on an object store also given the attempt's name); returns the manifest."""


def publish(home: Folder, kind: str, fill: Fill) -> None:
    """Run `fill` and publish its output in the folder `home`, unless another run publishes it first.

    Args:
        home: the artifact's folder.
        kind: the artifact's kind, for log lines.
        fill: writes the files and returns the manifest.

    Raises:
        ResourceError: another run is making it, on a local disk.
    """
    (_publish_locally if home.is_local else _publish_to_store)(home, kind, fill)


def tidy(home: Folder) -> None:
    """Remove leftovers of a run that was killed right after publishing, and attempts that are no longer needed."""
    if not home.is_local:
        with contextlib.suppress(OSError):
            _sweep(home)
    elif os.path.isdir(home.join(SCRATCH)):
        with contextlib.suppress(ResourceError, OSError), _claimed(home):
            _delete_scratch(home)


# --- local disks: a lock ------------------------------------------------------------------------------------------


def _publish_locally(home: Folder, kind: str, fill: Fill) -> None:
    with _claimed(home):
        if not home.exists(MANIFEST):  # else another run has just made it
            manifest = fill(home, None)
            home.write_json(MANIFEST, manifest)
            log.info("%s: finished in %.1f s", kind, manifest["seconds"])
        _delete_scratch(home)  # also the lock file, which is not needed once the manifest exists


@contextlib.contextmanager
def _claimed(home: Folder) -> Iterator[None]:
    """Hold an exclusive lock on the artifact; it is released when the process exits for any reason.

    The lock file is removed only when the manifest exists. So a run that gets the lock checks for the manifest again,
    and if there is none, its lock is the only one.

    Raises:
        ResourceError: another run is making it, or the disk has no locks.
    """
    with _open_claim(home) as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(
                f"another run is making {home.uri}; wait for it to finish, then rerun: the result is reused"
            ) from None
        except OSError as error:
            raise ResourceError(
                f"{home.uri}: this file system cannot lock files ({error.strerror}), so two runs could write to one "
                "folder; set root to another disk, or to an object store (s3://, gs://)"
            ) from None
        yield


def _open_claim(home: Folder) -> Any:
    for _ in range(100):
        with in_one_line(home.join(SCRATCH)):
            os.makedirs(home.join(SCRATCH), exist_ok=True)
            try:
                return open(home.join(f"{SCRATCH}/claim"), "ab")
            except FileNotFoundError:  # another run has just published, and removed the folder
                continue
    raise ResourceError(f"{home.uri}/{SCRATCH} is removed as often as it is created; check which process does that")


def _discard(own: Folder) -> None:
    try:
        own.delete()
    except OSError as error:  # the artifact exists, and this is not a part of it
        log.warning("%s could not be removed: %s", own.uri, error)


def _delete_scratch(folder: Folder) -> None:
    try:
        folder.delete(SCRATCH)
    except OSError as error:  # two runs remove it at once; readers ignore it, and the next run tidies up
        log.info("%s/%s could not be removed: %s", folder.uri, SCRATCH, error)


# --- object stores: private prefixes ------------------------------------------------------------------------------


def _publish_to_store(home: Folder, kind: str, fill: Fill) -> None:
    """Fill an attempt and name it in the common manifest, unless another run was faster; see the top of this file."""
    own = home.child(f"{ATTEMPT}{uuid.uuid4().hex[:12]}")
    name = own.uri.rpartition("/")[2]
    with _beating(own):
        _continue(home, own, kind)
        if home.exists(MANIFEST):  # another run has published while this one waited and copied
            _discard(own)
            return
        try:
            manifest = fill(own, name)
        except Exception as error:
            if own.exists(_BEGUN) or not home.exists(MANIFEST):
                raise
            log.warning("%s: another run has published and removed this attempt (%s)", kind, error)
            _discard(own)
            return
        own.write_json(MANIFEST, manifest)
        named = not home.exists(MANIFEST)
        if named:
            home.write_json(MANIFEST, manifest)
            if any(attempt.beats for attempt in _attempts(home, but=name)):
                time.sleep(_SETTLE_SECONDS)  # so that both runs continue with the same attempt
    winner = home.read_json(MANIFEST).get("attempt")
    if winner == name:
        log.info("%s: finished in %.1f s", kind, manifest["seconds"])
    else:
        log.warning("%s: another run has published it too, and its artifact is used (%s)", kind, home.uri)
    if not named:
        _discard(own)  # nobody can have read it
        return
    _delete_scratch(own)
    with contextlib.suppress(OSError):  # it is published; leftovers are removed by a later run
        _sweep(home)


@contextlib.contextmanager
def _beating(own: Folder) -> Iterator[None]:
    """Write a heartbeat of the attempt inside the block; remove it at the end."""
    done = threading.Event()

    def beat() -> None:
        own.write_json(_ALIVE, {"host": platform.node(), "process": os.getpid(), "time": time.time()})

    def keep_beating() -> None:
        while not done.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the run itself reports an unreachable store
                beat()

    beat()
    thread = threading.Thread(target=keep_beating, name="heartbeat of an attempt", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(_SILENT_SECONDS)
        with contextlib.suppress(OSError):
            own.filesystem.delete_file(own.join(_ALIVE))


@dataclass(frozen=True)
class _Attempt:
    """An attempt as listed: {relative file name: modification time in seconds since 1970}."""

    name: str
    files: dict[str, float]

    @property
    def beats(self) -> bool:
        """Whether its last heartbeat is at most `_SILENT_SECONDS` old."""
        return _ALIVE in self.files and time.time() - self.files[_ALIVE] < _SILENT_SECONDS


def _attempts(home: Folder, but: str = "") -> list[_Attempt]:
    """List all attempts except for `but`."""
    found: dict[str, dict[str, float]] = {}
    for info in home.entries():
        name, _, file = info.path[len(home.path) + 1 :].partition("/")
        if info.type == pafs.FileType.File and name.startswith(ATTEMPT) and name != but:
            found.setdefault(name, {})[file] = (info.mtime_ns or 0) / 1e9
    return [_Attempt(name, files) for name, files in sorted(found.items())]


def _continue(home: Folder, own: Folder, kind: str) -> None:
    """Copy the files of the newest attempt that was killed, so that the stage continues where it stopped.

    An attempt with a recent heartbeat is watched first, because it may have been killed since.
    """
    others = _attempts(home, but=own.uri.rpartition("/")[2])
    living = _watch(home, [attempt for attempt in others if attempt.beats], kind)
    if living:
        log.warning("%s: another run is making it, too; the one that finishes first is used (%s)", kind, home.uri)
    killed = [attempt for attempt in others if _BEGUN in attempt.files and attempt.name not in living]
    if killed:
        last = max(killed, key=lambda attempt: attempt.files[_BEGUN])
        names = [name for name in last.files if name not in (MANIFEST, _ALIVE, _BEGUN) and not name.endswith(PARTIAL)]
        try:
            with ThreadPoolExecutor(_COPIES) as pool:
                list(pool.map(lambda name: own.copy_from(home.child(last.name), name), names))
            log.info("%s: continuing with %d files of a killed attempt", kind, len(names))
        except OSError as error:  # another run has published meanwhile, and removes other attempts
            log.warning("%s: a killed attempt cannot be continued (%s)", kind, error)
            own.delete()
    own.write_json(_BEGUN, {"time": time.time()})


def _watch(home: Folder, suspects: list[_Attempt], kind: str) -> set[str]:
    """Return the names of the attempts that send another heartbeat; wait for it until they count as killed."""
    before = {attempt.name: attempt.files[_ALIVE] for attempt in suspects}
    deadline = time.monotonic() + _SILENT_SECONDS
    if before:
        log.info("%s: checking whether an earlier run of it is alive, for up to %.0f s", kind, _SILENT_SECONDS)
    living: set[str] = set()
    while before and not living and time.monotonic() < deadline:
        time.sleep(min(1.0, _BEAT_SECONDS))
        with in_one_line(home.uri):
            now = home.filesystem.get_file_info([home.join(f"{name}/{_ALIVE}") for name in before])
        for name, info in zip(list(before), now, strict=True):
            if info.type != pafs.FileType.File:  # it has finished by itself
                del before[name]
            elif (info.mtime_ns or 0) / 1e9 != before[name]:
                living.add(name)
    return set(before) if living else set()  # the others had no time to send one


def _sweep(home: Folder) -> None:
    """Remove attempts that are no longer needed; the common manifest must exist."""
    named = home.read_json(MANIFEST).get("attempt")
    for attempt in _attempts(home):
        if attempt.beats:
            continue
        if attempt.name == named:
            if any(name.startswith(f"{SCRATCH}/") for name in attempt.files):
                _delete_scratch(home.child(attempt.name))
        elif MANIFEST not in attempt.files:
            log.info("removing the unfinished attempt %s/%s", home.uri, attempt.name)
            home.child(attempt.name).delete()
        elif _is_abandoned(home, attempt):
            log.info("removing the finished but unused attempt %s/%s", home.uri, attempt.name)
            home.child(attempt.name).delete()


def _is_abandoned(home: Folder, attempt: _Attempt) -> bool:
    """Return whether neither the attempt nor the common manifest has changed for `_KEPT_SECONDS`.

    By the store's clock: a machine whose own clock is wrong must not remove an attempt in use.
    """
    changed = max(attempt.files.values())
    if time.time() - changed < _KEPT_SECONDS:
        return False
    own = home.child(attempt.name)
    own.write_json(_CLOCK, {"time": time.time()})
    paths = [own.join(_CLOCK), home.join(MANIFEST)]
    with in_one_line(home.uri):
        now, published = ((info.mtime_ns or 0) / 1e9 for info in home.filesystem.get_file_info(paths))
        if published and now - max(changed, published) >= _KEPT_SECONDS:
            return True
        own.filesystem.delete_file(own.join(_CLOCK))
    return False
