"""Errors that a user can fix: one sentence that names what was found, where, and how to fix it.

The command line prints them as one line and exits with `exit_code`; any other exception is a bug and keeps its
traceback.

An error crosses processes as a record, also when it is pickled: `TigerError.to_record` and `TigerError.from_record`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar


class TigerError(Exception):
    """Base of all errors whose message says how to fix them."""

    exit_code = 1
    _kinds: ClassVar[dict[str, type[TigerError]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "<locals>" not in cls.__qualname__:  # not the classes that Ray derives at run time to wrap an error
            TigerError._kinds[cls.__name__] = cls

    def to_record(self) -> dict[str, Any]:
        """Return the error as JSON values, to send it to another process: its class, its message, its attributes."""
        bases = [base.__name__ for base in type(self).__mro__ if TigerError._kinds.get(base.__name__) is base]
        attributes = json.loads(json.dumps(vars(self), default=str))
        return {"kinds": bases, "message": str(self), "attributes": attributes}

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> TigerError:
        """Return the error of a record; of the nearest base class if this process does not know its class."""
        known = [TigerError._kinds[name] for name in record["kinds"] if name in TigerError._kinds]
        kind = known[0] if known else TigerError
        error = kind.__new__(kind, record["message"])
        vars(error).update(record["attributes"])
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        return TigerError.from_record, (self.to_record(),)


class ConfigError(TigerError):
    """A configuration key or value that cannot be used."""

    exit_code = 2


class DataError(TigerError):
    """Raw or intermediate data that cannot be used."""

    exit_code = 3


class ArtifactError(TigerError):
    """An artifact that is missing, incomplete, altered, or does not belong to the others."""

    exit_code = 4


class ResourceError(TigerError):
    """CPUs, GPUs, memory, or disk space that the configuration requires and the machine or cluster does not have."""

    exit_code = 5


class SecurityError(TigerError):
    """A setting, a path or a file that would let others run code here or read data without authorization."""

    exit_code = 8


class HealthError(TigerError):
    """A stage that ended in a degenerate state: identical texts, one code for all, a loss that is not finite."""

    exit_code = 6


def last_line(error: BaseException) -> str:
    """Return the last non-empty line of an error's message (in a traceback, the reason), or the name of its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
