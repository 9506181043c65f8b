"""Configuration: frozen models, TOML files, dotted overrides, fingerprints, plug-ins by name.

Each component declares its options in a `Config` subclass next to its code; `run.py` composes them.
Precedence, lowest to highest: the default in the class, the TOML file, `key=value` on the command line. If a source of
higher precedence changes the `kind` of a section, values of keys that only the former kind has are dropped.
"""

from __future__ import annotations

from tiger.core.config.base import Config, flat
from tiger.core.config.loading import MAX_LISTED, build, dump_toml, load
from tiger.core.config.options import describe
from tiger.core.config.overrides import overridden, with_override
from tiger.core.config.plugins import PluginConfig, load_plugin, shipped_plugins
from tiger.core.config.renamed import RENAMED
from tiger.core.hashing import fingerprint

__all__ = [
    "MAX_LISTED", "RENAMED", "Config", "PluginConfig", "build", "describe", "dump_toml", "fingerprint", "flat", "load",
    "load_plugin", "overridden", "shipped_plugins", "with_override",
]  # fmt: skip
