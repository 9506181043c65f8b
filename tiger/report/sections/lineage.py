"""Configuration and lineage: which artifact was made from what, with which versions."""

from __future__ import annotations

from html import escape

from tiger.core.artifacts import Artifact
from tiger.core.config import dump_toml
from tiger.report.finished import FinishedRun
from tiger.report.markup import Html, details, stage_name, table

TITLE = "Configuration and lineage"


def render(run: FinishedRun) -> Html:
    """Return every artifact with its inputs, its configuration, the raw files, and the versions."""
    rows = [
        (artifact.home.uri.rpartition("/")[2], ", ".join(_inputs(artifact)) or "raw files", _size(artifact))
        for artifact in run.stages
    ]
    raw = run.catalog.artifact.manifest.get("raw_files", [])
    files = [(file["role"], file["name"], file["bytes"], file["sha256"][:16]) for file in raw]
    versions = sorted({(name, version) for part in run.stages for name, version in part.manifest["versions"].items()})
    configs = "".join(
        details(
            f"configuration: {stage_name(artifact.kind)}",
            f"<pre>{escape(dump_toml(artifact.manifest['config']))}</pre>",
        )
        for artifact in run.stages
    )
    return Html(
        table(["artifact", "made from", "bytes"], rows)
        + configs
        + details("raw files", table(["role", "file", "bytes", "sha256"], files))
        + details("versions", table(["package", "version"], versions))
    )


def _inputs(artifact: Artifact) -> list[str]:
    given = {**artifact.manifest["inputs"], **artifact.manifest.get("read_from", {})}
    return [f"{kind}-{fingerprint}" for kind, fingerprint in given.items()]


def _size(artifact: Artifact) -> int:
    return sum(int(file["bytes"]) for file in artifact.manifest["files"].values())
