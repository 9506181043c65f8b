"""Errors that a user can act on: one sentence that names what was found, where, and the cure.

The command line prints them as one line and leaves with `exit_code`; everything else is a defect of ours and
keeps its traceback.
"""


class TigerError(Exception):
    """Base of all errors with a cure in their message."""

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
    """Processors, memory, or disk that the configuration asks for and the machine or cluster does not have."""

    exit_code = 5


class SecurityError(TigerError):
    """A setting, a path or a file that would let others run code here or read what is not theirs."""

    exit_code = 8


class HealthError(TigerError):
    """A stage that ended in a degenerate state: identical texts, one code for all, a loss that is not finite."""

    exit_code = 6


def last_line(error: BaseException) -> str:
    """Return the last line of a library's message that is not empty: of a traceback the reason; or the error's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
