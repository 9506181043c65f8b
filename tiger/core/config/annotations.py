"""Types of configuration fields: which plain values they accept, and their names."""

from __future__ import annotations

import types
import typing
from typing import Any, Literal, Union


def scalar_types(annotation: Any) -> set[Any]:
    """Return the types of plain values that a field accepts; for a Literal, the types of its choices."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return {type(choice) for choice in typing.get_args(annotation)}
    if origin is typing.Annotated:
        return scalar_types(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return set().union(*map(scalar_types, typing.get_args(annotation)))
    return {annotation} if isinstance(annotation, type) else set()


def holds_text(annotation: Any) -> bool:
    """Return whether a field accepts text, and neither numbers nor bool."""
    found = scalar_types(annotation)
    return str in found and not found & {bool, int, float}


def as_text(value: Any, annotation: Any) -> Any:
    """Return a whole number as text if the field holds text, also in lists; any other value unchanged."""
    if isinstance(value, list) and typing.get_origin(annotation) is list:
        return [as_text(item, typing.get_args(annotation)[0]) for item in value]
    return str(value) if type(value) is int and holds_text(annotation) else value


def type_name(annotation: Any) -> str:
    """Return the type of a field as users write and read it: `int | none`, or the choices of a Literal."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return type_name(typing.get_args(annotation)[0])
    if origin is Literal:
        return " | ".join(repr(choice) for choice in typing.get_args(annotation))
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(part) for part in typing.get_args(annotation))
    if origin is not None:
        inner = ", ".join("..." if part is Ellipsis else type_name(part) for part in typing.get_args(annotation))
        return f"{type_name(origin)}[{inner}]"
    return "none" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
