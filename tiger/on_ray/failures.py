"""Conversion of Ray's errors to `TigerError`."""

from __future__ import annotations

from ray.exceptions import RayError

from tiger.core.errors import ResourceError, TigerError, last_line
from tiger.on_ray import cluster

__all__ = ["RayError", "to_tiger_error"]


def to_tiger_error(error: TigerError | RayError) -> TigerError:
    """Convert an error of Ray to one line that says where to find more; return a `TigerError` unchanged."""
    if isinstance(error, TigerError):
        return error
    return ResourceError(f"Ray: {last_line(error)} (--debug shows the traceback; Ray's logs: {cluster.log_folder()})")
