"""Cached downloads: progress, resumption of interrupted transfers, size check, revalidation.

Next to every file `NAME` the cache keeps `NAME.version.json` with the ETag and Last-Modified that the server sent. A
transfer is resumed only if the server still has that version (`If-Range`), so that no file is assembled from two
versions. A cached file is revalidated with the server; if the server cannot be reached, the cached file is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tiger.core.errors import DataError
from tiger.core.progress import Progress
from tiger.core.storage import StorageError, explain

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_ATTEMPTS = 5
_CONNECT_SECONDS, _CHECK_SECONDS = 60, 15
_SAME_TRANSFER_SECONDS = (
    600  # within which a server without ETag and Last-Modified is trusted to have the same file if the size is equal
)


def cache_folder() -> Path:
    """Return the folder of downloads: `$TIGER_CACHE`, else `~/.cache/tiger-on-ray`."""
    return Path(os.environ.get("TIGER_CACHE", "~/.cache/tiger-on-ray")).expanduser()


def download(url: str, cache: Path | None = None, pause: float = 1.0) -> Path:
    """Return the local copy of `url`, after downloading the bytes that are missing or have changed.

    An interrupted transfer is resumed by an HTTP range request if the server still has the same version of the file;
    otherwise, or if the server does not support ranges, the download restarts. From a server that sends no ETag or
    Last-Modified a transfer is resumed within ten minutes, if the size is the same. Processes that download one URL at
    the same time wait for each other. A changed file replaces the old one atomically.

    Args:
        url: an HTTP or HTTPS URL.
        cache: the folder to keep files in; `cache_folder()` by default.
        pause: seconds before the first retry, doubled each time.

    Raises:
        DataError: the server rejects the request, cannot be reached, or keeps sending less than it announced.
        StorageError: the cache cannot be written.
    """
    name = Path(urllib.parse.urlparse(url).path).name.strip(".") or "download"
    folder = (cache or cache_folder()) / hashlib.sha256(url.encode()).hexdigest()[:8]
    with _in_cache(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder / f"{name}.lock", url):
        return _download(url, folder / name, pause)


@contextlib.contextmanager
def _alone(lock: Path, url: str) -> Iterator[None]:
    """Hold a lock that is released when the process exits; wait for a process that holds it."""
    with _in_cache(lock), lock.open("ab"):
        pass  # distinguishes an unwritable folder from the failures below
    with lock.open("ab") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("download: another process is downloading %s; waiting for it", url)
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        except OSError as error:
            log.warning("download: %s cannot be locked (%s); do not download %s in another process", lock, error, url)
        yield


@contextlib.contextmanager
def _in_cache(path: Path) -> Iterator[None]:
    """Convert errors of the cache's disk, to distinguish them from connection errors, which are retried."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: {explain(error, False)} (TIGER_CACHE sets the folder of downloads)") from error


def _download(url: str, target: Path, pause: float) -> Path:
    if target.exists() and not _has_changed(url, target):
        return target
    partial = target.with_name(f"{target.name}.partial")
    reason = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            log.warning("download: %s: %s; attempt %d of %d", url, reason, attempt + 1, _ATTEMPTS)
            time.sleep(pause * 2 ** (attempt - 1))
        try:
            total = _fetch(url, partial)
        except urllib.error.HTTPError as error:
            reason = f"the server answered {error.code} {error.reason}"
            if error.code == 416:  # the partial file is longer than the file, so it belongs to another version
                _remove(partial)
            elif error.code < 500 and error.code != 429:
                raise DataError(f"{url}: {reason}; check the URL, or download the file manually") from None
        except StorageError:
            raise
        except (OSError, HTTPException) as error:
            reason = f"the connection failed ({error})"
        else:
            size = partial.stat().st_size
            if total is None or size == total:
                partial.replace(target)  # before its version: a kill between the two costs one more transfer
                _version_file(partial).replace(_version_file(target))
                return target
            reason = f"received {size:,} of {total:,} bytes"
            if size > total:
                _remove(partial)
    raise DataError(f"{url}: {reason}, {_ATTEMPTS} times; the partial download is kept, rerun to resume")


def _has_changed(url: str, target: Path, method: str = "HEAD") -> bool:
    """Return whether the server has another version than the cached one; False if the server cannot be asked."""
    version = _read_version(target)
    asked = {"If-None-Match": version.get("etag"), "If-Modified-Since": version.get("last_modified")}
    request = _request(url, asked, method)
    try:
        with urllib.request.urlopen(request, timeout=_CHECK_SECONDS) as response:
            now = _version_of(response.headers)
            length = response.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        if error.code == 304:
            log.info("download: %s is in the cache and has not changed (%s)", url, target)
        elif method == "HEAD" and error.code in (403, 405, 501) and any(asked.values()):
            return _has_changed(url, target, "GET")  # only the headers of the response are read
        else:
            log.warning(
                "download: cannot check whether %s has changed (the server answered %d %s); using the cached file "
                "(%s)", url, error.code, error.reason, target,
            )  # fmt: skip
        return False
    except (OSError, HTTPException) as error:
        log.warning("download: %s cannot be reached (%s); using the cached file (%s)", url, error, target)
        return False
    known = {key: value for key, value in now.items() if value and version.get(key)}
    key = "etag" if "etag" in known else "last_modified" if "last_modified" in known else None
    has_changed = known[key] != version[key] if key else False
    if length is not None and int(length) != target.stat().st_size and "Content-Encoding" not in response.headers:
        has_changed = True
    if has_changed:
        log.info("download: %s has changed since it was downloaded, and is downloaded again", url)
    else:
        log.info("download: %s is in the cache%s (%s)", url, "" if key else ", of the same size", target)
    return has_changed


def _fetch(url: str, partial: Path) -> int | None:
    """Append the missing bytes to `partial`; return the file's announced size, if any."""
    have = partial.stat().st_size if partial.exists() else 0
    version = _read_version(partial)
    unchanged = _strong(version)
    is_recent = have > 0 and time.time() - partial.stat().st_mtime < _SAME_TRANSFER_SECONDS
    asked: dict[str, str | None] = {}
    if have and (unchanged or (is_recent and version.get("total"))):
        asked = {"Range": f"bytes={have}-", "If-Range": unchanged}
    with urllib.request.urlopen(_request(url, asked), timeout=_CONNECT_SECONDS) as response:
        now = _version_of(response.headers)
        resumed = response.status == 206
        length = response.headers.get("Content-Length")
        total = int(length) + (have if resumed else 0) if length else None
        if resumed and not _continues(response.headers.get("Content-Range"), have):
            raise OSError("the server sent another byte range than requested")
        is_other = _strong(now) not in (None, unchanged) or str(total) != (version.get("total") or str(total))
        if resumed and is_other:  # a server without support for If-Range
            _remove(partial)
            raise OSError("the file has changed on the server")
        name = partial.name.removesuffix(".partial")
        if not resumed:
            if have:
                log.info("download: restarting %s: the server has another version, or does not support ranges", url)
            _remove(partial)
            with _in_cache(partial):
                _version_file(partial).write_text(json.dumps(now | {"total": None if total is None else str(total)}))
        progress = Progress(f"download {name}", total, "bytes", done=have if resumed else 0)
        with partial.open("ab" if resumed else "wb") as file:
            while chunk := response.read(_CHUNK):
                with _in_cache(partial):
                    file.write(chunk)
                    file.flush()
                progress.add(len(chunk))
        progress.close()
    return total


def _request(url: str, headers: dict[str, str | None], method: str = "GET") -> urllib.request.Request:
    given = {name: value for name, value in headers.items() if value}
    return urllib.request.Request(url, headers={"User-Agent": "tiger-on-ray", **given}, method=method)


def _version_of(headers: Any) -> dict[str, str | None]:
    return {"etag": headers.get("ETag"), "last_modified": headers.get("Last-Modified")}


def _strong(version: dict[str, str | None]) -> str | None:
    """Return the strong validator of a version: its ETag unless it is weak (`W/...`), else Last-Modified."""
    etag = version.get("etag")
    return etag if etag and not etag.startswith("W/") else version.get("last_modified")


def _continues(content_range: str | None, have: int) -> bool:
    return content_range is None or content_range.strip().startswith(f"bytes {have}-")


def _version_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.version.json")


def _read_version(path: Path) -> dict[str, str | None]:
    try:
        version = json.loads(_version_file(path).read_text())
    except (OSError, ValueError):
        return {}
    return version if isinstance(version, dict) else {}


def _remove(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _version_file(partial).unlink(missing_ok=True)
