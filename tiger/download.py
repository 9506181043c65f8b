"""Files by URL into a cache: progress, resume after a broken connection, size check."""

from __future__ import annotations

import hashlib
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path

from tiger.errors import DataError
from tiger.progress import Progress

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_ATTEMPTS = 5


def cache_folder() -> Path:
    """Where downloads are kept: `$TIGER_CACHE`, else `~/.cache/tiger-on-ray`."""
    return Path(os.environ.get("TIGER_CACHE", "~/.cache/tiger-on-ray")).expanduser()


def download(url: str, cache: Path | None = None, pause: float = 1.0) -> Path:
    """Returns the local copy of `url`, fetching what is missing of it.

    A broken transfer is taken up where it broke off, by an HTTP range request; a server without ranges is read anew.

    Args:
        cache: the folder to keep files in; `cache_folder()` by default.
        pause: seconds before the first retry, doubled each time.

    Raises:
        DataError: the server refuses, cannot be reached, or keeps sending less than it announced.
    """
    name = Path(urllib.parse.urlparse(url).path).name.strip(".") or "download"
    folder = (cache or cache_folder()) / hashlib.sha256(url.encode()).hexdigest()[:8]
    target = folder / name
    if target.exists():
        log.info("download: %s is in the cache (%s)", url, target)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.partial"
    reason = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            log.warning("download: %s: %s; attempt %d of %d", url, reason, attempt + 1, _ATTEMPTS)
            time.sleep(pause * 2 ** (attempt - 1))
        try:
            total = _fetch(url, partial)
        except urllib.error.HTTPError as error:
            reason = f"the server answered {error.code} {error.reason}"
            if error.code == 416:  # the partial file is longer than the file: it belongs to an older version
                partial.unlink()
            elif error.code < 500 and error.code != 429:
                raise DataError(f"{url}: {reason}; check the address, or download it by hand") from None
        except (OSError, HTTPException) as error:
            reason = f"the connection failed ({error})"
        else:
            size = partial.stat().st_size
            if total is None or size == total:
                partial.replace(target)
                return target
            reason = f"{size:,} of {total:,} bytes came"
            if size > total:
                partial.unlink()
    raise DataError(f"{url}: {reason}, {_ATTEMPTS} times; what came is kept, run the same command again to go on")


def _fetch(url: str, partial: Path) -> int | None:
    """Appends to `partial` what is missing of it; returns the file's announced size, if any."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "tiger-on-ray"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=60) as response:
        resumed = response.status == 206
        length = response.headers.get("Content-Length")
        total = int(length) + (have if resumed else 0) if length else None
        name = partial.name.removesuffix(".partial")
        progress = Progress(f"download {name}", total, "bytes", done=have if resumed else 0)
        with partial.open("ab" if resumed else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                progress.add(len(chunk))
        progress.close()
    return total
