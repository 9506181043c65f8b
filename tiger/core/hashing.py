"""Digests: sha256 of bytes, of files in pieces, and fingerprints of plain values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any


def sha256(content: bytes | Iterable[bytes | memoryview]) -> str:
    """Return the sha256 of bytes, or of pieces of bytes one after another, as hexadecimal digits."""
    digest = hashlib.sha256()
    for piece in (content,) if isinstance(content, bytes) else content:
        digest.update(piece)
    return digest.hexdigest()


def fingerprint(*parts: Any) -> str:
    """Return the first 8 hexadecimal digits of the sha256 over the canonical JSON of `parts`."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return sha256(canonical.encode())[:8]
