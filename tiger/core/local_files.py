"""Files on a local or mounted disk that are written as a whole or not at all, and survive a power cut."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import BinaryIO

from tiger.core.storage_errors import StorageError

PARTIAL = ".partial"  # temporary files, also those of a killed writer; ignored by readers


@contextlib.contextmanager
def create(path: str, durable: bool = True, size: int | None = None) -> Iterator[BinaryIO]:
    """Yield a temporary file that replaces `path` at the end of the block; after an exception it is removed.

    Args:
        path: the file.
        durable: fsync the file before it replaces `path`, and then its folder.
        size: bytes that will be written if known, for messages.

    Raises:
        StorageError: the disk is full.
    """
    parent = os.path.dirname(path)
    partial = f"{path}.{os.getpid()}{PARTIAL}"
    try:
        os.makedirs(parent, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(partial, path)
        if durable:
            _sync_folder(parent)
    except Exception as error:
        with contextlib.suppress(OSError):  # keep the original error
            os.unlink(partial)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            fit = f", {size:,} bytes do not fit" if size else ""
            raise StorageError(f"{path}: the disk is full{fit}; free some, or set root to another disk") from None
        raise


def _sync_folder(path: str) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
