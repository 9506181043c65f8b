"""Raw files at any location: a local path, a folder of shards, a glob, a URL, or a URI of an object store."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pyarrow import fs as pafs

from tiger.core.errors import ConfigError, DataError, TigerError
from tiger.core.storage import Folder, explain
from tiger.data.download import download

Role = Literal["items", "interactions"]
"""The two tables of a data set."""


@dataclass(frozen=True)
class Span:
    """A section of a file: bytes [begin, end) of a text file, which begins with a line, or row groups of Parquet.

    Attributes:
        begin, end: bytes, or row groups.
        number: number of its first line or row in the file, from 1.
    """

    begin: int
    end: int
    number: int


class RawFile:
    """One raw file, or a section of it; `str()` is its name in messages."""

    def __init__(self, filesystem: Any, path: str, label: str, key: str = "", span: Span | None = None) -> None:
        """Refer to a file, without opening it.

        Args:
            filesystem: a pyarrow file system.
            path: the file's path on `filesystem`.
            label: the file's name in messages.
            key: the configuration key that names the file, for messages.
            span: the section that readers read; None: the whole file.
        """
        self.filesystem, self.path, self.label, self.key, self.span = filesystem, path, label, key, span

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle no credentials: the receiving process connects with its own."""
        scheme, separator, _ = self.label.partition("://")
        where = f"{scheme}://{self.path}" if separator else self.path
        return _unpickled, (where, self.path, self.label, self.key, self.span)

    def section(self, span: Span) -> RawFile:
        """Return a section of this file."""
        return RawFile(self.filesystem, self.path, self.label, self.key, span)

    @property
    def whole(self) -> RawFile:
        """The file without its span."""
        return self if self.span is None else RawFile(self.filesystem, self.path, self.label, self.key)

    @property
    def first_number(self) -> int:
        """Number of the first line or row that is read, from 1."""
        return 1 if self.span is None else self.span.number

    @classmethod
    def local(cls, path: str | Path) -> RawFile:
        """Refer to a file on a local or mounted disk."""
        path = Path(path)
        return cls(pafs.LocalFileSystem(), str(path.absolute()), str(path))

    def __str__(self) -> str:
        return self.label

    def __repr__(self) -> str:
        return f"RawFile({self.label!r})"

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> str:
        """Path or URI of the folder."""
        scheme, separator, _ = self.label.partition("://")
        inner = self.path.rpartition("/")[0]
        return f"{scheme}://{inner}" if separator else inner

    def size(self) -> int:
        """Return the size in bytes; 0 if the file does not exist.

        Raises:
            DataError: the storage cannot be reached.
        """
        try:
            return self.filesystem.get_file_info(self.path).size or 0
        except OSError as error:
            raise self.unreadable(error) from None

    def open(self) -> BinaryIO:
        """Open the file as a seekable binary stream.

        Raises:
            DataError: it cannot be opened.
        """
        try:
            if isinstance(self.filesystem, pafs.LocalFileSystem):
                return Path(self.path).open("rb")
            return io.BufferedReader(self.filesystem.open_input_file(self.path), 1 << 20)
        except OSError as error:
            raise self.unreadable(error) from None

    def digest(self) -> str:
        """Return the sha256 of the content in hexadecimal, computed in chunks.

        Raises:
            DataError: the file cannot be read.
        """
        sha = hashlib.sha256()
        try:
            with self.open() as stream:
                while chunk := stream.read(1 << 22):
                    sha.update(chunk)
        except OSError as error:
            raise self.unreadable(error) from None
        return sha.hexdigest()

    def unreadable(self, error: OSError) -> DataError:
        """Return the error for a failed operation of the file system on this file: the reason and how to fix it."""
        correct = f"; or correct {self.key}" if self.key else ""
        return DataError(f"{self.label}: cannot be read: {explain(error, '://' in self.label)}{correct}")


def _unpickled(where: str, path: str, label: str, key: str, span: Span | None) -> RawFile:
    return RawFile(Folder(where).filesystem, path, label, key, span)


def raw_file(file: Path | RawFile) -> RawFile:
    """Return a local path as a `RawFile`, and a `RawFile` unchanged."""
    return file if isinstance(file, RawFile) else RawFile.local(file)


@dataclass(frozen=True)
class Files:
    """Raw files of a source, in reading order; each is a `RawFile`, or a `Path` for a local file.

    Attributes:
        items: files of the items.
        interactions: files of the interactions.
        partial: whether these are only some of the files, or sections of them.
    """

    items: list[Any]
    interactions: list[Any]
    partial: bool = False

    def roles(self) -> Iterator[tuple[Role, RawFile]]:
        """Yield (role, file) of every file, in reading order; their digests are part of the fingerprint."""
        for item_file in self.items:
            yield "items", raw_file(item_file)
        for file in self.interactions:
            yield "interactions", raw_file(file)


def expand(names: list[str], key: str) -> list[RawFile]:
    """Resolve paths, folders, globs, URLs and URIs to files, in the order of `names`.

    A folder or glob is replaced by its files in the order of their paths, recursively. Hidden files and those that
    begin with an underscore (`_SUCCESS`, `.part-0.crc`) are skipped, as in Spark, Hive and Ray Data.

    Args:
        names: paths, folders, globs, URLs or URIs.
        key: the configuration key for messages, such as `data.items`.

    Raises:
        DataError: a name matches no file.
    """
    found: list[RawFile] = []
    for name in names:
        if name.startswith(("http://", "https://")):
            found.append(RawFile.local(download(name)))
            continue
        with _naming(name, key):
            folder = Folder(name)
            found += _expand(folder.filesystem, folder.path.rstrip("/"), name, key)
    return found


def files_in(name: str, key: str) -> list[RawFile]:
    """Return the files directly in a folder, in the order of their names.

    Args:
        name: the folder: a local path or a URI.
        key: the configuration key for messages, such as `data.path`.

    Raises:
        DataError: it is not a folder, or cannot be read.
    """
    if name.startswith(("http://", "https://")):
        raise DataError(f"{name} is a URL, whose files cannot be listed; list them in data.items and data.interactions")
    with _naming(name, key):
        folder = Folder(name)
        path = folder.path.rstrip("/")
        kind = folder.filesystem.get_file_info(path).type
        if kind != pafs.FileType.Directory:
            problem = "does not exist" if kind == pafs.FileType.NotFound else "is a file, not a folder"
            raise DataError(f"{name} {problem}; correct {key}")
        found = folder.filesystem.get_file_info(pafs.FileSelector(path))
        paths = sorted(info.path for info in found if info.type == pafs.FileType.File)
    return [RawFile(folder.filesystem, each, _label(each, name), key) for each in paths]


@contextlib.contextmanager
def _naming(name: str, key: str) -> Iterator[None]:
    """Convert exceptions of pyarrow's file systems into a one-line `DataError` with the key to correct."""
    try:
        yield
    except ConfigError as error:  # of `Folder`
        raise DataError(f"{error}; correct {key}") from None
    except TigerError:
        raise
    except Exception as error:
        raise DataError(f"{name} cannot be opened: {explain(error, '://' in name)}; correct {key}") from None


def _label(path: str, name: str) -> str:
    """Return the name in messages of a file that `name` resolves to."""
    if "://" in name:
        return f"{name.partition('://')[0]}://{path}"
    return path if Path(name).is_absolute() or name.startswith("~") else _relative(path, name)


def _expand(filesystem: Any, path: str, name: str, key: str) -> list[RawFile]:
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.File:
        return [RawFile(filesystem, path, name, key)]
    if info.type == pafs.FileType.Directory:
        paths = _files_below(filesystem, path)
        what = f"{name} is a folder without files"
    elif re.search(r"[*?\[]", path):
        base = re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]
        paths = [each for each in _files_below(filesystem, base, hidden=True) if _matches(each, path)]
        what = f"no file matches {name}"
    else:
        what = f"{name} does not exist"
        if "://" not in name and Path(path).is_symlink():
            what = f"{name} is a symbolic link to {Path(path).readlink()}, which does not exist"
        raise DataError(f"{what}; correct {key}")
    if not paths:
        raise DataError(f"{what}; correct {key}")
    return [RawFile(filesystem, each, _label(each, name), key) for each in paths]


def _relative(path: str, name: str) -> str:
    here = f"{Path.cwd()}/"
    return path.removeprefix(here) if not name.startswith("..") else path


def _matches(path: str, pattern: str) -> bool:
    """Match component by component, so that `*` does not match a slash; `**` matches any number of folders.

    Wildcards do not match hidden components, see `_hidden`.
    """
    parts, patterns = path.split("/"), pattern.split("/")
    if "**" not in patterns:
        return len(parts) == len(patterns) and all(map(_part_matches, parts, patterns))
    at = patterns.index("**")
    tail = patterns[at + 1 :]
    end = len(parts) - len(tail)
    return (
        end >= at
        and all(map(_part_matches, parts[:at], patterns[:at]))
        and all(map(_part_matches, parts[end:], tail))
        and not _hidden("/".join(parts[at:end]))
    )


def _part_matches(part: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(part, pattern) and (part == pattern or part[:1] == pattern[:1] or not _hidden(part))


def _files_below(filesystem: Any, path: str, hidden: bool = False) -> list[str]:
    selector = pafs.FileSelector(path, recursive=True, allow_not_found=True)
    found = (info.path for info in filesystem.get_file_info(selector) if info.type == pafs.FileType.File)
    return sorted(each for each in found if hidden or not _hidden(each[len(path) :]))


def _hidden(below: str) -> bool:
    return any(part.startswith((".", "_")) for part in below.split("/") if part)
