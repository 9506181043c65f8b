"""Console and JSON-lines logging, with secrets redacted.

A line of `ROOT/logs/JOB-TIME.jsonl` has `time` (UTC, ISO 8601), `level`, `logger`, `job`, `message`, and `error` for
the error that ended the job. On an object store, which cannot append, the whole file is rewritten every 30 seconds.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from datetime import UTC, datetime

from tiger.core.storage import Folder

_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|ACCESS_KEY", re.IGNORECASE)
_IN_URI = re.compile(r"(?<=://)[^/\s@]+(?=@)")  # user:password@ of a URI
_NAMED = re.compile(r"(?i)\b([\w.-]*(?:token|secret|password|access_key)\s*[=:]\s*)[^\s,;&]+")
_FLUSH_SECONDS = 30


def redact(text: str) -> str:
    """Return the text without secrets: environment variables named as secrets, credentials in URIs, `password=...`."""
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAMES.search(name) and not name.endswith(("_PATH", "_FILE")):
            text = text.replace(value, "[redacted]")
    return _NAMED.sub(r"\1[redacted]", _IN_URI.sub("[redacted]", text))


class _Console(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class JsonLinesHandler(logging.Handler):
    """Write every record as a line of JSON to `ROOT/logs`."""

    def __init__(self, root: str, job: str) -> None:
        super().__init__()
        self.job, self.folder = job, Folder(root).child("logs")
        self.run = f"{job}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}"
        self.filename = f"{self.run}.jsonl"
        self.lines: list[str] = []
        self.written, self.flushed = 0, time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        """Append a record; write the file at once on a local disk, otherwise every `_FLUSH_SECONDS`."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "job": self.job,
            "message": redact(record.getMessage()),
        }
        if (error := getattr(record, "error", None)) is not None:
            entry["error"] = redact(error)
        self.lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
        if self.folder.is_local or time.monotonic() - self.flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the lines that are not written yet."""
        self.flushed = time.monotonic()
        if self.written == len(self.lines):
            return
        if self.folder.is_local:
            self.folder.append_bytes(self.filename, "".join(self.lines).encode())
            self.lines.clear()
        else:
            self.folder.write_bytes(self.filename, "".join(self.lines).encode())
        self.written = len(self.lines)


def configure_console(debug: bool = False) -> None:
    """Log INFO and above to standard error, but only warnings or errors of noisy libraries.

    Args:
        debug: log all lines of Ray.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Console("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("httpx", "sentence_transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    for chatty in ("ray.train", "ray.tune"):  # Ray Data has its own console handler: see `on_ray.cluster`
        logging.getLogger(chatty).setLevel(logging.DEBUG if debug else logging.WARNING)
