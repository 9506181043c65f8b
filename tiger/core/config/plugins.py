"""Plug-ins: components whose module is found by the `kind` of their section."""

from __future__ import annotations

import importlib
import re
import types
from pathlib import Path
from typing import Any, ClassVar

from tiger.core.config.base import Config
from tiger.core.errors import ConfigError


class PluginConfig(Config):
    """Base of the configuration of a component that is found by its module's name, in `plugin_package`."""

    plugin_package: ClassVar[str]
    default_kind: ClassVar[str]

    kind: str

    @classmethod
    def resolve(cls, value: Any) -> Any:
        """Validate a mapping with `kind` as that plug-in's `Config`; return any other value unchanged."""
        return (
            cls.of_kind(value.get("kind", cls.default_kind)).model_validate(value) if isinstance(value, dict) else value
        )

    @classmethod
    def of_kind(cls, kind: Any, key: str = "kind") -> type[PluginConfig]:
        """Return the `Config` class of a plug-in.

        Args:
            kind: name of the plug-in: a module of `plugin_package`, or a dotted module name.
            key: the dotted key that names the plug-in, for messages.

        Raises:
            ConfigError: there is no such module, or it has no `Config` for this section.
        """
        module = load_plugin(cls.plugin_package, kind, key)
        found = getattr(module, "Config", None)
        if not (isinstance(found, type) and issubclass(found, cls)):
            raise ConfigError(f"{key} = {kind!r}: the module {module.__name__} has no Config for a {cls.__name__}")
        return found


def plugin_base(config: type[PluginConfig]) -> type[PluginConfig]:
    """Return the class that declares the options that all plug-ins of a section share."""
    return next(base for base in reversed(config.__mro__) if "plugin_package" in vars(base))


def load_plugin(package: str, kind: Any, key: str = "kind") -> types.ModuleType:
    """Import a plug-in: `"rqvae"` is the module `<package>.rqvae`, a dotted name is imported unchanged.

    Args:
        package: dotted name of the package of the built-in plug-ins.
        kind: name of the plug-in.
        key: the dotted key that names the plug-in, for messages.

    Raises:
        ConfigError: no such module; lists the built-in kinds.
    """
    shipped = f"shipped: {', '.join(shipped_plugins(package))}; a dotted name is imported from any installed package"
    if not isinstance(kind, str) or not all(part.isidentifier() for part in kind.split(".")):
        raise ConfigError(f"{key} = {abbreviated(kind)} is not the name of a module; {shipped}")
    name = kind if "." in kind else f"{package}.{kind}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise  # the plug-in exists; something that it imports does not
        raise ConfigError(f"{key} = {kind!r}: there is no module {name}; {shipped}") from None


def shipped_plugins(package: str) -> list[str]:
    """Return the sorted names of the modules in `package` that define a `Config`, without importing them."""
    folder = Path(next(iter(importlib.import_module(package).__path__)))
    files = {path.stem: path for path in folder.glob("*.py")}
    files |= {path.parent.name: path for path in folder.glob("*/__init__.py")}
    return sorted(
        name for name, path in files.items() if re.search(r"(?m)^(class Config\(|Config = )", path.read_text())
    )


def abbreviated(value: Any) -> str:
    """Return the `repr` of a value for a message, at most 200 characters of it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
