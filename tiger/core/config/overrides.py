"""Overrides of nested tables by dotted keys, typed on the command line or given as values."""

from __future__ import annotations

import tomllib
import typing
from typing import Any

from tiger.core.config.annotations import holds_text
from tiger.core.config.base import Config
from tiger.core.config.options import section_of
from tiger.core.config.plugins import PluginConfig, plugin_base
from tiger.core.errors import ConfigError


def overridden(
    model: type[Config], values: dict[str, Any], changes: dict[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """Return a copy of nested tables in which dotted keys have other values.

    The kinds of plug-ins are changed first, whatever the order. A changed kind drops the keys of its section that only
    the former kind has, and those whose type differs between the two; keys that all kinds share keep their values.

    Args:
        model: the configuration class.
        values: nested tables of plain values.
        changes: dotted keys with their values; `TypedText` text is parsed according to the type of the key.
        prefix: put before every key in messages.

    Raises:
        ConfigError: a kind does not exist, or a key leads through a value that is not a section.
    """
    kinds = {key: value for key, value in changes.items() if key.endswith(".kind")}
    for key, value in (kinds | changes).items():
        section, _, leaf = key.rpartition(".")
        if leaf == "kind" and section in model.model_fields:
            values = values | {section: _of_other_kind(model, section, values.get(section), value, prefix)}
        if isinstance(value, TypedText):
            value = value.read(_annotation(model, values, key, prefix))
        try:
            values = with_override(values, key, value)
        except TypeError as error:
            raise ConfigError(f"{prefix}{key}: {error}") from None
    return values


def _of_other_kind(model: type[Config], name: str, given: Any, kind: Any, prefix: str) -> Any:
    """Return the values of a section that are kept if its kind becomes `kind`."""
    field = model.model_fields[name]
    default = field.get_default(call_default_factory=True)
    if not isinstance(given, dict) or not isinstance(default, PluginConfig):
        return given
    base = plugin_base(type(default))
    kind = kind.read(str) if isinstance(kind, TypedText) else kind
    new = base.of_kind(kind, f"{prefix}{name}.kind")
    try:
        old = base.of_kind(given.get("kind", default.kind))
    except ConfigError:
        old = base
    if new is old:
        return given

    def is_kept(key: str) -> bool:
        if key not in old.model_fields:
            return True  # not a key of any kind: reported as unknown
        shared = base.model_fields.get(key)
        return shared is not None and all(
            key in config.model_fields and config.model_fields[key].annotation == shared.annotation
            for config in (old, new)
        )

    return {key: value for key, value in given.items() if is_kept(key)}


def with_override(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a copy of nested tables in which the dotted `key` has `value`.

    Raises:
        TypeError: the key leads through a value that is not a table.
    """
    head, dot, rest = key.partition(".")
    if not dot:
        return {**values, key: value}
    inner = values.get(head)
    if not isinstance(inner, dict | None):
        raise TypeError(f"{head} is a value, not a section")
    return {**values, head: with_override(inner or {}, rest, value)}


class TypedText(str):
    """The value of an override, as it was typed."""

    def read(self, annotation: Any) -> Any:
        """Parse the value as TOML; return it unchanged if it is not TOML, or a number or date for a text key.

        `none`, as the help prints it, is None for a key that may be None and holds no text; TOML has no word for it.
        """
        if self == "none" and type(None) in typing.get_args(annotation) and not holds_text(annotation):
            return None
        try:
            value = tomllib.loads(f"value = {self}")
        except (ValueError, RecursionError):  # also of integers of thousands of digits, and deep nesting
            return str(self)
        if set(value) != {"value"} or (holds_text(annotation) and not isinstance(value["value"], (str, list, dict))):
            return str(self)
        return value["value"]


def _annotation(model: type[Config], values: dict[str, Any], key: str, prefix: str) -> Any:
    """Return the type of the field behind a dotted key; None if there is none."""
    head, dot, rest = key.partition(".")
    field = model.model_fields.get(head)
    if field is None or not dot:
        return None if field is None else field.annotation
    given = values.get(head)
    given = given if isinstance(given, dict) else {}
    section = section_of(field, given, prefix + head)
    return None if section is None else _annotation(section, given, rest, f"{prefix}{head}.")


def split_override(override: str) -> tuple[str, TypedText]:
    """Split `dotted.key=value`.

    Raises:
        ConfigError: it has no key or no `=`.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: an override is written dotted.key=value")
    return key, TypedText(text)
