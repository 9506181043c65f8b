"""Stage outputs: a folder `<kind>-<fingerprint>` whose `manifest.json` is written last.

The manifest is the commit point, because object stores have no atomic rename: readers ignore a folder without one. It
records the stage's configuration, the fingerprints of its inputs, its metrics and health checks, and the size and
sha256 of every file, so that a truncated or altered artifact is rejected with the name of the file: by size when it is
opened, by sha256 when a file is first read through `Artifact.folder`, and as a whole by `Artifact.verify`.
Tables are Parquet, weights are safetensors, everything else is JSON; nothing is ever unpickled.
Two runs of one stage never write to each other's files: see `tiger.core.publishing`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVarTuple

import tiger
from tiger.core.config import Config, fingerprint
from tiger.core.errors import ArtifactError, SecurityError
from tiger.core.hashing import sha256
from tiger.core.memory import watch_memory
from tiger.core.publishing import ATTEMPT, publish, tidy
from tiger.core.storage import MANIFEST, PARTIAL, SCRATCH, Folder, in_one_line
from tiger.core.threads import in_threads
from tiger.core.versions import installed_versions

log = logging.getLogger(__name__)
Arguments = TypeVarTuple("Arguments")

__all__ = [  # Folder and its constants are in tiger.core.storage
    "MANIFEST",
    "PARTIAL",
    "SCRATCH",
    "Artifact",
    "Draft",
    "Folder",
    "Stage",
    "build",
    "newest",
    "open_artifact",
    "stage",
    "stage_fingerprint",
]

SCHEMA_VERSION = 6  # part of every fingerprint


@dataclass(frozen=True)
class Artifact:
    """A published artifact, open for reading."""

    folder: Folder
    manifest: dict[str, Any] = field(repr=False)

    @property
    def kind(self) -> str:
        """The kind of stage output, such as `catalog`."""
        kind: str = self.manifest["kind"]
        return kind

    @property
    def fingerprint(self) -> str:
        """8 hexadecimal digits that identify the configuration and inputs; see `stage_fingerprint`."""
        own: str = self.manifest["fingerprint"]
        return own

    @property
    def health(self) -> list[dict[str, Any]]:
        """The records of the stage's health checks."""
        health: list[dict[str, Any]] = self.manifest["health"]
        return health

    @property
    def metrics(self) -> dict[str, Any]:
        """The stage's metrics, by name."""
        metrics: dict[str, Any] = self.manifest["metrics"]
        return metrics

    @property
    def home(self) -> Folder:
        """The folder `<kind>-<fingerprint>`; on an object store, `folder` is the attempt inside it that is read."""
        attempt = self.manifest.get("attempt")
        return self.folder.parent if attempt and self.folder.uri.endswith(f"/{attempt}") else self.folder

    @cached_property
    def inputs(self) -> dict[str, Artifact]:
        """The artifacts that this one was made from, by kind; they are sibling folders.

        Artifacts of which only the content counts (`read_from` of `build`) are included only if they still exist.
        """
        root = self.home.parent
        found = {
            kind: open_artifact(root.child(f"{kind}-{given}"), expected_kind=kind)
            for kind, given in self.manifest["inputs"].items()
        }
        for kind, given in self.manifest.get("read_from", {}).items():
            with contextlib.suppress(ArtifactError):  # optional
                found[kind] = open_artifact(root.child(f"{kind}-{given}"), expected_kind=kind)
        return found

    def lineage(self) -> Iterator[Artifact]:
        """Yield this artifact and all its ancestors once each, in topological order (inputs first).

        An artifact that is only in `read_from` is left out if another artifact of its kind is a fingerprinted input.
        """
        seen: dict[str, Artifact] = {}
        certain: dict[str, str] = {}  # folder -> kind

        def walk(artifact: Artifact, is_certain: bool) -> None:
            by_content = artifact.manifest.get("read_from", {})
            for kind, parent in artifact.inputs.items():
                walk(parent, is_certain and kind not in by_content)
            seen.setdefault(artifact.folder.uri, artifact)
            if is_certain:
                certain[artifact.folder.uri] = artifact.kind

        walk(self, True)
        kinds = set(certain.values())
        yield from (artifact for uri, artifact in seen.items() if uri in certain or artifact.kind not in kinds)

    def verify(self) -> None:
        """Compare every file with the manifest's sha256.

        Raises:
            ArtifactError: a file is missing, altered, or not part of this artifact; names it.
        """
        found = self.folder.files()
        for name in self.manifest["files"]:
            if name not in found:
                raise ArtifactError(f"{self.folder.uri}: {name} is missing; delete the folder and run the stage again")
        recorded = self.manifest["files"].items()
        for _ in in_threads(lambda pair: self.folder.verify(pair[0], pair[1]["sha256"]), recorded):
            pass
        _require_no_others(self.folder, found, self.manifest["files"])


@dataclass
class Draft:
    """An artifact that is being written: files go to `folder`, metrics to `metrics`, health records to `health`."""

    folder: Folder
    fingerprint: str
    metrics: dict[str, Any] = field(default_factory=dict)
    health: list[dict[str, Any]] = field(default_factory=list)


def stage_fingerprint(
    kind: str, config: Config, inputs: Mapping[str, Artifact], source: Mapping[str, str] | None = None
) -> str:
    """Return the fingerprint of a stage's output: its kind, configuration, inputs and `source`, but not the root."""
    given = {name: artifact.fingerprint for name, artifact in inputs.items()}
    return fingerprint(SCHEMA_VERSION, kind, config.identity(), given, dict(source or {}))


def build(
    root: str,
    kind: str,
    config: Config,
    inputs: dict[str, Artifact],
    make: Callable[[Draft], None],
    *,
    source: dict[str, str] | None = None,
    read_from: dict[str, Artifact] | None = None,
    record: dict[str, Any] | None = None,
) -> Artifact:
    """Return the cached artifact for this configuration and these inputs, or run `make` and publish its output.

    Stages are built by `Stage.build`, which calls this. The fingerprint covers the arguments of `stage_fingerprint`.
    For concurrent runs see `tiger.core.publishing`.

    Args:
        root: folder or URI that contains all artifacts.
        kind: kind of the artifact.
        config: configuration of the stage.
        inputs: input artifacts by kind; verified before `make` runs.
        make: writes the artifact's files and fills the draft. It may find files of an earlier attempt that was killed.
        source: {role: sha256} of inputs that are not whole artifacts: raw files, a file of an artifact, a model's
            weights. Roles do not name files, so that a renamed file is the same source.
        read_from: artifacts of which the stage reads only what `source` covers: recorded, and verified before they are
            read, but not part of the fingerprint.
        record: further entries of the manifest, for information only; not part of the fingerprint.

    Raises:
        ArtifactError: a finished artifact of the same fingerprint has a file missing or of another size.
        ResourceError: another run is making the same artifact, on a local disk.
        TigerError: whatever `make` raises; nothing is published then.
    """
    own = stage_fingerprint(kind, config, inputs, source)
    home = Folder(root).child(f"{kind}-{own}")
    if home.exists(MANIFEST):
        log.info("%s: already finished, skipped (%s)", kind, home.uri)
        tidy(home)
        return open_artifact(home, expected_kind=kind)
    for artifact in [*inputs.values(), *(read_from or {}).values()]:
        artifact.verify()
    manifest = {
        "kind": kind,
        "fingerprint": own,
        "schema_version": SCHEMA_VERSION,
        "config": config.model_dump(mode="json", serialize_as_any=True),
        "inputs": {name: artifact.fingerprint for name, artifact in inputs.items()},
        "read_from": {name: artifact.fingerprint for name, artifact in (read_from or {}).items()},
        "source": source or {},
        **(record or {}),
    }
    publish(home, kind, lambda folder, attempt: _fill(folder, manifest, attempt, make))
    return open_artifact(home, expected_kind=kind)


def _fill(folder: Folder, given: dict[str, Any], attempt: str | None, make: Callable[[Draft], None]) -> dict[str, Any]:
    """Run `make` on a draft; return its manifest, which is not written yet."""
    if attempt:
        given = given | {"attempt": attempt}
    begin = time.monotonic()
    log.info("%s: started (%s)", given["kind"], folder.uri)
    draft = Draft(folder, given["fingerprint"])
    with watch_memory() as peak:
        make(draft)
    folder.delete_partials()
    sizes = folder.files()
    digests = in_threads(folder.digest, sizes)
    manifest = given | {
        "metrics": draft.metrics,
        "health": draft.health,
        "files": {name: {"bytes": sizes[name], "sha256": sha256} for name, sha256 in zip(sizes, digests, strict=True)},
        "versions": {"tiger": tiger.__version__} | installed_versions(),
        "seconds": round(time.monotonic() - begin, 1),
        "peak_memory_bytes": peak.bytes,
    }
    return manifest | {"digest": _digest(manifest)}


@dataclass(frozen=True)
class Stage(Generic[*Arguments]):
    """A stage of the pipeline; declared by `stage`.

    Attributes:
        kind: kind of the artifact.
        verb: the module of `tiger.pipeline` whose job makes it.
        body: the work: writes the files of the draft, and fills its metrics and health records.
    """

    kind: str
    verb: str
    body: Callable[[Draft, *Arguments], None]

    def build(
        self,
        root: str,
        config: Config,
        inputs: dict[str, Artifact],
        *arguments: *Arguments,
        source: dict[str, str] | None = None,
        read_from: dict[str, Artifact] | None = None,
        record: dict[str, Any] | None = None,
    ) -> Artifact:
        """Return the cached artifact, or run the body with `arguments`, which are not fingerprinted; see `build`."""

        def make(draft: Draft) -> None:
            self.body(draft, *arguments)

        return build(root, self.kind, config, inputs, make, source=source, read_from=read_from, record=record)


def stage(kind: str, *, verb: str) -> Callable[[Callable[[Draft, *Arguments], None]], Stage[*Arguments]]:
    """Declare the decorated function to be the work of a stage; see `Stage`."""
    return lambda body: Stage(kind, verb, body)


def _digest(manifest: dict[str, Any]) -> str:
    """Return the sha256 of a manifest's own content, to detect edits of the manifest."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return sha256(json.dumps(rest, sort_keys=True).encode())


_MADE_BY = {  # kind: verb, as the stages of tiger.pipeline declare them
    "catalog": "prepare",
    "embeddings": "embed",
    "item_vectors": "item_vectors",
    "tokenizer": "semantic_ids",
    "semantic_ids": "semantic_ids",
    "model": "train",
    "evaluation": "evaluate",
    "recommendations": "recommend",
    "report": "report",
    "tuning": "tune",
}


def open_artifact(where: str | Folder, expected_kind: str | None = None) -> Artifact:
    """Open a published artifact; reject one that is incomplete.

    Args:
        where: its folder.
        expected_kind: the kind that it must have; None: any.

    Raises:
        ArtifactError: no manifest (names the job that makes it), another schema, another kind, or a file that is
            missing or not of the recorded size. Contents are compared when a file is read, and by `Artifact.verify`.
        SecurityError: the manifest names inputs that are not sibling artifacts.
    """
    folder = where if isinstance(where, Folder) else Folder(where)
    if not folder.exists(MANIFEST):
        job = _MADE_BY.get(expected_kind or folder.uri.rpartition("/")[2].partition("-")[0], "pipeline")
        raise ArtifactError(f"{folder.uri} is not a finished artifact; create it with `python -m jobs.{job}`")
    try:
        manifest = folder.read_json(MANIFEST)
        version, kind, files = manifest["schema_version"], manifest["kind"], manifest["files"]
        siblings = [*manifest["inputs"].items(), *manifest.get("read_from", {}).items()]
        invalid = [f"{key}-{given}" for key, given in siblings if not _is_name(key, given)]
        attempt = manifest.get("attempt")
        recorded = {name: int(file["bytes"]) for name, file in files.items()}
        checksums = {name: str(file["sha256"]) for name, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{folder.uri}/{MANIFEST} cannot be read ({error!r}); delete the folder") from None
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{folder.uri} was written by another version of this project (schema {version}, here {SCHEMA_VERSION}); "
            "run its stage again"
        )
    if expected_kind and kind != expected_kind:
        raise ArtifactError(f"{folder.uri} is a {kind} artifact where {expected_kind} is needed")
    if manifest.get("digest") != _digest(manifest):
        raise ArtifactError(f"{folder.uri}/{MANIFEST} was altered; delete the folder and run the stage again")
    if invalid:
        raise SecurityError(f"{folder.uri}/{MANIFEST} references {invalid[0]!r}, which is not the name of an artifact")
    if attempt is not None:
        if not re.fullmatch(rf"{ATTEMPT}[0-9a-f]{{12}}", str(attempt)):
            raise SecurityError(f"{folder.uri}/{MANIFEST} references {attempt!r}, which is not the name of an attempt")
        if folder.uri.rpartition("/")[2] != attempt:
            folder = folder.child(attempt)
    found = folder.files()
    for name, size in recorded.items():
        if found.get(name) != size:
            raise ArtifactError(
                f"{folder.uri}: {name} has {found.get(name, 'no')} bytes, expected {size}; "
                "delete the folder and run the stage again"
            )
    _require_no_others(folder, found, recorded)
    return Artifact(folder.expecting(checksums), manifest)


def _require_no_others(folder: Folder, found: Mapping[str, int], recorded: Mapping[str, Any]) -> None:
    if extra := sorted(found.keys() - recorded.keys()):
        raise ArtifactError(f"{folder.uri}: {extra[0]} is not part of the artifact; remove it")


def _is_name(kind: str, given: str) -> bool:
    """Return whether a manifest's input is the name of a sibling folder: it becomes part of a path."""
    return re.fullmatch(r"[a-z_]{1,32}-[0-9a-f]{8}", f"{kind}-{given}") is not None


def newest(root: str, kind: str | None = None) -> Artifact:
    """Return the artifact of this kind (of any kind, if None) under `root` that was published last.

    Raises:
        ArtifactError: there is none.
    """
    base = Folder(root)
    found = base.entries(recursive=False)
    names = [info.base_name for info in found if kind is None or info.base_name.startswith(f"{kind}-")]
    with in_one_line(base.uri):
        manifests = base.filesystem.get_file_info([base.join(f"{name}/{MANIFEST}") for name in names])
    done = [(info.mtime_ns, name) for info, name in zip(manifests, names, strict=True) if info.mtime_ns]
    if not done:
        job = _MADE_BY.get(kind or "", "pipeline")
        raise ArtifactError(f"{root} contains no finished {kind or 'stage'}; create one with `python -m jobs.{job}`")
    return open_artifact(base.child(max(done)[1]))
