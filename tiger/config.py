"""Configuration: frozen models, TOML files, dotted overrides, fingerprints, plug-ins by name.

Every component keeps its knobs in a `Config` subclass beside the code that they turn; `run.py` composes them.
A value comes from, in rising order: the default in the class, the TOML file, `key=value` on the command line.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union

from pydantic import BaseModel, ConfigDict, ValidationError

from tiger.errors import ConfigError

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of every configuration: immutable, and unknown keys are refused.

    Fields named in `unfingerprinted` change where or how fast a stage runs, not what it leaves behind.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    unfingerprinted: ClassVar[frozenset[str]] = frozenset()

    def identity(self) -> dict[str, Any]:
        """The part of this configuration that decides a stage's outcome, as plain JSON values."""
        identity = {}
        for name in type(self).model_fields:
            if name not in self.unfingerprinted:
                value = getattr(self, name)
                identity[name] = value.identity() if isinstance(value, Config) else _plain(value)
        return identity


class PluginConfig(Config):
    """Base of the configuration of a component that is found by its module's name, in `plugin_package`."""

    plugin_package: ClassVar[str]
    default_kind: ClassVar[str]

    kind: str

    @classmethod
    def resolve(cls, value: Any) -> Any:
        """Turns a table with a `kind` into the `Config` of the plug-in of that name; anything else passes."""
        if not isinstance(value, dict):
            return value
        module = load_plugin(cls.plugin_package, value.get("kind", cls.default_kind))
        if not issubclass(getattr(module, "Config", object), cls):
            raise ConfigError(
                f"kind = {value['kind']!r}: the module {module.__name__} has no Config for a {cls.__name__}"
            )
        return module.Config.model_validate(value)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def fingerprint(*parts: Any) -> str:
    """First 8 hexadecimal digits of the sha256 over the canonical JSON of `parts`."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def load_plugin(package: str, kind: str) -> types.ModuleType:
    """The module behind `kind`: `"rqvae"` is `<package>.rqvae`, a dotted name is imported as it stands.

    Raises:
        ConfigError: no such module; names the kinds that the package ships.
    """
    name = kind if "." in kind else f"{package}.{kind}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise  # the plug-in exists; something that it imports does not
        raise ConfigError(
            f"kind = {kind!r}: there is no module {name}; shipped: {', '.join(shipped_plugins(package))}; "
            "a dotted name is imported from any installed package"
        ) from None


def shipped_plugins(package: str) -> list[str]:
    """Names of the modules in `package`, sorted."""
    folder = Path(next(iter(importlib.import_module(package).__path__)))
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def load(model: type[C], name: str | None, overrides: list[str], search: Path) -> C:
    """Builds `model` from a TOML file and overrides.

    Args:
        name: a file's path, or the name of a file `<search>/<name>.toml`; None for the class's defaults alone.
        overrides: `dotted.key=value` strings; a value is read as TOML and, where it is none, taken as text.
        search: the folder of the shipped configurations.

    Raises:
        ConfigError: no such file, invalid TOML, an unknown key (with the nearest valid one), an impossible value.
    """
    values: dict[str, Any] = {} if name is None else _read_toml(_find(name, search))
    for override in overrides:
        _apply(values, override)
    return build(model, values)


def build(model: type[C], values: dict[str, Any]) -> C:
    """Validates `values` as `model`; one `ConfigError` lists everything that is wrong with them."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(model, values, detail) for detail in error.errors())) from None


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
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: an override is written dotted.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, leaf = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{override!r}: {parent} is a value, not a section")
        values = child
    values[leaf] = value


def _explain(model: type[Config], values: dict[str, Any], detail: Any) -> str:
    location = ".".join(str(part) for part in detail["loc"]) or "configuration"
    if detail["type"] == "extra_forbidden":
        keys = [key for key, *_ in describe(model, values)]
        return f"unknown key {location}{_nearest(location, keys)}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] in ("value_error", "missing"):
        return f"{location}: {message}"
    return f"{location} = {detail['input']!r}: {message}"


def _nearest(name: str, candidates: typing.Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def dump_toml(values: dict[str, Any]) -> str:
    """Nested tables of plain values as TOML; None, which TOML does not have, is left out."""
    lines: list[str] = []

    def table(prefix: str, inner: dict[str, Any]) -> None:
        plain = {key: value for key, value in inner.items() if value is not None and not isinstance(value, dict)}
        if plain and prefix:
            lines.append(f"\n[{prefix}]")
        lines.extend(f"{key} = {json.dumps(value)}" for key, value in plain.items())
        for key, value in inner.items():
            if isinstance(value, dict):
                table(f"{prefix}.{key}" if prefix else key, value)

    table("", values)
    return "\n".join(lines).strip() + "\n"


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested tables as {dotted key: value}."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        name: item for key, child in value.items() for name, item in flat(child, f"{prefix}.{key}".strip(".")).items()
    }


def with_override(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of nested tables in which the dotted `key` has `value`."""
    head, dot, rest = key.partition(".")
    if not dot:
        return {**values, key: value}
    return {**values, head: with_override(values.get(head) or {}, rest, value)}


def describe(model: type[Config], values: dict[str, Any] | None = None) -> Iterator[tuple[str, str, Any, str]]:
    """Yields (dotted key, type, default, meaning) of every knob, in the order of the classes.

    Args:
        values: what was given, so that a plug-in section shows the knobs of the kind chosen there.
    """
    for name, field in model.model_fields.items():
        given = (values or {}).get(name)
        section = _section(field, given if isinstance(given, dict) else {})
        if section is None:
            default = field.get_default(call_default_factory=True)
            yield name, _type_name(field.annotation), default, field.description or ""
        else:
            for key, kind, default, meaning in describe(section, given if isinstance(given, dict) else None):
                yield f"{name}.{key}", kind, default, meaning


def _section(field: Any, given: dict[str, Any]) -> type[Config] | None:
    """The Config class behind a nested field: declared directly, or by the `kind` of a plug-in."""
    default = field.get_default(call_default_factory=True)
    if isinstance(default, Config):
        package = getattr(type(default), "plugin_package", None)
        kind = given.get("kind")
        return load_plugin(package, kind).Config if package and isinstance(kind, str) else type(default)
    return None


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if origin is Literal:
        return " | ".join(repr(choice) for choice in typing.get_args(annotation))
    if origin in (Union, types.UnionType):
        return " | ".join(_type_name(part) for part in typing.get_args(annotation))
    if origin is not None:
        inner = ", ".join("..." if part is Ellipsis else _type_name(part) for part in typing.get_args(annotation))
        return f"{_type_name(origin)}[{inner}]"
    return "none" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
