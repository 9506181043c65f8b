"""What a stage leaves behind: a folder `<kind>-<fingerprint>` whose `manifest.json` is written last.

The manifest is the commit point, because object stores have no atomic rename: a folder without one does not exist to
a reader. It records what the stage was given (configuration, fingerprints of its inputs), what it found (rows, health)
and the size and sha256 of every file, so that a truncated or altered artifact is refused by name.
Tables are Parquet, weights are safetensors, everything else is JSON; nothing is ever unpickled.

Two runs of one stage never write to each other's files:

- On a local or mounted disk a run holds a lock (`flock`) from before its first file until after the manifest. A second
  run gets a `ResourceError` meanwhile. The lock ends with its process, and the next run continues with the files that
  it finds. The disk must have locks that all its machines see, as NFS 4 has.
- An object store has no lock. There each run writes below a private prefix, `<kind>-<fingerprint>/attempt-<id>/`, and
  the common manifest, next to the attempts, names the one that counts. The order of requests makes that safe without
  any clock, if the store shows at once what was written, as S3 and Google's do: a run (1) writes the manifest into its
  own attempt, (2) looks for the common manifest, (3) writes it only if there was none. A run that has written it
  removes other attempts only if they have no manifest of their own. So an attempt that is removed while its run still
  works finds the common manifest at step 2 and is never named. If two runs pass step 2 at the same time, the later
  common manifest replaces the earlier one, and both attempts stay: whichever a reader has read, it names a complete
  attempt, and `verify` passes.
- A run that finds a killed attempt copies its files and continues with the copies. It only ever reads there. Whether
  an attempt was killed is judged by a heartbeat; a wrong judgment costs work that is done twice, not correctness.
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
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

import tiger
from tiger.config import Config, fingerprint
from tiger.errors import ArtifactError, ConfigError, ResourceError, SecurityError

if TYPE_CHECKING:
    from torch import Tensor  # takes seconds to import, and most stages hold none

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SCHEMA_VERSION = 3  # part of every fingerprint
PARTIAL = ".partial"  # files being written, or left by a killed writer: they do not exist to readers
SCRATCH = "scratch"  # a stage's own restart state; removed when the artifact is published
_ATTEMPT = "attempt-"  # a run's private prefix on an object store
_ALIVE, _BEGUN = f"{SCRATCH}/alive.json", f"{SCRATCH}/begun.json"
_BEAT_SECONDS, _SILENT_SECONDS = 10.0, 60.0  # between an attempt's signs of life; without one it counts as killed
_SETTLE_SECONDS = 2.0  # longer than a live run takes from looking for the common manifest to having written it
_COPIES = 16  # requests in flight while a killed attempt is copied
_REQUEST_ATTEMPTS = 10  # at a request to S3
_RECORDED_PACKAGES = ("torch", "ray", "sentence-transformers", "pyarrow", "numpy")


class Folder:
    """A folder on any filesystem that pyarrow knows: a local path, `s3://`, `gs://`, ..."""

    def __init__(self, uri: str) -> None:
        """
        Args:
            uri: a local path (made absolute, because Ray's workers have other working folders) or a filesystem URI.

        Raises:
            ConfigError: the URI has a query.
        """
        if "://" in uri:
            if "?" in uri:  # nothing could be joined to it, and a query may hold secrets, which end up in logs
                raise ConfigError(
                    f"{uri.partition('?')[0]}?...: a folder is named without a query; set the region with AWS_REGION "
                    "and the server with AWS_ENDPOINT_URL (http://host:port)"
                )
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
                with self._open_output(path) as stream:
                    stream.write(data)
                return
            except OSError as error:  # a store that was restarted may have forgotten an upload of several parts
                if not again:
                    raise
                log.warning("%s/%s is written once more: %s", self.uri, name, error)

    def _open_output(self, path: str) -> Any:
        try:
            return self.filesystem.open_output_stream(path)
        except FileNotFoundError:  # some filesystems have real folders
            self.filesystem.create_dir(path.rpartition("/")[0])
            return self.filesystem.open_output_stream(path)

    def copy_from(self, other: Folder, name: str) -> None:
        """Copy a file of another folder on the same filesystem; an object store does that without sending it here."""
        path = self.join(name)
        try:
            self.filesystem.copy_file(other.join(name), path)
        except FileNotFoundError:  # some filesystems have real folders
            self.filesystem.create_dir(path.rpartition("/")[0])
            self.filesystem.copy_file(other.join(name), path)

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
        """Reads one Parquet file, or all files of a folder in the order of their names.

        Raises:
            ArtifactError: not a Parquet file, or a folder without any.
        """
        if self.filesystem.get_file_info(self.join(name)).type == pafs.FileType.Directory:
            parts = [part for part in self.files() if part.startswith(f"{name}/") and part.endswith(".parquet")]
            if not parts:
                raise ArtifactError(f"{self.uri}/{name} holds no Parquet file")
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
    if isinstance(filesystem, pafs.S3FileSystem) and "@" not in uri:
        # By default it gives up after three attempts, about a second: a store that restarts takes longer. The waits
        # double, up to 20 s.
        patient = pafs.AwsStandardS3RetryStrategy(max_attempts=_REQUEST_ATTEMPTS)
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

    @property
    def home(self) -> Folder:
        """The folder `<kind>-<fingerprint>`; on an object store `folder` is the attempt in it that is read."""
        attempt = self.manifest.get("attempt")
        return self.folder.parent if attempt and self.folder.uri.endswith(f"/{attempt}") else self.folder

    @cached_property
    def inputs(self) -> dict[str, Artifact]:
        """The artifacts that this one was made from, by kind; they are sibling folders.

        Of those that it was made from by content (see `build`), which may be older than what is used today, only those
        that are still there.
        """
        root = self.home.parent
        found = {
            kind: open_artifact(root.child(f"{kind}-{given}"), expected_kind=kind)
            for kind, given in self.manifest["inputs"].items()
        }
        for kind, given in self.manifest.get("read_from", {}).items():
            with contextlib.suppress(ArtifactError):  # it is not needed
                found[kind] = open_artifact(root.child(f"{kind}-{given}"), expected_kind=kind)
        return found

    def lineage(self) -> Iterator[Artifact]:
        """This artifact and all that it was made from, inputs before what they went into, each once.

        What was read by content only is left out if another artifact of its kind is an input in the full sense.
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
        _require_no_others(self.folder, found, self.manifest["files"])


@dataclass
class Draft:
    """An artifact being made: `folder` to write into; `figures` and `health` to fill for the manifest."""

    folder: Folder
    fingerprint: str
    figures: dict[str, Any] = field(default_factory=dict)
    health: list[dict[str, Any]] = field(default_factory=list)


def stage_fingerprint(
    kind: str, config: Config, inputs: Mapping[str, Artifact], source: Mapping[str, str] | None = None
) -> str:
    """Return the identity of a stage's outcome: its name, its configuration, its inputs and `source`, not the root."""
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
    """Opens the artifact of this configuration and these inputs, or has `make` fill it and publishes it.

    The fingerprint covers what `stage_fingerprint` is given. See the top of this file for two runs at once.

    Args:
        make: fills the draft. It may find files of an earlier attempt that was killed.
        source: {role: sha256} of what the stage reads that is not a whole artifact: raw files, a file of an artifact, a
            model's weights. Roles do not name files, so that a renamed file is the same source.
        read_from: artifacts of which the stage reads only what `source` covers: recorded, and verified before they are
            read, but not part of the fingerprint.
        record: further entries of the manifest, for people; not part of the fingerprint.

    Raises:
        ArtifactError: a finished artifact of the same fingerprint has a file missing or of another size.
        ResourceError: another run is making the same artifact, on a local disk.
        TigerError: whatever `make` raises; nothing is published then.
    """
    own = stage_fingerprint(kind, config, inputs, source)
    home = Folder(root).child(f"{kind}-{own}")
    if home.exists(MANIFEST):
        log.info("%s: already there, skipped (%s)", kind, home.uri)
        _tidy(home)
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
    (_publish_locally if home.is_local else _publish_to_store)(home, manifest, make)
    return open_artifact(home, expected_kind=kind)


def _fill(folder: Folder, given: dict[str, Any], make: Callable[[Draft], None]) -> dict[str, Any]:
    """Have a draft filled; return its manifest, which is not written yet."""
    begin = time.monotonic()
    log.info("%s: started (%s)", given["kind"], folder.uri)
    draft = Draft(folder, given["fingerprint"])
    make(draft)
    folder.delete_partials()
    manifest = given | {
        "figures": draft.figures,
        "health": draft.health,
        "files": {name: {"bytes": size, "sha256": folder.digest(name)} for name, size in folder.files().items()},
        "versions": {"tiger": tiger.__version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _RECORDED_PACKAGES},
        "seconds": round(time.monotonic() - begin, 1),
    }
    return manifest | {"digest": _digest(manifest)}


# --- local disks: a lock ------------------------------------------------------------------------------------------


def _publish_locally(home: Folder, given: dict[str, Any], make: Callable[[Draft], None]) -> None:
    with _claimed(home):
        if not home.exists(MANIFEST):  # else another run has just made it
            manifest = _fill(home, given, make)
            home.write_json(MANIFEST, manifest)
            log.info("%s: finished in %.1f s", given["kind"], manifest["seconds"])
        _delete_scratch(home)  # with the claim's file, which nobody needs once the manifest is there


@contextlib.contextmanager
def _claimed(home: Folder) -> Iterator[None]:
    """Keep other runs from making the same artifact; a claim ends with its process, however that ends.

    The file of the claim is only removed when the manifest is there. So a run that gets a claim looks for the manifest
    once more, and if there is none, its claim is the only one.

    Raises:
        ResourceError: another run is making it, or the disk has no locks.
    """
    with _open_claim(home) as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(
                f"another run is making {home.uri}; wait until it has ended, then the same command uses what it left"
            ) from None
        except OSError as error:
            raise ResourceError(
                f"{home.uri}: this file system cannot lock files ({error.strerror}), so two runs could write to one "
                "folder; set root to another disk, or to an object store (s3://, gs://)"
            ) from None
        yield


def _open_claim(home: Folder) -> Any:
    for _ in range(100):
        os.makedirs(home.join(SCRATCH), exist_ok=True)
        try:
            return open(home.join(f"{SCRATCH}/claim"), "ab")
        except FileNotFoundError:  # another run has just published, and removed the folder
            continue
    raise ResourceError(f"{home.uri}/{SCRATCH} disappears as often as it is made; look at what runs there")


def _discard(own: Folder) -> None:
    try:
        own.delete()
    except OSError as error:  # there is an artifact, and this is not a part of it
        log.warning("%s could not be removed: %s", own.uri, error)


def _delete_scratch(folder: Folder) -> None:
    try:
        folder.delete(SCRATCH)
    except OSError as error:  # two runs remove it at once; readers pass over it, and the next run tidies up
        log.info("%s/%s could not be removed: %s", folder.uri, SCRATCH, error)


def _tidy(home: Folder) -> None:
    """Remove what a run has left that was killed right after it published."""
    if not home.is_local:
        with contextlib.suppress(OSError):
            _sweep(home)
    elif os.path.isdir(home.join(SCRATCH)):
        with contextlib.suppress(ResourceError, OSError), _claimed(home):
            _delete_scratch(home)


# --- object stores: private prefixes ------------------------------------------------------------------------------


def _publish_to_store(home: Folder, given: dict[str, Any], make: Callable[[Draft], None]) -> None:
    """Fill an attempt and name it in the common manifest, unless another run was faster; see the top of this file."""
    own = home.child(f"{_ATTEMPT}{uuid.uuid4().hex[:12]}")
    name = own.uri.rpartition("/")[2]
    with _beating(own):
        _continue(home, own, given["kind"])
        if home.exists(MANIFEST):  # another run has published while this one watched and copied
            _discard(own)
            return
        try:
            manifest = _fill(own, given | {"attempt": name}, make)
        except Exception as error:
            if own.exists(_BEGUN) or not home.exists(MANIFEST):
                raise
            log.warning("%s: another run has published and removed this attempt (%s)", given["kind"], error)
            _discard(own)
            return
        own.write_json(MANIFEST, manifest)
        named = not home.exists(MANIFEST)
        if named:
            home.write_json(MANIFEST, manifest)
            if any(attempt.beats for attempt in _attempts(home, but=name)):
                time.sleep(_SETTLE_SECONDS)  # so that both runs go on with the same attempt
    winner = home.read_json(MANIFEST).get("attempt")
    if winner == name:
        log.info("%s: finished in %.1f s", given["kind"], manifest["seconds"])
    else:
        log.warning("%s: another run has published it too, and its artifact is used (%s)", given["kind"], home.uri)
    if not named:
        _discard(own)  # nobody can have read it
        return
    _delete_scratch(own)
    with contextlib.suppress(OSError):  # it is published; what could not be removed now is removed later
        _sweep(home)


@contextlib.contextmanager
def _beating(own: Folder) -> Iterator[None]:
    """Show that the attempt is alive, until the run ends in any way but a kill."""
    done = threading.Event()

    def beat() -> None:
        own.write_json(_ALIVE, {"host": platform.node(), "process": os.getpid(), "time": time.time()})

    def keep_beating() -> None:
        while not done.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the run itself reports a store that is away
                beat()

    beat()
    thread = threading.Thread(target=keep_beating, name="heartbeat of an attempt", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(_SILENT_SECONDS)
        with contextlib.suppress(OSError):
            own.filesystem.delete_file(own.join(_ALIVE))


@dataclass(frozen=True)
class _Attempt:
    """An attempt as a listing shows it: {relative name: seconds since 1970 when it was written}."""

    name: str
    files: dict[str, float]

    @property
    def beats(self) -> bool:
        """Whether it has shown a sign of life within `_SILENT_SECONDS`."""
        return _ALIVE in self.files and time.time() - self.files[_ALIVE] < _SILENT_SECONDS


def _attempts(home: Folder, but: str = "") -> list[_Attempt]:
    """List all attempts except for `but`."""
    found: dict[str, dict[str, float]] = {}
    for info in home.filesystem.get_file_info(pafs.FileSelector(home.path, recursive=True, allow_not_found=True)):
        name, _, file = info.path[len(home.path) + 1 :].partition("/")
        if info.type == pafs.FileType.File and name.startswith(_ATTEMPT) and name != but:
            found.setdefault(name, {})[file] = (info.mtime_ns or 0) / 1e9
    return [_Attempt(name, files) for name, files in sorted(found.items())]


def _continue(home: Folder, own: Folder, kind: str) -> None:
    """Copy the files of the newest attempt that was killed, so that the stage continues where that stopped.

    An attempt that seems alive is watched first, because one that was killed a moment ago looks alive, too.
    """
    others = _attempts(home, but=own.uri.rpartition("/")[2])
    living = _watch(home, [attempt for attempt in others if attempt.beats], kind)
    if living:
        log.warning("%s: another run is making it, too; the one that ends first is used (%s)", kind, home.uri)
    killed = [attempt for attempt in others if _BEGUN in attempt.files and attempt.name not in living]
    if killed:
        last = max(killed, key=lambda attempt: attempt.files[_BEGUN])
        names = [name for name in last.files if name not in (MANIFEST, _ALIVE, _BEGUN) and not name.endswith(PARTIAL)]
        try:
            with ThreadPoolExecutor(_COPIES) as pool:
                list(pool.map(lambda name: own.copy_from(home.child(last.name), name), names))
            log.info("%s: continuing with %d files of an attempt that was ended", kind, len(names))
        except OSError as error:  # another run has published meanwhile, and removes what it does not need
            log.warning("%s: an attempt that was ended cannot be continued (%s)", kind, error)
            own.delete()
    own.write_json(_BEGUN, {"time": time.time()})


def _watch(home: Folder, suspects: list[_Attempt], kind: str) -> set[str]:
    """Return the names of the attempts that show another sign of life; wait for it until they count as killed."""
    before = {attempt.name: attempt.files[_ALIVE] for attempt in suspects}
    deadline = time.monotonic() + _SILENT_SECONDS
    if before:
        log.info("%s: watching whether a run that began it is alive, for up to %.0f s", kind, _SILENT_SECONDS)
    living: set[str] = set()
    while before and not living and time.monotonic() < deadline:
        time.sleep(min(1.0, _BEAT_SECONDS))
        now = home.filesystem.get_file_info([home.join(f"{name}/{_ALIVE}") for name in before])
        for name, info in zip(list(before), now, strict=True):
            if info.type != pafs.FileType.File:  # it has ended by itself
                del before[name]
            elif (info.mtime_ns or 0) / 1e9 != before[name]:
                living.add(name)
    return set(before) if living else set()  # the others had no time to show one


def _sweep(home: Folder) -> None:
    """Remove attempts that were killed, once the common manifest is there; those with a manifest of their own stay."""
    named = home.read_json(MANIFEST).get("attempt")
    for attempt in _attempts(home):
        if attempt.beats:
            continue
        if attempt.name == named:
            if any(name.startswith(f"{SCRATCH}/") for name in attempt.files):
                _delete_scratch(home.child(attempt.name))
        elif MANIFEST not in attempt.files:
            log.info("%s/%s, which was not finished, is removed", home.uri, attempt.name)
            home.child(attempt.name).delete()


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
        beside = [*manifest["inputs"].items(), *manifest.get("read_from", {}).items()]
        strange = [f"{key}-{given}" for key, given in beside if not _is_name(key, given)]
        attempt = manifest.get("attempt")
        recorded = {name: int(file["bytes"]) for name, file in files.items()}
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
    if strange:
        raise SecurityError(f"{folder.uri}/{MANIFEST} names {strange[0]!r} as an input, which is no artifact beside it")
    if attempt is not None:
        if not re.fullmatch(rf"{_ATTEMPT}[0-9a-f]{{12}}", str(attempt)):
            raise SecurityError(f"{folder.uri}/{MANIFEST} names {attempt!r} as its attempt, which is not one")
        if folder.uri.rpartition("/")[2] != attempt:
            folder = folder.child(attempt)
    found = folder.files()
    for name, size in recorded.items():
        if found.get(name) != size:
            raise ArtifactError(
                f"{folder.uri}: {name} has {found.get(name, 'no')} bytes, recorded were {size}; "
                "delete the folder and run the stage again"
            )
    _require_no_others(folder, found, recorded)
    return Artifact(folder, manifest)


def _require_no_others(folder: Folder, found: Mapping[str, int], recorded: Mapping[str, Any]) -> None:
    if extra := sorted(found.keys() - recorded.keys()):
        raise ArtifactError(f"{folder.uri}: {extra[0]} is not part of the artifact; remove it")


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
