"""The base of every configuration: a frozen pydantic model."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from tiger.core.config.annotations import as_text


class Config(BaseModel):
    """Base of every configuration: immutable, and unknown keys are rejected.

    Fields named in `unfingerprinted` affect resources, speed or limits of a stage, not its output. A section that has
    only such fields is left out of fingerprints as a whole.
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
        return value if field is None else as_text(value, field.annotation)

    def identity(self) -> dict[str, Any]:
        """Return the part of this configuration that determines a stage's output, as plain JSON values."""
        identity = {}
        for name in type(self).model_fields:
            if name not in self.unfingerprinted:
                value = getattr(self, name)
                if not isinstance(value, Config):
                    identity[name] = _plain(value)
                elif own := value.identity():
                    identity[name] = own
        return identity


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested tables as {dotted key: value}."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        name: item for key, child in value.items() for name, item in flat(child, f"{prefix}.{key}".strip(".")).items()
    }
