"""The options of a configuration class, also those of the plug-ins that given values choose."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

from tiger.core.config.annotations import type_name
from tiger.core.config.base import Config
from tiger.core.config.plugins import PluginConfig, plugin_base


def describe(model: type[Config], values: dict[str, Any] | None = None) -> Iterator[tuple[str, str, Any, str]]:
    """Yield (dotted key, type, default, description) of every option, in declaration order.

    Args:
        model: the configuration class.
        values: given values, so that a plug-in section lists the options of the kind chosen there.
    """
    for name, field in model.model_fields.items():
        given = (values or {}).get(name)
        section = section_of(field, given if isinstance(given, dict) else {}, name)
        named = _named_sections(field)
        if named is not None:
            for key, kind, default, meaning in describe(named):
                yield f'{name}."KEY".{key}', kind, default, meaning
        elif section is None:
            default = field.get_default(call_default_factory=True)
            yield name, type_name(field.annotation), default, field.description or ""
        else:
            for key, kind, default, meaning in describe(section, given if isinstance(given, dict) else None):
                yield f"{name}.{key}", kind, default, meaning


def section_of(field: Any, given: dict[str, Any], name: str) -> type[Config] | None:
    """Return the Config class of a nested field: declared directly, or by the `kind` of a plug-in; None for a value.

    Raises:
        ConfigError: there is no plug-in of the given kind.
    """
    default = field.get_default(call_default_factory=True)
    if isinstance(default, PluginConfig) and "kind" in given:
        return plugin_base(type(default)).of_kind(given["kind"], f"{name}.kind")
    return type(default) if isinstance(default, Config) else None


def _named_sections(field: Any) -> type[Config] | None:
    """Return the Config class of a field that holds sections with user-defined names; None for any other field."""
    arguments = typing.get_args(field.annotation)
    if typing.get_origin(field.annotation) is dict and isinstance(arguments[1], type):
        return arguments[1] if issubclass(arguments[1], Config) else None
    return None
