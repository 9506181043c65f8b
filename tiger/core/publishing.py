"""How a finished artifact appears: two runs of one stage never write to each other's files.

- On a local or mounted disk a run holds a lock (`flock`) from before its first file until after the manifest. A second
  run gets a `ResourceError` meanwhile. The lock ends with its process, and the next run continues with the files that
  it finds. The disk must have locks that all its machines see, as NFS 4 has.
- An object store has no lock. There each run writes below a private prefix, `<kind>-<fingerprint>/attempt-<id>/`, and
  the common manifest, next to the attempts, names the one that counts. The order of requests makes that safe without
  any clock, if the store shows at once what was written, as S3 and Google's do: a run (1) writes the manifest into its
  own attempt, (2) looks for the common manifest, (3) writes it only if there was none. A run that has written it
  removes other attempts only if they have no manifest of their own. So an attempt that is removed while its run still
  works finds the common manifest at step 2 and is never named. If two runs pass step 2 at the same time, the later
  common manifest replaces the earlier one, and both attempts stay: whichever a reader has read, it names a complete
  attempt, and `verify` passes. An attempt that is complete but not named (its run was killed between steps 1 and 3,
  or was replaced) is removed by a later run, once neither it nor the common manifest has changed for a week by the
  store's clock: a live run takes a moment from step 1 to step 3 and beats meanwhile, and a reader of a replaced attempt
  has ended. No request is conditional: pyarrow offers none, and S3-compatible stores differ in them.
- A run that finds a killed attempt copies its files and continues with the copies. It only ever reads there. Whether
  an attempt was killed is judged by a heartbeat; a wrong judgment costs work that is done twice, not correctness.
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
_BEAT_SECONDS, _SILENT_SECONDS = 10.0, 60.0  # between an attempt's signs of life; without one it counts as killed
_SETTLE_SECONDS = 2.0  # longer than a live run takes from looking for the common manifest to having written it
_KEPT_SECONDS = 7 * 86_400.0  # longer than any run works on what it has read; see the top of this file
_COPIES = 16  # requests in flight while a killed attempt is copied

Fill = Callable[[Folder, str | None], dict[str, Any]]
"""Fills a folder, which is the attempt of that name if there is one; returns the manifest, which is still to write."""


def publish(home: Folder, kind: str, fill: Fill) -> None:
    """Have the artifact of the folder `home` made, unless another run has made it meanwhile.

    Raises:
        ResourceError: another run is making it, on a local disk.
    """
    (_publish_locally if home.is_local else _publish_to_store)(home, kind, fill)


def tidy(home: Folder) -> None:
    """Remove what a run has left that was killed right after it published, and attempts that nobody needs."""
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
        _delete_scratch(home)  # with the claim's file, which nobody needs once the manifest is there


@contextlib.contextmanager
def _claimed(home: Folder) -> Iterator[None]:
    """Keep other runs from making the same artifact; a claim ends with its process, however that ends.

    The file of the claim is only removed when the manifest is there. So a run that gets a claim looks for the manifest
    once more, and if there is none, its claim is the only one.

    Raises:
        ResourceError: another run is making it, or the disk has no locks.
    """
    with _open_claim(home) as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(
                f"another run is making {home.uri}; wait until it has ended, then the same command uses what it left"
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
    raise ResourceError(f"{home.uri}/{SCRATCH} disappears as often as it is made; look at what runs there")


def _discard(own: Folder) -> None:
    try:
        own.delete()
    except OSError as error:  # there is an artifact, and this is not a part of it
        log.warning("%s could not be removed: %s", own.uri, error)


def _delete_scratch(folder: Folder) -> None:
    try:
        folder.delete(SCRATCH)
    except OSError as error:  # two runs remove it at once; readers pass over it, and the next run tidies up
        log.info("%s/%s could not be removed: %s", folder.uri, SCRATCH, error)


# --- object stores: private prefixes ------------------------------------------------------------------------------


def _publish_to_store(home: Folder, kind: str, fill: Fill) -> None:
    """Fill an attempt and name it in the common manifest, unless another run was faster; see the top of this file."""
    own = home.child(f"{ATTEMPT}{uuid.uuid4().hex[:12]}")
    name = own.uri.rpartition("/")[2]
    with _beating(own):
        _continue(home, own, kind)
        if home.exists(MANIFEST):  # another run has published while this one watched and copied
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
                time.sleep(_SETTLE_SECONDS)  # so that both runs go on with the same attempt
    winner = home.read_json(MANIFEST).get("attempt")
    if winner == name:
        log.info("%s: finished in %.1f s", kind, manifest["seconds"])
    else:
        log.warning("%s: another run has published it too, and its artifact is used (%s)", kind, home.uri)
    if not named:
        _discard(own)  # nobody can have read it
        return
    _delete_scratch(own)
    with contextlib.suppress(OSError):  # it is published; what could not be removed now is removed later
        _sweep(home)


@contextlib.contextmanager
def _beating(own: Folder) -> Iterator[None]:
    """Show that the attempt is alive, until the run ends in any way but a kill."""
    done = threading.Event()

    def beat() -> None:
        own.write_json(_ALIVE, {"host": platform.node(), "process": os.getpid(), "time": time.time()})

    def keep_beating() -> None:
        while not done.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the run itself reports a store that is away
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
    """An attempt as a listing shows it: {relative name: seconds since 1970 when it was written}."""

    name: str
    files: dict[str, float]

    @property
    def beats(self) -> bool:
        """Whether it has shown a sign of life within `_SILENT_SECONDS`."""
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
    """Copy the files of the newest attempt that was killed, so that the stage continues where that stopped.

    An attempt that seems alive is watched first, because one that was killed a moment ago looks alive, too.
    """
    others = _attempts(home, but=own.uri.rpartition("/")[2])
    living = _watch(home, [attempt for attempt in others if attempt.beats], kind)
    if living:
        log.warning("%s: another run is making it, too; the one that ends first is used (%s)", kind, home.uri)
    killed = [attempt for attempt in others if _BEGUN in attempt.files and attempt.name not in living]
    if killed:
        last = max(killed, key=lambda attempt: attempt.files[_BEGUN])
        names = [name for name in last.files if name not in (MANIFEST, _ALIVE, _BEGUN) and not name.endswith(PARTIAL)]
        try:
            with ThreadPoolExecutor(_COPIES) as pool:
                list(pool.map(lambda name: own.copy_from(home.child(last.name), name), names))
            log.info("%s: continuing with %d files of an attempt that was ended", kind, len(names))
        except OSError as error:  # another run has published meanwhile, and removes what it does not need
            log.warning("%s: an attempt that was ended cannot be continued (%s)", kind, error)
            own.delete()
    own.write_json(_BEGUN, {"time": time.time()})


def _watch(home: Folder, suspects: list[_Attempt], kind: str) -> set[str]:
    """Return the names of the attempts that show another sign of life; wait for it until they count as killed."""
    before = {attempt.name: attempt.files[_ALIVE] for attempt in suspects}
    deadline = time.monotonic() + _SILENT_SECONDS
    if before:
        log.info("%s: watching whether a run that began it is alive, for up to %.0f s", kind, _SILENT_SECONDS)
    living: set[str] = set()
    while before and not living and time.monotonic() < deadline:
        time.sleep(min(1.0, _BEAT_SECONDS))
        with in_one_line(home.uri):
            now = home.filesystem.get_file_info([home.join(f"{name}/{_ALIVE}") for name in before])
        for name, info in zip(list(before), now, strict=True):
            if info.type != pafs.FileType.File:  # it has ended by itself
                del before[name]
            elif (info.mtime_ns or 0) / 1e9 != before[name]:
                living.add(name)
    return set(before) if living else set()  # the others had no time to show one


def _sweep(home: Folder) -> None:
    """Remove attempts that nobody needs, once the common manifest is there."""
    named = home.read_json(MANIFEST).get("attempt")
    for attempt in _attempts(home):
        if attempt.beats:
            continue
        if attempt.name == named:
            if any(name.startswith(f"{SCRATCH}/") for name in attempt.files):
                _delete_scratch(home.child(attempt.name))
        elif MANIFEST not in attempt.files:
            log.info("%s/%s, which was not finished, is removed", home.uri, attempt.name)
            home.child(attempt.name).delete()
        elif _is_abandoned(home, attempt):
            log.info("%s/%s, which was finished but is not the one in use, is removed", home.uri, attempt.name)
            home.child(attempt.name).delete()


def _is_abandoned(home: Folder, attempt: _Attempt) -> bool:
    """Return whether neither the attempt nor the common manifest has changed for `_KEPT_SECONDS`.

    By the store's clock: a machine whose own clock is wrong must not remove what is in use.
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
