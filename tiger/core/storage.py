"""Files on any file system that pyarrow supports: a local or mounted disk, `s3://`, `gs://`, ...

Writes are atomic and durable. A storage error is a `StorageError`: one line with the path, the reason, and how to fix
it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from tiger.core.errors import ArtifactError, ConfigError
from tiger.core.hashing import sha256
from tiger.core.local_files import PARTIAL, create
from tiger.core.storage_errors import MissingError, StorageError, explain, in_one_line

if TYPE_CHECKING:
    from torch import Tensor  # takes seconds to import, and most stages hold none

log = logging.getLogger(__name__)

__all__ = ["MANIFEST", "PARTIAL", "SCRATCH", "Folder", "MissingError", "StorageError", "explain", "in_one_line"]

MANIFEST = "manifest.json"
SCRATCH = "scratch"  # a stage's own restart state; removed when the artifact is published
_READ_AT_ONCE = 256 << 20  # bytes of a table that are read once, to be verified and parsed
_REQUEST_ATTEMPTS = 10  # per request to S3
_REQUEST_TIME = timedelta(seconds=60)  # per request to Google Cloud Storage, including retries


class Folder:
    """A folder on any file system that pyarrow supports: a local path, `s3://`, `gs://`, ...

    Files of a folder with recorded checksums (`expecting`) are compared with them when they are first read.
    """

    def __init__(self, uri: str) -> None:
        """Connect to the file system of a folder, which need not exist yet.

        Args:
            uri: a local path (made absolute, because Ray workers have other working directories) or a file system URI.

        Raises:
            ConfigError: the URI has a query, or pyarrow cannot open it.
        """
        self._expected: dict[str, str] = {}  # sha256 of the files that are not verified yet
        if "://" in uri:
            if "?" in uri:  # no path could be joined to it, and a query may contain secrets, which end up in logs
                raise ConfigError(
                    f"{uri.partition('?')[0]}?...: a folder's URI has no query; set the region with AWS_REGION "
                    "and the server with AWS_ENDPOINT_URL (http://host:port)"
                )
            try:
                self.filesystem, self.path = _connect(uri)
            except (OSError, ValueError, pa.ArrowException) as error:  # no such scheme, no bucket, no credentials
                raise ConfigError(f"{uri} cannot be opened: {explain(error, True)}") from error
            if not self.path.strip("/") and not self.is_local:
                raise ConfigError(f"{uri} cannot be opened: it does not name a bucket")
            self.uri = uri.rstrip("/")
        else:
            self.filesystem, self.path = pafs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
            self.uri = self.path

    @property
    def is_local(self) -> bool:
        """Whether this is a local or mounted disk."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the URI and checksums: the receiving process connects with its own credentials, and none is sent."""
        return _unpickled, (self.uri, dict(self._expected))

    def __copy__(self) -> Folder:
        other = object.__new__(type(self))
        other.__dict__ |= vars(self)
        return other

    def child(self, name: str) -> Folder:
        """Return the folder `name` inside this one, which need not exist."""
        child = copy.copy(self)  # reuses the connection, which costs one or two requests to an object store
        child.uri, child.path = f"{self.uri}/{name}", self.join(name)
        below = f"{name}/"
        child._expected = {
            file.removeprefix(below): sha256 for file, sha256 in self._expected.items() if file.startswith(below)
        }
        return child

    @property
    def parent(self) -> Folder:
        """The folder that contains this one."""
        parent = copy.copy(self)
        parent.uri, parent.path = self.uri.rpartition("/")[0], self.path.rpartition("/")[0]
        parent._expected = {}
        return parent

    def join(self, name: str) -> str:
        """Return the path of `name` inside this folder, as pyarrow's file system takes it."""
        return f"{self.path}/{name}"

    def exists(self, name: str) -> bool:
        """Return whether `name` is a file in this folder."""
        with in_one_line(f"{self.uri}/{name}"):
            is_file: bool = self.filesystem.get_file_info(self.join(name)).type == pafs.FileType.File
            return is_file

    def files(self) -> dict[str, int]:
        """Return {relative name: bytes} of all files below, sorted, without manifest, scratch and temporary files."""
        names = {
            info.path[len(self.path) + 1 :]: info.size for info in self.entries() if info.type == pafs.FileType.File
        }
        return {
            name: size
            for name, size in sorted(names.items())
            if name != MANIFEST and not name.startswith(f"{SCRATCH}/") and not name.endswith(PARTIAL)
        }

    def entries(self, recursive: bool = True) -> Any:
        """Return pyarrow's `FileInfo` of every file and folder below, or directly in it; none if it does not exist."""
        flat = not recursive and isinstance(self.filesystem, pafs.GcsFileSystem)
        with in_one_line(self.uri):
            selector = pafs.FileSelector(self.path, recursive=recursive or flat, allow_not_found=True)
            found = self.filesystem.get_file_info(selector)
        if not flat:
            return found
        # Without `recursive`, pyarrow's GcsFileSystem omits folders that exist only as prefixes of names, as ours do.
        direct: dict[str, Any] = {}
        for info in found:
            name, _, below = info.path[len(self.path) + 1 :].partition("/")
            direct[name] = pafs.FileInfo(self.join(name), pafs.FileType.Directory) if below else info
        return list(direct.values())

    def read_bytes(self, name: str) -> bytes:
        """Read a file.

        Raises:
            ArtifactError: it is not what was recorded, see `expecting`.
            StorageError: the file does not exist, or cannot be read.
        """
        path = self.join(name)
        with in_one_line(f"{self.uri}/{name}"), self.filesystem.open_input_stream(path, compression=None) as stream:
            content: bytes = stream.read()
        if name in self._expected:
            self._require(name, sha256(content), self._expected[name])
        return content

    def write_bytes(self, name: str, data: bytes | list[bytes | memoryview]) -> None:
        """Write a file atomically and durably; on a local disk with a temporary file, fsync and rename.

        Args:
            name: the file.
            data: its content, or pieces of it, which are not joined in memory.

        Raises:
            StorageError: the disk is full, or the write fails.
        """
        path, pieces = self.join(name), data if isinstance(data, list) else [data]
        with in_one_line(f"{self.uri}/{name}"):
            if self.is_local:
                with create(path, size=sum(map(len, pieces))) as file:
                    for piece in pieces:
                        file.write(piece)
                return
            for may_retry in (True, False):
                try:
                    with self._open_output(path) as stream:
                        for piece in pieces:
                            stream.write(piece)
                    return
                except OSError as error:  # a store that was restarted may have lost a multipart upload
                    if not may_retry:
                        raise
                    log.warning("%s/%s: retrying a failed write: %s", self.uri, name, error)

    def _open_output(self, path: str) -> Any:
        """Open a file for writing, uncompressed: by default, pyarrow compresses files whose name ends with `.gz`."""
        try:
            return self.filesystem.open_output_stream(path, compression=None)
        except FileNotFoundError:  # some filesystems have real folders
            if isinstance(self.filesystem, pafs.GcsFileSystem):
                raise  # the bucket does not exist, and is not created
            self.filesystem.create_dir(path.rpartition("/")[0])
            return self.filesystem.open_output_stream(path, compression=None)

    @contextlib.contextmanager
    def create(self, name: str, durable: bool = True) -> Iterator[Any]:
        """Yield a binary stream whose content becomes the file `name` at the end of the block; without retries.

        Args:
            name: the file.
            durable: on a local disk, fsync; not needed for files that are made again after a power cut.

        Raises:
            StorageError: the disk is full, or a write fails.
        """
        opened = create(self.join(name), durable) if self.is_local else self._open_output(self.join(name))
        with in_one_line(f"{self.uri}/{name}"), opened as stream:
            yield stream

    def copy_from(self, other: Folder, name: str) -> None:
        """Copy a file of another folder on the same file system; on an object store the copy is server-side."""
        path = self.join(name)
        with in_one_line(f"{other.uri}/{name}"):
            try:
                self.filesystem.copy_file(other.join(name), path)
            except FileNotFoundError:  # some filesystems have real folders
                if isinstance(self.filesystem, pafs.GcsFileSystem):
                    raise
                self.filesystem.create_dir(path.rpartition("/")[0])
                self.filesystem.copy_file(other.join(name), path)

    def append_bytes(self, name: str, data: bytes) -> None:
        """Append to a file on a local disk; object stores cannot append."""
        with in_one_line(f"{self.uri}/{name}"):
            os.makedirs(self.path, exist_ok=True)
            with open(self.join(name), "ab") as file:
                file.write(data)

    def read_json(self, name: str) -> Any:
        """Read a JSON file."""
        return json.loads(self.read_bytes(name))

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as JSON; see `write_bytes`.

        Raises:
            ValueError: a number is not finite.
            StorageError: the disk is full, or the write fails.
        """
        self.write_bytes(name, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Read one Parquet file, or all shards of a folder in the order of their numbers.

        Args:
            name: the file or folder.
            columns: columns to read; None: all.

        Raises:
            ArtifactError: not a Parquet file, a folder without any, or not what was recorded, see `expecting`.
            StorageError: the file does not exist, or cannot be read.
        """
        with in_one_line(f"{self.uri}/{name}"):
            kind = self.filesystem.get_file_info(self.join(name)).type
        if kind == pafs.FileType.Directory:
            parts = [part for part in self.files() if part.startswith(f"{name}/") and part.endswith(".parquet")]
            if not parts:
                raise ArtifactError(f"{self.uri}/{name} contains no Parquet file")
            parts.sort(key=lambda part: (len(part), part))  # part-100000 comes after part-99999
            return pa.concat_tables([self.read_table(part, columns) for part in parts])
        held = self._verified_bytes(name)
        try:
            if held is not None:
                return pq.read_table(pa.BufferReader(held), columns=columns)
            return pq.read_table(self.join(name), columns=columns, filesystem=self.filesystem)
        except OSError as failure:  # a storage error
            with in_one_line(f"{self.uri}/{name}"):
                raise failure from None
            raise AssertionError("unreachable") from None
        except Exception as error:  # a malformed file; Ray's Arrow extension types raise errors of any kind
            raise ArtifactError(f"{self.uri}/{name} is not a table: {str(error).partition(chr(10))[0]}") from None

    def open_input(self, name: str) -> pa.NativeFile:
        """Open a file for random access.

        Raises:
            ArtifactError: it is not what was recorded, see `expecting`.
            StorageError: the file does not exist, or cannot be read.
        """
        if name in self._expected:
            self.verify(name, self._expected[name])
        with in_one_line(f"{self.uri}/{name}"):
            return self.filesystem.open_input_file(self.join(name))

    def write_table(self, name: str, table: pa.Table, row_group_size: int | None = None) -> None:
        """Write a Parquet file, compressed with zstd; see `write_bytes`."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=row_group_size)
        self.write_bytes(name, sink.getvalue())

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """Read named tensors, on the CPU.

        Raises:
            ArtifactError: the file is not a safetensors file. No other format is accepted: unpickling runs code.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors: dict[str, Tensor] = load(self.read_bytes(name))
        except SafetensorError as error:
            raise ArtifactError(f"{self.uri}/{name} is not a safetensors file: {error}") from None
        return tensors

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write named tensors as safetensors; see `write_bytes`."""
        from tiger.core.tensors import safetensors_pieces

        self.write_bytes(name, safetensors_pieces(tensors))

    def delete(self, name: str = "") -> None:
        """Remove the folder `name` inside this one (or this folder) if it exists."""
        path = self.join(name) if name else self.path
        with in_one_line(f"{self.uri}/{name}" if name else self.uri):
            if self.filesystem.get_file_info(path).type != pafs.FileType.Directory:
                return
            try:
                self.filesystem.delete_dir(path)
            except FileNotFoundError:  # GcsFileSystem also deletes a marker object for the folder, which we never write
                if self.filesystem.get_file_info(path).type == pafs.FileType.Directory:
                    raise

    def delete_file(self, name: str) -> None:
        """Remove a file if it exists."""
        with contextlib.suppress(MissingError), in_one_line(f"{self.uri}/{name}"):
            self.filesystem.delete_file(self.join(name))

    def delete_partials(self) -> None:
        """Remove the temporary files of killed writers."""
        for info in self.entries():
            if info.path.endswith(PARTIAL):
                with in_one_line(info.path):
                    self.filesystem.delete_file(info.path)

    def digest(self, name: str) -> str:
        """Return the sha256 of a file in hexadecimal, computed in chunks."""
        path = self.join(name)
        with in_one_line(f"{self.uri}/{name}"), self.filesystem.open_input_stream(path, compression=None) as stream:
            return sha256(iter(lambda: stream.read(1 << 22), b""))

    def expecting(self, sha256: Mapping[str, str]) -> Folder:
        """Return this folder with recorded checksums: each file is compared with its own once, when it is first read.

        Args:
            sha256: checksums in hexadecimal by file name.
        """
        folder = copy.copy(self)
        folder._expected = dict(sha256)
        return folder

    def verify(self, name: str, sha256: str) -> None:
        """Compare a file with its recorded checksum, in chunks.

        Raises:
            ArtifactError: it was altered.
            StorageError: the file does not exist, or cannot be read.
        """
        self._require(name, self.digest(name), sha256)

    def _require(self, name: str, found: str, recorded: str) -> None:
        if found != recorded:
            raise ArtifactError(f"{self.uri}: {name} was altered; delete the folder and run the stage again")
        self._expected.pop(name, None)

    def _verified_bytes(self, name: str) -> bytes | None:
        """Verify a file that has not been verified yet; return its content unless it is large."""
        if name not in self._expected:
            return None
        with in_one_line(f"{self.uri}/{name}"):
            size = self.filesystem.get_file_info(self.join(name)).size or 0
        if size <= _READ_AT_ONCE:
            return self.read_bytes(name)
        self.verify(name, self._expected[name])
        return None


def _unpickled(uri: str, expected: dict[str, str]) -> Folder:
    return Folder(uri).expecting(expected)


def _connect(uri: str) -> tuple[pafs.FileSystem, str]:
    filesystem, path = pafs.FileSystem.from_uri(uri)
    if isinstance(filesystem, pafs.S3FileSystem) and "@" not in uri:
        # The default of three attempts (about 1 s) is too short for a store that restarts. The delays double, up to
        # 20 s.
        retries = pafs.AwsStandardS3RetryStrategy(max_attempts=_REQUEST_ATTEMPTS)
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        filesystem = pafs.S3FileSystem(
            region=filesystem.region,
            endpoint_override=endpoint,
            retry_strategy=retries,
            allow_delayed_open=True,  # small files in one request
        )
    if isinstance(filesystem, pafs.GcsFileSystem):
        # By default a request is retried silently for 15 minutes, even without credentials.
        server = os.environ.get("STORAGE_EMULATOR_HOST", "")  # the variable of Google's own libraries
        scheme, _, host = server.rpartition("://")
        filesystem = pafs.GcsFileSystem(
            anonymous="anonymous@" in uri or bool(server),
            scheme=(scheme or "http") if server else "https",
            endpoint_override=host or None,
            retry_time_limit=_REQUEST_TIME,
        )
    return filesystem, path
