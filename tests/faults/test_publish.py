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

import pytest

from tests.publishing import Killed, Property, checkpoint_state, equal_states, publish_as, publish_small, require_whole
from tiger.core import local_files, publishing, storage
from tiger.core.artifacts import open_artifact
from tiger.core.errors import ArtifactError, ConfigError, ResourceError
from tiger.core.storage import MANIFEST, SCRATCH, Folder
from tiger.training.checkpoints import CheckpointStore


class _Injected:
    """Stands for `os` and `open` in tiger.core.storage and tiger.core.publishing.

    Counts operations that change a disk, and ends at one of them.
    """

    _CHANGES = ("makedirs", "fsync", "replace", "unlink")

    def __init__(self, at: int, how: str) -> None:
        self.at, self.how, self.count = at, how, 0
        self.meanwhile: Callable[[], None] | None = None

    def strike(self, act: Callable[[], Any], torn: Callable[[], Any] | None = None) -> Any:
        self.count += 1
        if self.count != self.at:
            return act()
        if self.meanwhile:
            self.meanwhile()
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
        for module in (storage, local_files, publishing):
            monkeypatch.setattr(module, "os", self)
            monkeypatch.setattr(module, "open", self.opened, raising=False)
        remove = Folder.delete
        monkeypatch.setattr(Folder, "delete", lambda folder, name="": self.strike(lambda: remove(folder, name)))


def _snapshots(root: str, **given: Any) -> CheckpointStore:
    return CheckpointStore(Folder(root), {"config": {"lr": 0.1}, "workers": 2} | given)


def _strike(work: str, root: Path, at: int, how: str) -> bool:
    """Whether the work was struck; it ends by itself where it has fewer operations."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        _Injected(at, how).install(monkeypatch)
        try:
            if work == "publish":
                publish_small(str(root))
            else:
                _snapshots(str(root)).save(checkpoint_state(3), {"step": 3})
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
        publish_small(str(root), size=2)  # another artifact, which must stay as it is

    def check(root: Path) -> None:
        for folder in root.iterdir():
            if (folder / MANIFEST).exists():
                open_artifact(str(folder)).verify()
            else:
                with pytest.raises(ArtifactError, match="is not a finished artifact"):
                    open_artifact(str(folder))
        assert len(list(root.glob(f"*/{MANIFEST}"))) >= 1
        artifact = publish_small(str(root))
        artifact.verify()
        assert artifact.metrics == {"rows": 2}
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
            _snapshots(str(root)).save(checkpoint_state(step), {"step": step})

    def check(root: Path) -> None:
        found = _snapshots(str(root)).load()
        assert found is not None
        step = found["state"]["step"]
        assert step in (2, 3)
        assert equal_states(found, checkpoint_state(step))
        _snapshots(str(root)).save(checkpoint_state(4), {"step": 4})
        assert len(list(root.glob("step-*"))) == 2  # what the killed writer left is collected

    points = _points("snapshot", how, prepare, check, tmp_path)
    assert points >= 20
    record_property("injections", points)


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
        snapshots.save(checkpoint_state(step), {"step": step})
    _damage(tmp_path / "step-00000002" / name, how)
    found = snapshots.load()
    assert found is not None
    assert equal_states(found, checkpoint_state(1))
    _damage(tmp_path / "step-00000001" / name, how)
    with pytest.raises(ArtifactError, match=r"contains no valid checkpoint \(2 incomplete or corrupt\)"):
        snapshots.load()


def test_a_snapshot_of_another_training_is_refused_by_field(tmp_path: Path) -> None:
    _snapshots(str(tmp_path)).save(checkpoint_state(1), {"step": 1})
    with pytest.raises(ConfigError, match=r"config.lr was 0.1, is 0.2; workers was 2, is 4"):
        _snapshots(str(tmp_path), config={"lr": 0.2}, workers=4).load()


def test_every_byte_of_an_artifact_counts(tmp_path: Path, record_property: Property) -> None:
    """One bit flipped in every byte of the manifest and of a file; an added file; each is refused."""
    artifact, flipped = publish_small(str(tmp_path)), 0
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


# --- two writers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["A", "B"])
def test_two_writers_on_a_disk_never_touch_each_others_files(
    first: str, tmp_path: Path, record_property: Property
) -> None:
    """One writer up to its n-th file operation, then the other from beginning to end, then the rest of the first."""
    second = "BA"["AB".index(first)]
    told = finished = 0
    for at in range(1, 200):
        root = str(tmp_path / f"{at}")
        injected = _Injected(at, "meanwhile")
        with pytest.MonkeyPatch.context() as monkeypatch:
            injected.install(monkeypatch)

            def meanwhile(injected: _Injected = injected, root: str = root) -> None:
                nonlocal told, finished
                injected.count = 10_000  # the operations of the other one are no points
                try:
                    require_whole(publish_as(root, second))
                    finished += 1
                except ResourceError as error:
                    assert "another run is making" in str(error)
                    told += 1

            injected.meanwhile = meanwhile
            require_whole(publish_as(root, first))
        if injected.count < 10_000:
            break
        again = publish_as(root, second)
        require_whole(again)
        assert not Path(again.folder.uri, SCRATCH).exists()
    assert told >= 15  # from its first file to its manifest
    assert finished >= 3  # before and after that
    record_property("injections", told + finished)


def test_a_claim_outlives_the_manifest(tmp_path: Path) -> None:
    """A run that starts while sums of finished files are computed must not begin to make them again."""
    real, others = Folder.digest, []
    with pytest.MonkeyPatch.context() as monkeypatch:

        def digest(folder: Folder, name: str) -> str:
            monkeypatch.setattr(Folder, "digest", real)
            with pytest.raises(ResourceError, match="another run is making"):
                publish_as(str(tmp_path), "B")
            others.append(name)
            return real(folder, name)

        monkeypatch.setattr(Folder, "digest", digest)
        require_whole(publish_as(str(tmp_path), "A"))
    assert others


def test_what_a_kill_left_beside_the_manifest_is_removed_by_the_next_run(tmp_path: Path) -> None:
    artifact = publish_as(str(tmp_path), "A")
    scratch = Path(artifact.folder.uri, SCRATCH)
    scratch.mkdir()
    (scratch / "claim").touch()
    (scratch / "snapshot").write_bytes(b"x" * 1000)
    require_whole(publish_as(str(tmp_path), "A"))
    assert not scratch.exists()


def test_a_disk_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(publishing.fcntl, "flock", no_locks)
    with pytest.raises(ResourceError, match="cannot lock files .*set root to another disk, or to an object store"):
        publish_as(str(tmp_path), "A")
