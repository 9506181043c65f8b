"""Arrays that all processes of a machine read from one file each, mapped into memory.

The workers of a training on one node read the same vectors and histories. These are converted once per node to files in
the folder for temporary files (`TMPDIR`), whose pages the operating system shares between the processes, and gives back
when memory is short. Files that no process uses any more are removed when a process ends, or by the next one that needs
any.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import getpass
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiger.core.hashing import sha256

log = logging.getLogger(__name__)

MAPPED_BYTES = 256 << 20
"""Size from which arrays are mapped: below it, a copy in every process is faster."""

_held: dict[str, Any] = {}  # folders that this process uses, and their locks


def mapped_folder(content: str, size: int, build: Callable[[Path], None]) -> Path | None:
    """Return a folder with the files that `build` has written, in this or another process of the machine.

    Args:
        content: what the files are made from; equal for equal files.
        size: bytes that the files take.
        build: writes the files into an empty folder.

    Returns:
        The folder, to be read only; None if the disk has no room for it.
    """
    home = _home()
    name = sha256(content.encode())[:16]
    folder = home / name
    if name in _held:
        return folder
    _sweep(home)
    with _used(home, name) as lock, (home / f"{name}.build").open("ab") as building:
        fcntl.flock(building.fileno(), fcntl.LOCK_EX)
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            if shutil.disk_usage(home).free < size * 1.1:
                log.warning(
                    "%s has no room for %.1f GB, so that every process of this machine holds them in memory; set "
                    "TMPDIR to a disk with more room", home, size / 1e9,
                )  # fmt: skip
                return None
            folder.mkdir()
            build(folder)
            (folder / "done").touch()
        _held[name] = os.dup(lock.fileno())
    return folder


def load_mapped(path: Path) -> npt.NDArray[Any]:
    """Map an array of a `.npy` file; its elements can be changed, but not those of the file."""
    array: npt.NDArray[Any] = np.lib.format.open_memmap(path, "c")  # it unpickles nothing
    return array


def _home() -> Path:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for this user
        user = str(os.getuid())
    home = Path(tempfile.gettempdir()) / f"tiger-mapped-{user}"
    home.mkdir(mode=0o700, exist_ok=True)
    if home.stat().st_uid != os.getuid():
        home = Path(tempfile.mkdtemp(prefix="tiger-mapped-"))
    return home


@contextlib.contextmanager
def _used(home: Path, name: str) -> Iterator[Any]:
    """Hold the lock of a folder together with the other processes that use it."""
    path = home / f"{name}.lock"
    while True:
        with path.open("ab") as lock:
            fcntl.flock(lock.fileno(), fcntl.LOCK_SH)
            if _is_file(path, lock):
                yield lock
                return


def _is_file(path: Path, opened: Any) -> bool:
    """Return whether an open file still has its name: another process may have removed it meanwhile."""
    try:
        return path.stat().st_ino == os.fstat(opened.fileno()).st_ino
    except FileNotFoundError:
        return False


def _sweep(home: Path) -> None:
    """Remove the folders that no process uses."""
    for path in home.glob("*.lock"):
        if path.stem in _held:
            continue
        with contextlib.suppress(OSError), path.open("ab") as lock:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(home / path.stem, ignore_errors=True)
            path.with_suffix(".build").unlink(missing_ok=True)
            path.unlink()


@atexit.register
def _release() -> None:
    for descriptor in _held.values():
        os.close(descriptor)
    if _held:
        _held.clear()
        _sweep(_home())
