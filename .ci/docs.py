"""Hooks of MkDocs: pages that are generated, so that they cannot differ from the code.

configuration.md from the fields of the configuration classes, log.md and changelog.md from the repository's root, and
the picture of the pipeline. No network.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for name, content in generated().items():
        files.append(File.generated(config, name, content=content))
    return files


def generated() -> dict[str, str]:
    """Return the generated files by name."""
    return {
        "configuration.md": configuration(),
        "log.md": (ROOT / "LOG.md").read_text("utf-8"),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text("utf-8"),
        "pictures/pipeline.svg": pipeline_picture(),
    }


def configuration() -> str:
    """Return the reference of all configuration keys."""
    from tiger.cli import _toml
    from tiger.core.config import describe, shipped_plugins
    from tiger.data.sources.base import DatasetConfig
    from tiger.models.base import ModelConfig
    from tiger.run import RunConfig
    from tiger.tokenizers.base import TokenizerConfig
    from tiger.tuning import TuningConfig

    lines = [
        "# Configuration reference",
        "",
        "Generated from the code. A configuration is a TOML file with these sections; on the command line a key is "
        "written `section.key=value`. Unknown keys are rejected with a suggestion.",
    ]
    section = None
    for key, *rest in describe(RunConfig):
        head = key.partition(".")[0] if "." in key else "top level"
        if head != section:
            lines += ["", f"## {head}", "", *_HEAD]
            section = head
        lines.append(_row(key, *rest, _toml))
    for prefix, plugin in (("data", DatasetConfig), ("tokenizer", TokenizerConfig), ("model", ModelConfig)):
        for name in shipped_plugins(plugin.plugin_package):
            if name != plugin.default_kind:
                lines += ["", f'## {prefix}.kind = "{name}"', "", *_HEAD]
                lines += [_row(f"{prefix}.{key}", *rest, _toml) for key, *rest in describe(plugin.of_kind(name))]
    lines += [
        "",
        "## NAME.tune.toml",
        "",
        "Keys of a search; on the command line they begin with `tuning.`.",
        "",
        *_HEAD,
    ]
    lines += [_row(key, *rest, _toml) for key, *rest in describe(TuningConfig)]
    return "\n".join(lines) + "\n"


_HEAD = ["| key | type | default | meaning |", "|---|---|---|---|"]


def _row(key: str, kind: str, value: Any, meaning: str, toml: Any) -> str:
    escaped = meaning.replace("|", "\\|").replace("<", "&lt;")  # in code they would be shown escaped
    return f"| `{key}` | `{kind}` | `{toml(value)}` | {escaped} |"


def pipeline_picture() -> str:
    """Draw the path from raw files to recommendations."""
    from tiger.report.figures import COLORS, INK, MUTED, picture, standalone

    with picture("From raw files to recommendations", width=9, height=1.9) as drawn:
        (axes,) = drawn.axes
        for column, (what, example, how) in enumerate(_stages()):
            axes.text(column, 0.75, what, ha="center", va="center", fontsize=9, fontweight="bold",
                      bbox={"boxstyle": "round,pad=0.4", "facecolor": "none", "edgecolor": COLORS[0]})  # fmt: skip
            axes.text(column, 0.5, example, ha="center", va="top", fontsize=9, color=INK)
            axes.text(column, -0.1, how, ha="center", va="center", fontsize=9, color=MUTED)
            if column:
                axes.annotate("", (column - 0.43, 0.75), (column - 0.57, 0.75),
                              arrowprops={"arrowstyle": "->", "color": MUTED})  # fmt: skip
        axes.set(xlim=(-0.55, len(list(_stages())) - 0.45), ylim=(-0.2, 1.1), xticks=[], yticks=[])
        axes.grid(visible=False)
        for side in axes.spines.values():
            side.set_visible(False)
    return standalone(drawn.svg)


def _stages() -> Iterator[tuple[str, str, str]]:
    yield "raw files", "items,\ninteractions", "files, S3, GCS"
    yield "catalog", "one text per\nitem, histories\nin time order", "streamed readers"
    yield "vectors", "text, and\nwhat is bought\ntogether", "Ray Data"
    yield "semantic IDs", "(17, 203, 5)\ncoarse to fine,\nunique", "RQ-VAE"
    yield "model", "history →\nnext ID,\ncode by code", "Ray Train"
    yield "lists", "beam search\nthat ends on\nreal items", "Ray Data, Serve"
    yield "report", "metrics,\nintervals,\nhealth", "one HTML page"
