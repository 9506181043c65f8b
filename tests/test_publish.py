"""Ended, or failing, at every single write, rename, sync and removal of a publish and of a snapshot: a reader sees the
old state or the new one, and the same work done again ends as if nothing had happened.

What stands for a kill is an exception that no handler of the code under test catches: the disk is left as a kill leaves
it, without the seconds that a process takes to start, so that every point can be tried.
"""

from __future__ import annotations

import builtins
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from tiger import artifacts
from tiger.artifacts import MANIFEST, Draft, Folder, build, open_artifact
from tiger.config import Config
from tiger.errors import ArtifactError, ConfigError, ResourceError
from tiger.snapshots import Snapshots

Property = Callable[[str, object], None]


class Killed(BaseException):
    pass


class Knobs(Config):
    size: int = 1


class _Injected:
    """Stands for `os` and `open` in tiger.artifacts; counts operations that change a disk, and ends at one of them."""

    _CHANGES = ("makedirs", "fsync", "replace", "unlink")

    def __init__(self, at: int, how: str) -> None:
        self.at, self.how, self.count = at, how, 0

    def strike(self, act: Callable[[], Any], torn: Callable[[], Any] | None = None) -> Any:
        self.count += 1
        if self.count != self.at:
            return act()
        if self.how in ("full", "broken"):
            raise OSError(errno.ENOSPC if self.how == "full" else errno.EIO, "injected")
        if self.how == "after":
            act()
        if self.how == "torn" and torn:
            torn()
        raise Killed

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self._CHANGES:
            return real
        return lambda *args, **kwargs: self.strike(lambda: real(*args, **kwargs))

    def opened(self, path: str, mode: str) -> Any:
        file = self.strike(lambda: builtins.open(path, mode))
        write = file.write

        def half(data: bytes) -> None:
            write(data[: len(data) // 2])
            file.flush()

        class Proxy:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, data: bytes) -> Any:
                return injected.strike(lambda: write(data), lambda: half(data))

            def flush(self) -> None:
                file.flush()

            def fileno(self) -> int:
                return int(file.fileno())

        injected = self
        return Proxy()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(artifacts, "os", self)
        monkeypatch.setattr(artifacts, "open", self.opened, raising=False)
        remove = Folder.delete
        monkeypatch.setattr(Folder, "delete", lambda folder, name="": self.strike(lambda: remove(folder, name)))


def _fill(draft: Draft) -> None:
    draft.folder.write_table("table/part-00000.parquet", pa.table({"x": [1, 2]}))
    draft.folder.write_json("notes.json", {"a": 1})
    draft.folder.write_json(f"{artifacts.SCRATCH}/state.json", {})
    draft.figures = {"rows": 2}


def _publish(root: str, size: int = 1) -> artifacts.Artifact:
    return build(root, "catalog", Knobs(size=size), {}, _fill)


def _state(step: int) -> dict[str, Any]:
    return {
        "module": {"weight": torch.full((3, 2), float(step))},
        "optimizer": {"state": {0: {"step": torch.tensor(step)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]},
        "state": {"step": step, "best": {}, "log": [{"loss": 0.1 + step, "losses": [1 / 3]}], "best_weights": {}},
    }


def _snapshots(root: str, **given: Any) -> Snapshots:
    return Snapshots(Folder(root), {"config": {"lr": 0.1}, "workers": 2} | given)


def _strike(work: str, root: Path, at: int, how: str) -> bool:
    """Whether the work was struck; it ends by itself where it has fewer operations."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        _Injected(at, how).install(monkeypatch)
        try:
            if work == "publish":
                _publish(str(root))
            else:
                _snapshots(str(root)).save(_state(3), {"step": 3})
        except (Killed, OSError, ResourceError) as error:
            assert isinstance(error, Killed) != (how in ("full", "broken"))
            assert isinstance(error, ResourceError) or how != "full" or "injected" in str(error)
            return True
    return False


def _points(work: str, how: str, prepare: Callable[[Path], None], check: Callable[[Path], None], base: Path) -> int:
    """Strikes at operation 1, 2, ... until there is none left; returns how many there were."""
    for at in range(1, 200):
        root = base / f"{at}"
        root.mkdir()
        prepare(root)
        if not _strike(work, root, at, how):
            return at - 1
        check(root)
    raise AssertionError("no end of operations")


@pytest.mark.parametrize("how", ["before", "after", "torn", "full", "broken"])
def test_a_publish_that_ends_anywhere_is_there_or_not(how: str, tmp_path: Path, record_property: Property) -> None:
    def prepare(root: Path) -> None:
        _publish(str(root), size=2)  # another artifact, which must stay as it is

    def check(root: Path) -> None:
        for folder in root.iterdir():
            if (folder / MANIFEST).exists():
                open_artifact(str(folder)).verify()
            else:
                with pytest.raises(ArtifactError, match="holds no finished artifact"):
                    open_artifact(str(folder))
        assert len(list(root.glob(f"*/{MANIFEST}"))) >= 1
        artifact = _publish(str(root))
        artifact.verify()
        assert artifact.figures == {"rows": 2}
        assert set(artifact.manifest["files"]) == {"table/part-00000.parquet", "notes.json"}

    points = _points("publish", how, prepare, check, tmp_path)
    assert points >= 20
    record_property("injections", points)


@pytest.mark.parametrize("how", ["before", "after", "torn", "full", "broken"])
def test_a_snapshot_that_ends_anywhere_leaves_the_one_before_or_itself(
    how: str, tmp_path: Path, record_property: Property
) -> None:
    def prepare(root: Path) -> None:
        for step in (1, 2):
            _snapshots(str(root)).save(_state(step), {"step": step})

    def check(root: Path) -> None:
        found = _snapshots(str(root)).load()
        assert found is not None
        step = found["state"]["step"]
        assert step in (2, 3)
        assert _equal(found, _state(step))
        _snapshots(str(root)).save(_state(4), {"step": 4})
        assert len(list(root.glob("step-*"))) == 2  # what the killed writer left is collected

    points = _points("snapshot", how, prepare, check, tmp_path)
    assert points >= 20
    record_property("injections", points)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def _damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "emptied":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 4]) + content[-2:])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["emptied", "cut", "flipped", "removed"])
@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "record.json"])
def test_a_damaged_snapshot_is_passed_over_and_never_means_step_zero(name: str, how: str, tmp_path: Path) -> None:
    snapshots = _snapshots(str(tmp_path))
    assert snapshots.load() is None
    for step in (1, 2):
        snapshots.save(_state(step), {"step": step})
    _damage(tmp_path / "step-00000002" / name, how)
    found = snapshots.load()
    assert found is not None
    assert _equal(found, _state(1))
    _damage(tmp_path / "step-00000001" / name, how)
    with pytest.raises(ArtifactError, match="none of the 2 there is whole"):
        snapshots.load()


def test_a_snapshot_of_another_training_is_refused_by_field(tmp_path: Path) -> None:
    _snapshots(str(tmp_path)).save(_state(1), {"step": 1})
    with pytest.raises(ConfigError, match=r"config.lr was 0.1, is 0.2; workers was 2, is 4"):
        _snapshots(str(tmp_path), config={"lr": 0.2}, workers=4).load()


def test_every_byte_of_an_artifact_counts(tmp_path: Path, record_property: Property) -> None:
    """One bit flipped in every byte of the manifest and of a file; an added file; each is refused."""
    artifact, flipped = _publish(str(tmp_path)), 0
    for name in (MANIFEST, "notes.json"):
        path = Path(artifact.folder.uri, name)
        content = path.read_bytes()
        flipped += len(content)
        for place in range(len(content)):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            try:
                open_artifact(artifact.folder.uri).verify()
            except ArtifactError:
                continue
            assert content[place : place + 1].isspace(), f"{name}: byte {place} was altered unnoticed"
        path.write_bytes(content)
    record_property("injections", flipped)
    open_artifact(artifact.folder.uri).verify()
    Path(artifact.folder.uri, "table", "part-00001.parquet").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"table/part-00001.parquet is not part of the artifact"):
        open_artifact(artifact.folder.uri)
