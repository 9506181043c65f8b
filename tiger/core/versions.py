"""Versions of the packages that determine results, and whose objects are sent between nodes."""

from __future__ import annotations

import importlib.metadata
import platform

PACKAGES = ("torch", "ray", "sentence-transformers", "pyarrow", "numpy")


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of `PACKAGES` on this machine."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
