"""Configuration: frozen models, TOML files, dotted overrides, fingerprints, plug-ins by name.

Each component declares its options in a `Config` subclass next to its code; `run.py` composes them.
Precedence, lowest to highest: the default in the class, the TOML file, `key=value` on the command line. If a source of
higher precedence changes the `kind` of a section, values of keys that only the former kind has are dropped.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from tiger.core.errors import ConfigError

C = TypeVar("C", bound="Config")

MAX_LISTED = 10  # names, or errors, in one message

RENAMED = {
    "data.max_bad_rows": "data.max_bad_row_fraction",
    "catalog.max_unknown_items": "catalog.max_unknown_item_fraction",
    "catalog.repeats": "catalog.duplicates",
    "catalog.ties": "catalog.tie_break",
    "catalog.valid_share": "catalog.valid_fraction",
    "catalog.test_share": "catalog.test_fraction",
    "embedding.vectors": "embedding.import_path",
    "embedding.prompt": "embedding.prefix",
    "embedding.storage": "embedding.storage_dtype",
    "tokenizer.levels": "tokenizer.num_levels",
    "tokenizer.hidden": "tokenizer.hidden_dims",
    "tokenizer.latent": "tokenizer.latent_dim",
    "tokenizer.commitment": "tokenizer.commitment_weight",
    "tokenizer.linear_path": "tokenizer.linear_skip",
    "tokenizer.gradient": "tokenizer.gradient_estimator",
    "tokenizer.reconstruction": "tokenizer.reconstruction_reduction",
    "tokenizer.reset_dead": "tokenizer.reset_dead_codes",
    "tokenizer.refresh_every": "tokenizer.codebook_update_every",
    "tokenizer.refresh_until": "tokenizer.codebook_update_until",
    "tokenizer.balance_last_level": "tokenizer.sinkhorn_last_level",
    "tokenizer.streamed": "tokenizer.streaming",
    "tokenizer.passes": "tokenizer.passes_per_level",
    "tokenizer.rotations": "tokenizer.num_iterations",
    "tokenizer.training.clip_norm": "tokenizer.training.max_grad_norm",
    "tokenizer.training.validate_every": "tokenizer.training.validate_every_epochs",
    "semantic_ids.collisions": "semantic_ids.collision_policy",
    "semantic_ids.capacity": "semantic_ids.items_per_id",
    "model.heads": "model.num_heads",
    "model.layers": "model.num_layers",
    "model.mode": "model.encoder",
    "model.item_tokens": "model.encoder_input",
    "model.max_items": "model.max_history_items",
    "model.user_tokens": "model.num_user_tokens",
    "model.validation_users": "model.training.validation_users",
    "model.validation_beam": "model.training.validation_beam",
    "model.training.clip_norm": "model.training.max_grad_norm",
    "model.training.validate_every": "model.training.validate_every_epochs",
    "evaluation.exact_users": "evaluation.num_exact_users",
    "recommend.allowed": "recommend.allowed_items_file",
    "evaluation.beam": "decoding.beam",
    "recommend.k": "decoding.k",
    "recommend.beam": "decoding.beam",
    "recommend.exclude_history": "decoding.exclude_seen",
    "recommend.temperature": "decoding.temperature",
    "recommend.per_first_code": "decoding.max_per_first_code",
    "recommend.max_per_first_code": "decoding.max_per_first_code",
    "recommend.seed": "decoding.seed",
    "serve.beam": "decoding.beam",
    "sasrec": "model",
    "search": "tuning",
    "tuning.trials": "tuning.num_trials",
    "tuning.looks": "tuning.num_evaluations",
    "tuning.grace": "tuning.grace_period",
    "tuning.reduction": "tuning.reduction_factor",
    "tuning.concurrent": "tuning.max_concurrent_trials",
}
"""Keys of earlier versions, so that an old configuration is told the new name."""


class Config(BaseModel):
    """Base of every configuration: immutable, and unknown keys are rejected.

    Fields named in `unfingerprinted` affect resources, speed or limits of a stage, not its output.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    unfingerprinted: ClassVar[frozenset[str]] = frozenset()

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_as_text(cls, value: Any, info: ValidationInfo) -> Any:
        """Accept whole numbers, also in lists, for fields that hold text: `version = 2014`."""
        field = cls.model_fields.get(info.field_name or "")
        return value if field is None else _as_text(value, field.annotation)

    def identity(self) -> dict[str, Any]:
        """Return the part of this configuration that determines a stage's output, as plain JSON values."""
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


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def fingerprint(*parts: Any) -> str:
    """Return the first 8 hexadecimal digits of the sha256 over the canonical JSON of `parts`."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


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
        raise ConfigError(f"{key} = {_shown(kind)} is not the name of a module; {shipped}")
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


def load(model: type[C], name: str | None, overrides: list[str], search: Path, prefix: str = "") -> C:
    """Build `model` from a TOML file and overrides.

    Args:
        model: the configuration class.
        name: a file's path, or the name of a file `<search>/<name>.toml`; None for the class's defaults alone.
        overrides: `dotted.key=value` strings; values are parsed as TOML, falling back to a string. For keys that hold
            text, a number or a date is kept as typed.
        search: the folder of the built-in configurations.
        prefix: put before every key in messages.

    Raises:
        ConfigError: no such file, invalid TOML, an unknown key (with a suggestion), or an invalid value.
    """
    values: dict[str, Any] = {} if name is None else _read_toml(_find(name, search))
    given = [_split(override) for override in overrides]
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
            _section(field, given, prefix + name)  # reports an unknown kind with its section
    try:
        return model.model_validate(values)
    except ValidationError as error:
        details = error.errors()
        reasons = dict.fromkeys(_explain(model, values, detail, prefix) for detail in details[:MAX_LISTED])
        more = [f"and {len(details) - MAX_LISTED} more"] if len(details) > MAX_LISTED else []
        raise ConfigError("; ".join([*reasons, *more])) from None


def overridden(
    model: type[Config], values: dict[str, Any], changes: dict[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """Return a copy of nested tables in which dotted keys have other values.

    The kinds of plug-ins are changed first, whatever the order. A changed kind drops the keys of its section that only
    the former kind has, and those whose type differs between the two; keys that all kinds share keep their values.

    Args:
        model: the configuration class.
        values: nested tables of plain values.
        changes: dotted keys with their values; `_Typed` text is parsed according to the type of the key.
        prefix: put before every key in messages.

    Raises:
        ConfigError: a kind does not exist, or a key leads through a value that is not a section.
    """
    kinds = {key: value for key, value in changes.items() if key.endswith(".kind")}
    for key, value in (kinds | changes).items():
        section, _, leaf = key.rpartition(".")
        if leaf == "kind" and section in model.model_fields:
            values = values | {section: _of_other_kind(model, section, values.get(section), value, prefix)}
        if isinstance(value, _Typed):
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
    base = _plugin_base(type(default))
    kind = kind.read(str) if isinstance(kind, _Typed) else kind
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


def _plugin_base(config: type[PluginConfig]) -> type[PluginConfig]:
    """Return the class that declares the options that all plug-ins of a section share."""
    return next(base for base in reversed(config.__mro__) if "plugin_package" in vars(base))


class _Typed(str):
    """The value of an override, as it was typed."""

    def read(self, annotation: Any) -> Any:
        """Parse the value as TOML; return it unchanged if it is not TOML, or a number or date for a text key."""
        try:
            value = tomllib.loads(f"value = {self}")
        except (ValueError, RecursionError):  # also of integers of thousands of digits, and deep nesting
            return str(self)
        if set(value) != {"value"} or (_holds_text(annotation) and not isinstance(value["value"], (str, list, dict))):
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
    section = _section(field, given, prefix + head)
    return None if section is None else _annotation(section, given, rest, f"{prefix}{head}.")


def _scalars(annotation: Any) -> set[Any]:
    """Return the types of plain values that a field accepts; for a Literal, the types of its choices."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return {type(choice) for choice in typing.get_args(annotation)}
    if origin is typing.Annotated:
        return _scalars(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return set().union(*map(_scalars, typing.get_args(annotation)))
    return {annotation} if isinstance(annotation, type) else set()


def _holds_text(annotation: Any) -> bool:
    found = _scalars(annotation)
    return str in found and not found & {bool, int, float}


def _as_text(value: Any, annotation: Any) -> Any:
    if isinstance(value, list) and typing.get_origin(annotation) is list:
        return [_as_text(item, typing.get_args(annotation)[0]) for item in value]
    return str(value) if type(value) is int and _holds_text(annotation) else value


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


def _split(override: str) -> tuple[str, _Typed]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: an override is written dotted.key=value")
    return key, _Typed(text)


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
    return f"{location or 'configuration'} = {_shown(detail['input'])}: {message}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _nearest(name: str, candidates: typing.Iterable[str], prefix: str = "") -> str:
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{found[0]}?" if found else ""


def dump_toml(values: dict[str, Any]) -> str:
    """Return nested tables of plain values as TOML, without values that are None, which TOML cannot express."""

    def without_none(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_none(inner) for key, inner in value.items() if inner is not None}
        return value

    return tomli_w.dumps(without_none(values))


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested tables as {dotted key: value}."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        name: item for key, child in value.items() for name, item in flat(child, f"{prefix}.{key}".strip(".")).items()
    }


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


def describe(model: type[Config], values: dict[str, Any] | None = None) -> Iterator[tuple[str, str, Any, str]]:
    """Yield (dotted key, type, default, description) of every option, in declaration order.

    Args:
        model: the configuration class.
        values: given values, so that a plug-in section lists the options of the kind chosen there.
    """
    for name, field in model.model_fields.items():
        given = (values or {}).get(name)
        section = _section(field, given if isinstance(given, dict) else {}, name)
        named = _named_sections(field)
        if named is not None:
            for key, kind, default, meaning in describe(named):
                yield f'{name}."KEY".{key}', kind, default, meaning
        elif section is None:
            default = field.get_default(call_default_factory=True)
            yield name, _type_name(field.annotation), default, field.description or ""
        else:
            for key, kind, default, meaning in describe(section, given if isinstance(given, dict) else None):
                yield f"{name}.{key}", kind, default, meaning


def _section(field: Any, given: dict[str, Any], name: str) -> type[Config] | None:
    """Return the Config class of a nested field: declared directly, or by the `kind` of a plug-in; None for a value.

    Raises:
        ConfigError: there is no plug-in of the given kind.
    """
    default = field.get_default(call_default_factory=True)
    if isinstance(default, PluginConfig) and "kind" in given:
        return _plugin_base(type(default)).of_kind(given["kind"], f"{name}.kind")
    return type(default) if isinstance(default, Config) else None


def _named_sections(field: Any) -> type[Config] | None:
    """Return the Config class of a field that holds sections with user-defined names; None for any other field."""
    arguments = typing.get_args(field.annotation)
    if typing.get_origin(field.annotation) is dict and isinstance(arguments[1], type):
        return arguments[1] if issubclass(arguments[1], Config) else None
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
