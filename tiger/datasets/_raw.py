"""Raw files wherever they are: a local path, a folder of shards, a glob, a URL, or a URI of an object store."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pyarrow import fs as pafs

from tiger.artifacts import Folder
from tiger.download import download
from tiger.errors import DataError, TigerError


class RawFile:
    """One raw file: `open()` it, take its `digest()`, and name it in messages with `str()`."""

    def __init__(self, filesystem: Any, path: str, label: str) -> None:
        """
        Args:
            filesystem: of pyarrow.
            path: the file's path on `filesystem`.
            label: the file's name in messages.
        """
        self.filesystem, self.path, self.label = filesystem, path, label

    @classmethod
    def local(cls, path: str | Path) -> RawFile:
        path = Path(path)
        return cls(pafs.LocalFileSystem(), str(path.absolute()), str(path))

    def __str__(self) -> str:
        return self.label

    def __repr__(self) -> str:
        return f"RawFile({self.label!r})"

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> str:
        """Path or URI of the folder."""
        scheme, separator, _ = self.label.partition("://")
        inner = self.path.rpartition("/")[0]
        return f"{scheme}://{inner}" if separator else inner

    def size(self) -> int:
        try:
            return self.filesystem.get_file_info(self.path).size or 0
        except OSError as error:
            raise _unreadable(self.label, error) from None

    def open(self) -> BinaryIO:
        """Open the file for reading, seekable.

        Raises:
            DataError: it cannot be opened.
        """
        try:
            if isinstance(self.filesystem, pafs.LocalFileSystem):
                return Path(self.path).open("rb")
            return io.BufferedReader(self.filesystem.open_input_file(self.path), 1 << 20)
        except OSError as error:
            raise _unreadable(self.label, error) from None

    def digest(self) -> str:
        """Return the sha256 of the content, read in pieces.

        Raises:
            DataError: the file cannot be read.
        """
        sha = hashlib.sha256()
        try:
            with self.open() as stream:
                while chunk := stream.read(1 << 22):
                    sha.update(chunk)
        except OSError as error:
            raise _unreadable(self.label, error) from None
        return sha.hexdigest()


def _unreadable(label: str, error: OSError) -> DataError:
    reason = error.strerror or str(error).partition("\n")[0]
    return DataError(f"{label}: cannot be read: {reason}")


def raw_file(file: Path | RawFile) -> RawFile:
    return file if isinstance(file, RawFile) else RawFile.local(file)


@dataclass(frozen=True)
class Files:
    """Raw files of a source, in reading order; a plain Path stands for a local file."""

    items: list[Any]
    interactions: list[Any]

    def roles(self) -> Iterator[tuple[str, RawFile]]:
        """Yield (role, file) of every file, in reading order: what a fingerprint has to cover, with `digest()`."""
        for role, files in (("items", self.items), ("interactions", self.interactions)):
            for file in files:
                yield role, raw_file(file)


def existing(path: Path, hint: str) -> Path:
    """Return `path`.

    Raises:
        DataError: it does not exist; `hint` says which key to set.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; {hint}")
    return path


def expand(names: list[str], key: str) -> list[RawFile]:
    """Return the files behind paths, folders, globs, URLs and URIs, in the order of `names`.

    A folder or glob stands for its files in the order of their paths, folders below it included. Hidden files and those
    that begin with an underscore (`_SUCCESS`, `.part-0.crc`) are passed over, as Spark, Hive and Ray Data do.

    Args:
        key: the configuration key for messages, such as `data.items`.

    Raises:
        DataError: a name stands for no file.
    """
    found: list[RawFile] = []
    for name in names:
        if name.startswith(("http://", "https://")):
            found.append(RawFile.local(download(name)))
            continue
        remote = "://" in name
        try:
            if remote:
                folder = Folder(name)
                filesystem, path = folder.filesystem, folder.path
            else:
                filesystem, path = pafs.LocalFileSystem(), str(Path(name).expanduser().absolute())
            found += _expand(filesystem, path.rstrip("/"), name, remote, key)
        except TigerError:
            raise
        except Exception as error:  # of pyarrow's filesystems: no such scheme, no credentials, no network
            reason = str(error).partition("\n")[0]
            raise DataError(f"{name} cannot be opened: {reason[:300]}; correct {key}") from None
    return found


def _expand(filesystem: Any, path: str, name: str, remote: bool, key: str) -> list[RawFile]:
    def label(inner: str) -> str:
        if remote:
            return f"{name.partition('://')[0]}://{inner}"
        return inner if Path(name).is_absolute() or name.startswith("~") else _relative(inner, name)

    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.File:
        return [RawFile(filesystem, path, name)]
    if info.type == pafs.FileType.Directory:
        paths = _files_below(filesystem, path)
        what = f"{name} is a folder without files"
    elif re.search(r"[*?\[]", path):
        base = re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]
        paths = [each for each in _files_below(filesystem, base, hidden=True) if _matches(each, path)]
        what = f"no file matches {name}"
    else:
        raise DataError(f"{name} does not exist; correct {key}")
    if not paths:
        raise DataError(f"{what}; correct {key}")
    return [RawFile(filesystem, each, label(each)) for each in paths]


def _relative(path: str, name: str) -> str:
    here = f"{Path.cwd()}/"
    return path.removeprefix(here) if not name.startswith("..") else path


def _matches(path: str, pattern: str) -> bool:
    """Match part by part, so that `*` does not cross a slash; `**` stands for any number of folders.

    Wildcards do not match hidden parts, see `_hidden`.
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
