"""What a stage leaves behind: a folder `<kind>-<fingerprint>` whose `manifest.json` is written last.

The manifest is the commit point, because object stores have no atomic rename: a folder without one does not exist to
a reader. It records what the stage was given (configuration, fingerprints of its inputs), what it found (rows, health)
and the size and sha256 of every file, so that a truncated or altered artifact is refused by name.
Tables are Parquet, weights are safetensors, everything else is JSON; nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

import tiger
from tiger.config import Config, fingerprint
from tiger.errors import ArtifactError, ResourceError, SecurityError

if TYPE_CHECKING:
    from torch import Tensor  # takes seconds to import, and most stages hold none

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SCHEMA_VERSION = 2
PARTIAL = ".partial"  # files being written, or left by a killed writer: they do not exist to readers
SCRATCH = "scratch"  # a stage's own restart state; removed when the artifact is published
_ATTEMPTS = 10  # at a request to S3
_RECORDED_PACKAGES = ("torch", "ray", "sentence-transformers", "pyarrow", "numpy")


class Folder:
    """A folder on any filesystem that pyarrow knows: a local path, `s3://`, `gs://`, ..."""

    def __init__(self, uri: str) -> None:
        """
        Args:
            uri: a local path (made absolute, because Ray's workers have other working folders) or a filesystem URI.
        """
        if "://" in uri:
            self.filesystem, self.path = _connect(uri)
            self.uri = uri.rstrip("/")
        else:
            self.filesystem, self.path = pafs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
            self.uri = self.path

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def child(self, name: str) -> Folder:
        child = copy.copy(self)  # with the connection, which an object store takes a request or two to make
        child.uri, child.path = f"{self.uri}/{name}", self.join(name)
        return child

    @property
    def parent(self) -> Folder:
        parent = copy.copy(self)
        parent.uri, parent.path = self.uri.rpartition("/")[0], self.path.rpartition("/")[0]
        return parent

    def join(self, name: str) -> str:
        return f"{self.path}/{name}"

    def exists(self, name: str) -> bool:
        return self.filesystem.get_file_info(self.join(name)).type == pafs.FileType.File

    def files(self) -> dict[str, int]:
        """{relative name: bytes} of all files below, the manifest and the scratch folder left out, sorted."""
        selector = pafs.FileSelector(self.path, recursive=True, allow_not_found=True)
        names = {
            info.path[len(self.path) + 1 :]: info.size
            for info in self.filesystem.get_file_info(selector)
            if info.type == pafs.FileType.File
        }
        return {
            name: size
            for name, size in sorted(names.items())
            if name != MANIFEST and not name.startswith(f"{SCRATCH}/") and not name.endswith(PARTIAL)
        }

    def read_bytes(self, name: str) -> bytes:
        with self.filesystem.open_input_stream(self.join(name)) as stream:
            return stream.read()

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes a file as a whole: a reader sees the old content or the new, nothing between, also after a power cut.

        An object store does that by itself.

        Raises:
            ResourceError: the disk is full.
        """
        path = self.join(name)
        if self.is_local:
            _write_local(path, data)
            return
        for again in (True, False):
            try:
                with self.filesystem.open_output_stream(path) as stream:
                    stream.write(data)
                return
            except OSError as error:  # a store that was restarted may have forgotten an upload of several parts
                if not again:
                    raise
                log.warning("%s/%s is written once more: %s", self.uri, name, error)

    def append_bytes(self, name: str, data: bytes) -> None:
        """Adds to a file on a local disk; object stores cannot."""
        os.makedirs(self.path, exist_ok=True)
        with open(self.join(name), "ab") as file:
            file.write(data)

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_bytes(name))

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Reads one Parquet file, or all files of a folder in the order of their names."""
        if self.filesystem.get_file_info(self.join(name)).type == pafs.FileType.Directory:
            parts = [part for part in self.files() if part.startswith(f"{name}/") and part.endswith(".parquet")]
            return pa.concat_tables([self.read_table(part, columns) for part in parts])
        try:
            return pq.read_table(self.join(name), columns=columns, filesystem=self.filesystem)
        except OSError:
            raise  # of the storage
        except Exception as error:  # of Arrow, or of the readers of Ray's extension types, which believe files
            raise ArtifactError(f"{self.uri}/{name} is no table: {str(error).partition(chr(10))[0]}") from None

    def write_table(self, name: str, table: pa.Table, row_group_size: int | None = None) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=row_group_size)
        self.write_bytes(name, sink.getvalue())

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """Reads named tensors, on the CPU.

        Raises:
            ArtifactError: the file is no safetensors file. No other format is ever tried: pickles run code.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load(self.read_bytes(name))
        except SafetensorError as error:
            raise ArtifactError(f"{self.uri}/{name} is no safetensors file: {error}") from None

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save

        self.write_bytes(name, save({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}))

    def delete(self, name: str = "") -> None:
        path = self.join(name) if name else self.path
        if self.filesystem.get_file_info(path).type == pafs.FileType.Directory:
            self.filesystem.delete_dir(path)

    def delete_partials(self) -> None:
        """Removes what killed writers have left."""
        selector = pafs.FileSelector(self.path, recursive=True, allow_not_found=True)
        for info in self.filesystem.get_file_info(selector):
            if info.path.endswith(PARTIAL):
                self.filesystem.delete_file(info.path)

    def digest(self, name: str) -> str:
        """sha256 of a file, read in pieces."""
        sha = hashlib.sha256()
        with self.filesystem.open_input_stream(self.join(name)) as stream:
            while chunk := stream.read(1 << 22):
                sha.update(chunk)
        return sha.hexdigest()


def _connect(uri: str) -> tuple[pafs.FileSystem, str]:
    filesystem, path = pafs.FileSystem.from_uri(uri)
    if isinstance(filesystem, pafs.S3FileSystem) and "?" not in uri and "@" not in uri:
        # By default it gives up after three attempts, about a second: a store that restarts takes longer. The waits
        # double, up to 20 s.
        patient = pafs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS)
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        filesystem = pafs.S3FileSystem(
            region=filesystem.region,
            endpoint_override=endpoint,
            retry_strategy=patient,
            allow_delayed_open=True,  # small files in one request
        )
    return filesystem, path


def _write_local(path: str, data: bytes) -> None:
    """The content is on the disk before the name is, and the name before this returns."""
    parent = os.path.dirname(path)
    partial = f"{path}.{os.getpid()}{PARTIAL}"
    try:
        os.makedirs(parent, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            os.unlink(partial)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"{path}: the disk is full, {len(data):,} bytes do not fit; free some, or set root to another disk"
            ) from None
        raise


@dataclass(frozen=True)
class Artifact:
    """A published artifact, open for reading."""

    folder: Folder
    manifest: dict[str, Any] = field(repr=False)

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def health(self) -> list[dict[str, Any]]:
        return self.manifest["health"]

    @property
    def figures(self) -> dict[str, Any]:
        return self.manifest["figures"]

    @cached_property
    def inputs(self) -> dict[str, Artifact]:
        """The artifacts that this one was made from, by kind; they stand beside it."""
        root = self.folder.parent
        return {
            kind: open_artifact(root.child(f"{kind}-{given}"), expected_kind=kind)
            for kind, given in self.manifest["inputs"].items()
        }

    def lineage(self) -> Iterator[Artifact]:
        """This artifact and all that it was made from, inputs before what they went into, each once."""
        seen: dict[str, Artifact] = {}

        def walk(artifact: Artifact) -> None:
            for parent in artifact.inputs.values():
                walk(parent)
            seen.setdefault(artifact.folder.uri, artifact)

        walk(self)
        yield from seen.values()

    def verify(self) -> None:
        """Compares every file with the manifest's sha256.

        Raises:
            ArtifactError: a file is missing, altered, or not of this artifact; names it.
        """
        found = self.folder.files()
        for name, expected in self.manifest["files"].items():
            if name not in found:
                raise ArtifactError(f"{self.folder.uri}: {name} is missing; delete the folder and run the stage again")
            if self.folder.digest(name) != expected["sha256"]:
                raise ArtifactError(f"{self.folder.uri}: {name} was altered; delete the folder and run the stage again")


@dataclass
class Draft:
    """An artifact being made: `folder` to write into; `figures` and `health` to fill for the manifest."""

    folder: Folder
    fingerprint: str
    figures: dict[str, Any] = field(default_factory=dict)
    health: list[dict[str, Any]] = field(default_factory=list)


def build(
    root: str,
    kind: str,
    config: Config,
    inputs: dict[str, Artifact],
    make: Callable[[Draft], None],
    *,
    source: dict[str, str] | None = None,
) -> Artifact:
    """Opens the artifact of this configuration and these inputs, or has `make` fill it and publishes it.

    The fingerprint covers the stage's name, its own configuration, its inputs and `source`, not the root.

    Args:
        make: fills the draft. It may find files of an earlier attempt that was killed.
        source: {name: sha256} of raw files, for a stage that reads from outside.

    Raises:
        ArtifactError: a finished artifact of the same fingerprint has a file missing or of another size.
        ResourceError: another run is making the same artifact.
        TigerError: whatever `make` raises; nothing is published then.
    """
    given = {name: artifact.fingerprint for name, artifact in inputs.items()}
    own = fingerprint(SCHEMA_VERSION, kind, config.identity(), given, source or {})
    folder = Folder(root).child(f"{kind}-{own}")
    if folder.exists(MANIFEST):
        log.info("%s: already there, skipped (%s)", kind, folder.uri)
        return open_artifact(folder, expected_kind=kind)
    for artifact in inputs.values():
        artifact.verify()
    with _claimed(folder):
        if not folder.exists(MANIFEST):  # else another run has just made it
            _make(Draft(folder, own), kind, config, given, source or {}, make)
    return open_artifact(folder, expected_kind=kind)


def _make(
    draft: Draft,
    kind: str,
    config: Config,
    given: dict[str, str],
    source: dict[str, str],
    make: Callable[[Draft], None],
) -> None:
    """Fills a draft and publishes it."""
    folder, begin = draft.folder, time.monotonic()
    log.info("%s: started (%s)", kind, folder.uri)
    make(draft)
    folder.delete(SCRATCH)
    folder.delete_partials()
    manifest = {
        "kind": kind,
        "fingerprint": draft.fingerprint,
        "schema_version": SCHEMA_VERSION,
        "config": config.model_dump(mode="json", serialize_as_any=True),
        "inputs": given,
        "source": source,
        "figures": draft.figures,
        "health": draft.health,
        "files": {name: {"bytes": size, "sha256": folder.digest(name)} for name, size in folder.files().items()},
        "versions": {"tiger": tiger.__version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _RECORDED_PACKAGES},
        "seconds": round(time.monotonic() - begin, 1),
    }
    manifest["digest"] = _digest(manifest)
    if folder.exists(MANIFEST):  # on an object store, where nothing can be claimed, another run was faster
        log.warning("%s: another run has published it first, and its artifact is used (%s)", kind, folder.uri)
        return
    folder.write_json(MANIFEST, manifest)
    log.info("%s: finished in %.1f s", kind, manifest["seconds"])


@contextlib.contextmanager
def _claimed(folder: Folder) -> Iterator[None]:
    """Keeps other runs from making the same artifact; a claim ends with its process, however that ends.

    Raises:
        ResourceError: another run is making it.
    """
    if not folder.is_local:
        yield
        return
    os.makedirs(folder.join(SCRATCH), exist_ok=True)
    with open(folder.join(f"{SCRATCH}/claim"), "ab") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(
                f"another run is making {folder.uri}; wait until it has ended, then the same command uses what it left"
            ) from None
        yield


def _digest(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest's own content, so that it cannot be altered unnoticed either."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


_MADE_BY = {
    "raw": "prepare",
    "catalog": "prepare",
    "embeddings": "embed",
    "tokenizer": "semantic_ids",
    "semantic_ids": "semantic_ids",
    "model": "train",
    "metrics": "evaluate",
    "recommendations": "recommend",
    "sasrec": "sasrec",
    "sweep": "tune",
}


def open_artifact(where: str | Folder, expected_kind: str | None = None) -> Artifact:
    """Opens a published artifact; refuses one that is incomplete.

    Raises:
        ArtifactError: no manifest (names the job that makes it), another schema, another kind, or a file that is
            missing or not of the recorded size. `Artifact.verify` compares contents, too.
        SecurityError: the manifest names inputs that are not artifacts beside it.
    """
    folder = where if isinstance(where, Folder) else Folder(where)
    if not folder.exists(MANIFEST):
        job = _MADE_BY.get(expected_kind or folder.uri.rpartition("/")[2].partition("-")[0], "pipeline")
        raise ArtifactError(f"{folder.uri} holds no finished artifact; `python -m jobs.{job}` makes it")
    try:
        manifest = folder.read_json(MANIFEST)
        version, kind, files = manifest["schema_version"], manifest["kind"], manifest["files"]
        strange = [f"{key}-{given}" for key, given in manifest["inputs"].items() if not _is_name(key, given)]
        recorded = {name: int(file["bytes"]) for name, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{folder.uri}/{MANIFEST} cannot be read ({error!r}); delete the folder") from None
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{folder.uri} was written by another version of this project (schema {version}, here {SCHEMA_VERSION})"
        )
    if expected_kind and kind != expected_kind:
        raise ArtifactError(f"{folder.uri} is a {kind} artifact where {expected_kind} is needed")
    if manifest.get("digest") != _digest(manifest):
        raise ArtifactError(f"{folder.uri}/{MANIFEST} was altered; delete the folder and run the stage again")
    if strange:
        raise SecurityError(f"{folder.uri}/{MANIFEST} names {strange[0]!r} as an input, which is no artifact beside it")
    found = folder.files()
    for name, size in recorded.items():
        if found.get(name) != size:
            raise ArtifactError(
                f"{folder.uri}: {name} has {found.get(name, 'no')} bytes, recorded were {size}; "
                "delete the folder and run the stage again"
            )
    if extra := sorted(found.keys() - recorded.keys()):
        raise ArtifactError(f"{folder.uri}: {extra[0]} is not part of the artifact; remove it")
    return Artifact(folder, manifest)


def _is_name(kind: str, given: str) -> bool:
    """Whether a manifest's input is a folder beside the artifact: it becomes part of a path."""
    return re.fullmatch(r"[a-z_]{1,32}-[0-9a-f]{8}", f"{kind}-{given}") is not None


def newest(root: str, kind: str | None = None) -> Artifact:
    """The artifact of this kind (of any, if None) under `root` that was published last.

    Raises:
        ArtifactError: there is none.
    """
    base = Folder(root)
    found = base.filesystem.get_file_info(pafs.FileSelector(base.path, allow_not_found=True))
    names = [info.base_name for info in found if kind is None or info.base_name.startswith(f"{kind}-")]
    manifests = base.filesystem.get_file_info([base.join(f"{name}/{MANIFEST}") for name in names])
    done = [(info.mtime_ns, name) for info, name in zip(manifests, names, strict=True) if info.mtime_ns]
    if not done:
        job = _MADE_BY.get(kind or "", "pipeline")
        raise ArtifactError(f"{root} holds no finished {kind or 'stage'}; `python -m jobs.{job}` makes one")
    return open_artifact(base.child(max(done)[1]))
