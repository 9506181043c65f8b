"""Configurations from TOML files and overrides, with messages that name every invalid key."""

from __future__ import annotations

import difflib
import tomllib
import typing
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import ValidationError

from tiger.core.config.base import Config
from tiger.core.config.options import describe, section_of
from tiger.core.config.overrides import overridden, split_override
from tiger.core.config.plugins import abbreviated
from tiger.core.config.renamed import RENAMED
from tiger.core.errors import ConfigError

C = TypeVar("C", bound="Config")

MAX_LISTED = 10  # names, or errors, in one message


def load(
    model: type[C],
    name: str | None,
    overrides: list[str],
    search: Path,
    prefix: str = "",
    defaults: dict[str, Any] | None = None,
) -> C:
    """Build `model` from a TOML file and overrides.

    Args:
        model: the configuration class.
        name: a file's path, or the name of a file `<search>/<name>.toml`; None for the class's defaults alone.
        overrides: `dotted.key=value` strings; values are parsed as TOML, falling back to a string. For keys that hold
            text, a number or a date is kept as typed.
        search: the folder of the built-in configurations.
        prefix: put before every key in messages.
        defaults: nested tables of values that apply without a file, in place of the class's defaults.

    Raises:
        ConfigError: no such file, invalid TOML, an unknown key (with a suggestion), or an invalid value.
    """
    values: dict[str, Any] = dict(defaults or {}) if name is None else _read_toml(_find(name, search))
    given = [split_override(override) for override in overrides]
    return build(model, overridden(model, values, dict(given), prefix), prefix)


def build(model: type[C], values: dict[str, Any], prefix: str = "") -> C:
    """Validate `values` as `model`.

    Args:
        model: the configuration class.
        values: nested tables of plain values.
        prefix: put before every key in messages.

    Raises:
        ConfigError: lists all invalid values, at most `MAX_LISTED`.
    """
    for name, field in model.model_fields.items():
        if isinstance(given := values.get(name), dict):
            section_of(field, given, prefix + name)  # reports an unknown kind with its section
    try:
        return model.model_validate(values)
    except ValidationError as error:
        details = error.errors()
        reasons = dict.fromkeys(_explain(model, values, detail, prefix) for detail in details[:MAX_LISTED])
        more = [f"and {len(details) - MAX_LISTED} more"] if len(details) > MAX_LISTED else []
        raise ConfigError("; ".join([*reasons, *more])) from None


def dump_toml(values: dict[str, Any]) -> str:
    """Return nested tables of plain values as TOML, without values that are None, which TOML cannot express."""

    def without_none(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_none(inner) for key, inner in value.items() if inner is not None}
        return value

    return tomli_w.dumps(without_none(values))


def _find(name: str, search: Path) -> Path:
    path = Path(name)
    if path.suffix == ".toml" or path.parent != Path():
        if path.is_file():
            return path
        raise ConfigError(f"configuration file {name} does not exist")
    shipped = {candidate.stem: candidate for candidate in sorted(search.glob("*.toml")) if "." not in candidate.stem}
    if name in shipped:
        return shipped[name]
    raise ConfigError(f"no configuration named {name!r}{_nearest(name, shipped)}; shipped: {', '.join(shipped)}")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also of integers of thousands of digits
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _explain(model: type[Config], values: dict[str, Any], detail: Any, prefix: str) -> str:
    location = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        if new := RENAMED.get(prefix + location):
            return f"unknown key {prefix}{location}; it was renamed to {new}"
        keys = [key for key, *_ in describe(model, values)]
        nearest = _nearest(location, keys, prefix)
        return f"unknown key {prefix}{location}{nearest}"
    location = prefix + location
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] in ("value_error", "missing"):
        return f"{location}: {message}" if location else message
    if detail["type"] in ("string_type", "literal_error") and isinstance(detail["input"], (bool, float)):
        message += "; write it in quotes"
    return f"{location or 'configuration'} = {abbreviated(detail['input'])}: {message}"


def _nearest(name: str, candidates: typing.Iterable[str], prefix: str = "") -> str:
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{found[0]}?" if found else ""
