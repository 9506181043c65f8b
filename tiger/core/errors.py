"""Errors that a user can fix: one sentence that names what was found, where, and how to fix it.

The command line prints them as one line and exits with `exit_code`; any other exception is a bug and keeps its
traceback.
"""


class TigerError(Exception):
    """Base of all errors whose message says how to fix them."""

    exit_code = 1


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
