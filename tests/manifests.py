"""Read YAML files as they are, and with their options taken."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml


def with_options(text: str) -> str:
    """Return a YAML file with its options taken: indented lines with # and no space, or more than one, after it."""
    return re.sub(r"(?m)^( +)#(?=\S|  )", r"\1", text)


def variants(path: Path) -> list[Any]:
    """Return a YAML file as it is, and with its options taken."""
    return [yaml.safe_load(path.read_text()), yaml.safe_load(with_options(path.read_text()))]
