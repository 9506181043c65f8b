"""Errors of file systems in one line: the path, the reason, and how to fix it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

import pyarrow as pa

from tiger.core.errors import ResourceError, TigerError


class StorageError(ResourceError, OSError):
    """A failed file system operation; names the path, the reason, and how to fix it."""


class MissingError(StorageError, FileNotFoundError):
    """A file or folder that does not exist."""


@contextlib.contextmanager
def in_one_line(where: str) -> Iterator[None]:
    """Convert exceptions of the operating system and Arrow into a one-line `StorageError` about `where`."""
    try:
        yield
    except TigerError:
        raise
    except FileNotFoundError as error:
        check = "the bucket" if "://" in where else "symbolic links in it"
        raise MissingError(f"{where} does not exist, or no longer exists; check the path and {check}") from error
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"{where}: {explain(error, '://' in where)}") from error


def explain(error: Exception, is_remote: bool) -> str:
    """Return the reason of a file system error and how to fix it, without line breaks."""
    code = getattr(error, "errno", None)
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some of it, or set root to another disk"
    if code is not None and not is_remote:
        return f"{os.strerror(code)}; {_FIXES.get(code, 'fix that, or choose another folder')}"
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{reason.partition(' Detail: ')[0][:300]}; check the address, the credentials, and the server"


_FIXES = {
    errno.ENOENT: "check the path",
    errno.EACCES: "grant this user access to it, or choose another folder",
    errno.EPERM: "grant this user access to it, or choose another folder",
    errno.EROFS: "choose a folder on another disk",
    errno.ENOTDIR: "a component of this path is a file; remove it, or choose another folder",
    errno.EEXIST: "a component of this path is a file; remove it, or choose another folder",
    errno.EISDIR: "remove that folder, or choose another one",
    errno.ELOOP: "fix the symbolic links",
}
