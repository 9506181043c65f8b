"""Conversion of Ray's errors to `TigerError`."""

from __future__ import annotations

from ray.exceptions import RayError

from tiger.core.errors import ResourceError, TigerError, last_line
from tiger.on_ray import cluster

__all__ = ["RayError", "reason", "to_tiger_error"]

_OUT_OF_MEMORY = "how to address the out of memory issue"  # of the message that ends what Ray says about it


def to_tiger_error(error: TigerError | RayError) -> TigerError:
    """Convert an error of Ray to one line that says where to find more; return a `TigerError` unchanged."""
    if isinstance(error, TigerError):
        return error
    return ResourceError(f"Ray: {reason(error)} (--debug shows the traceback; Ray's logs: {cluster.log_folder()})")


def reason(error: BaseException) -> str:
    """Return why Ray failed, in one line."""
    if _OUT_OF_MEMORY in str(error):
        return (
            "the node was running out of memory, and a process of this run was ended; use fewer workers at once, a "
            "larger node, or end what else runs there"
        )
    return last_line(error)
