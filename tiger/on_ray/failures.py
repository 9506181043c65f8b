"""Errors of Ray's as errors of ours."""

from __future__ import annotations

from ray.exceptions import RayError

from tiger.core.errors import ResourceError, TigerError, last_line
from tiger.on_ray import cluster

__all__ = ["RayError", "to_tiger_error"]


def to_tiger_error(error: TigerError | RayError) -> TigerError:
    """Return an error of Ray's as one line that says where more is to be found; return ours unchanged."""
    if isinstance(error, TigerError):
        return error
    return ResourceError(
        f"Ray: {last_line(error)} (--debug shows the traceback; {cluster.log_folder()} has Ray's logs)"
    )
