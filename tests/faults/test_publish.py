"""Ended, or failing, at every single write, rename, sync and removal of a publish and of a snapshot: a reader sees the
old state or the new one, and the same work done again ends as if nothing had happened.

What stands for a kill is an exception that no handler of the code under test catches: the disk is left as a kill leaves
it, without the seconds that a process takes to start, so that every point can be tried.
"""

from __future__ import annotations

import builtins
import errno
import hashlib
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from tests.memory_store import MemoryStore, Schedule, use_for_tests
from tiger.core import artifacts, publishing, storage
from tiger.core.artifacts import Draft, build, open_artifact
from tiger.core.config import Config
from tiger.core.errors import ArtifactError, ConfigError, ResourceError, SecurityError
from tiger.core.storage import MANIFEST, SCRATCH, Folder
from tiger.training.checkpoints import CheckpointStore

Property = Callable[[str, object], None]


class Killed(BaseException):
    pass


class Knobs(Config):
    size: int = 1


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
        for module in (storage, publishing):
            monkeypatch.setattr(module, "os", self)
            monkeypatch.setattr(module, "open", self.opened, raising=False)
        remove = Folder.delete
        monkeypatch.setattr(Folder, "delete", lambda folder, name="": self.strike(lambda: remove(folder, name)))


def _fill(draft: Draft) -> None:
    draft.folder.write_table("table/part-00000.parquet", pa.table({"x": [1, 2]}))
    draft.folder.write_json("notes.json", {"a": 1})
    draft.folder.write_json(f"{SCRATCH}/state.json", {})
    draft.metrics = {"rows": 2}


def _publish(root: str, size: int = 1) -> artifacts.Artifact:
    return build(root, "catalog", Knobs(size=size), {}, _fill)


def _state(step: int) -> dict[str, Any]:
    return {
        "module": {"weight": torch.full((3, 2), float(step))},
        "optimizer": {"state": {0: {"step": torch.tensor(step)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]},
        "state": {"step": step, "best": {}, "log": [{"loss": 0.1 + step, "losses": [1 / 3]}], "best_weights": {}},
    }


def _snapshots(root: str, **given: Any) -> CheckpointStore:
    return CheckpointStore(Folder(root), {"config": {"lr": 0.1}, "workers": 2} | given)


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
                with pytest.raises(ArtifactError, match="is not a finished artifact"):
                    open_artifact(str(folder))
        assert len(list(root.glob(f"*/{MANIFEST}"))) >= 1
        artifact = _publish(str(root))
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
    with pytest.raises(ArtifactError, match=r"contains no valid checkpoint \(2 incomplete or corrupt\)"):
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


# --- two writers ------------------------------------------------------------------------------------------------


def _writer(root: str, name: str) -> artifacts.Artifact:
    """Make one artifact as a training does: not bit for bit what another run makes, and resumable by its parts."""

    def fill(draft: Draft) -> None:
        for part in range(2):
            if not draft.folder.exists(f"table/part-0000{part}.parquet"):
                draft.folder.write_table(f"table/part-0000{part}.parquet", pa.table({"x": [part], "by": [name]}))
        draft.folder.write_json(f"{SCRATCH}/state.json", {"by": name})
        draft.folder.write_json("notes.json", {"by": name})
        draft.metrics = {"parts": len(draft.folder.read_table("table"))}

    return build(root, "model", Knobs(), {}, fill)


def _require_whole(artifact: artifacts.Artifact) -> None:
    artifact.verify()
    assert artifact.metrics == {"parts": 2}
    assert set(artifact.manifest["files"]) == {"notes.json", "table/part-00000.parquet", "table/part-00001.parquet"}


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
                    _require_whole(_writer(root, second))
                    finished += 1
                except ResourceError as error:
                    assert "another run is making" in str(error)
                    told += 1

            injected.meanwhile = meanwhile
            _require_whole(_writer(root, first))
        if injected.count < 10_000:
            break
        again = _writer(root, second)
        _require_whole(again)
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
                _writer(str(tmp_path), "B")
            others.append(name)
            return real(folder, name)

        monkeypatch.setattr(Folder, "digest", digest)
        _require_whole(_writer(str(tmp_path), "A"))
    assert others


def test_what_a_kill_left_beside_the_manifest_is_removed_by_the_next_run(tmp_path: Path) -> None:
    artifact = _writer(str(tmp_path), "A")
    scratch = Path(artifact.folder.uri, SCRATCH)
    scratch.mkdir()
    (scratch / "claim").touch()
    (scratch / "snapshot").write_bytes(b"x" * 1000)
    _require_whole(_writer(str(tmp_path), "A"))
    assert not scratch.exists()


def test_a_disk_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(publishing.fcntl, "flock", no_locks)
    with pytest.raises(ResourceError, match="cannot lock files .*set root to another disk, or to an object store"):
        _writer(str(tmp_path), "A")


ROOT = "memory://bucket/runs"


def _attempts(store: MemoryStore) -> set[str]:
    return {name.split("/")[3] for name in store.names("bucket/runs/") if "/attempt-" in name}


def _interleaved(turns: list[tuple[str, int]], others_seem_dead: bool) -> Schedule:
    """Two writers by a schedule; whatever is published whenever they take turns verifies, and so does what they get."""
    schedule = Schedule(turns)
    with pytest.MonkeyPatch.context() as monkeypatch:
        store = use_for_tests(monkeypatch, others_seem_dead=others_seem_dead)
        store.before = schedule.before
        results = schedule.run({name: lambda name=name: _writer(ROOT, name) for name in "AB"})
        home = results["A"].home.uri
        for artifact in [*results.values(), open_artifact(home), _writer(ROOT, "C")]:
            _require_whole(artifact)
            assert artifact.folder.read_json("notes.json")["by"] in ("A", "B")
        named = open_artifact(home).manifest["attempt"]
        assert not [name for name in store.names() if SCRATCH in name and named in name]
        for attempt in _attempts(store) - {named}:  # only one that has been named itself may be left
            assert f"{home.partition('://')[2]}/{attempt}/{MANIFEST}" in store.objects
    return schedule


@pytest.mark.parametrize("others_seem_dead", [False, True])
@pytest.mark.parametrize("first", ["A", "B"])
def test_two_writers_on_a_store_never_touch_each_others_files(
    first: str, others_seem_dead: bool, record_property: Property
) -> None:
    """One writer up to its n-th request, then the other from beginning to end, then the rest of the first.

    Also where each takes the other for killed, copies its files, and removes its attempt as soon as it has published.
    """
    second = "BA"["AB".index(first)]
    for at in range(1, 300):
        schedule = _interleaved([(first, at), (second, 1 << 30)], others_seem_dead)
        if schedule.used[first] <= at:
            break
    assert at >= 30
    record_property("injections", at)


@pytest.mark.parametrize("others_seem_dead", [False, True])
def test_two_writers_that_are_both_interrupted_on_a_store(others_seem_dead: bool, record_property: Property) -> None:
    """n requests of A, m of B, the rest of A, the rest of B."""
    points = range(1, 60, 4)
    for n, m in itertools.product(points, points):
        _interleaved([("A", n), ("B", m), ("A", 1 << 30)], others_seem_dead)
    record_property("injections", len(points) ** 2)


def test_a_run_that_is_killed_at_any_request_is_continued_by_the_next(record_property: Property) -> None:
    """What is left is one attempt, and the parts that were there are not made again."""
    for at in range(1, 300):
        with pytest.MonkeyPatch.context() as monkeypatch:
            store = use_for_tests(monkeypatch, others_seem_dead=True)
            count = itertools.count(1)

            def kill(request: str, count: Any = count, at: int = at) -> None:
                if next(count) >= at:  # a process that is killed makes no further request
                    raise Killed

            store.before = kill
            try:
                _writer(ROOT, "A")
                break
            except Killed:
                store.before = lambda request: None
            begun = any(name.endswith("scratch/begun.json") for name in store.names())
            kept = {name.rpartition("/")[2] for name in store.names() if begun and name.endswith(".parquet")}
            artifact = _writer(ROOT, "B")
            _require_whole(artifact)
            by = {f"part-0000{part}.parquet": by for part, by in enumerate(artifact.folder.read_table("table")["by"])}
            left = {by[name].as_py() for name in kept}
            published = f"{artifact.home.path}/{MANIFEST}" in store.objects
            assert published
            assert left <= {"A"}
            complete = [a for a in _attempts(store) if f"{artifact.home.path}/{a}/{MANIFEST}" in store.objects]
            assert _attempts(store) == set(complete)
            assert len(complete) <= 2  # the second: killed between its own manifest and the common one
    assert at >= 25
    record_property("injections", at)


def _aged(store: MemoryStore, days: float, prefix: str = "") -> None:
    """Let everything below `prefix` have been written so many days earlier."""
    for name in store.names(prefix):
        content, time_put = store.objects[name]
        store.objects[name] = content, time_put - days * 86_400


def _leave_an_attempt(store: MemoryStore, killed_at: Callable[[str], bool]) -> str:
    """Kill a run at the first request that `killed_at` picks; return its attempt."""

    def kill(request: str) -> None:
        if killed_at(request):
            raise Killed

    store.before = kill
    with pytest.raises(Killed):
        _writer(ROOT, "A")
    store.before = lambda request: None
    (attempt,) = _attempts(store)
    return attempt


def _leave_an_unnamed_attempt(store: MemoryStore) -> str:
    """Kill a run between its own manifest and the common one; return its attempt."""
    return _leave_an_attempt(
        store, lambda request: request.startswith("put") and request.endswith(MANIFEST) and "/attempt-" not in request
    )


def test_an_attempt_that_was_killed_before_it_was_named_is_removed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it and the common manifest are old by the store's clock, and not before."""
    store = use_for_tests(monkeypatch, others_seem_dead=True)
    left = _leave_an_unnamed_attempt(store)
    artifact = _writer(ROOT, "B")
    own = artifact.manifest["attempt"]
    path = artifact.home.path
    assert _attempts(store) == {left, own}  # its run might still be about to name it
    _aged(store, 8, f"{path}/{left}/")
    _require_whole(_writer(ROOT, "C"))
    assert _attempts(store) == {left, own}  # the common manifest is new
    assert not [name for name in store.names() if name.endswith("clock.json")]
    _aged(store, 8, f"{path}/{MANIFEST}")
    store.objects[f"{path}/{left}/{publishing._ALIVE}"] = (b"{}", publishing.time.time())
    monkeypatch.setattr(publishing, "_SILENT_SECONDS", 60.0)
    _require_whole(_writer(ROOT, "C"))
    assert _attempts(store) == {left, own}  # it has just shown a sign of life
    del store.objects[f"{path}/{left}/{publishing._ALIVE}"]
    _require_whole(_writer(ROOT, "C"))
    assert _attempts(store) == {own}
    artifact.verify()


def test_a_wrong_clock_removes_no_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    store = use_for_tests(monkeypatch, others_seem_dead=True)
    _leave_an_unnamed_attempt(store)
    _writer(ROOT, "B")
    before = _attempts(store)

    class Ahead:
        monotonic = staticmethod(publishing.time.monotonic)
        sleep = staticmethod(publishing.time.sleep)
        time = staticmethod(lambda real=publishing.time.time: real() + 365 * 86_400)

    monkeypatch.setattr(publishing, "time", Ahead)
    _require_whole(_writer(ROOT, "C"))
    assert _attempts(store) == before
    assert len(before) == 2


@pytest.mark.parametrize("others_seem_dead", [False, True])
def test_two_writers_with_an_old_attempt_in_the_store(others_seem_dead: bool, record_property: Property) -> None:
    """It is continued or left alone while they work, wherever one interrupts the other, and removed much later."""
    for at in range(1, 300):
        schedule = Schedule([("A", at), ("B", 1 << 30)])
        with pytest.MonkeyPatch.context() as monkeypatch:
            store = use_for_tests(monkeypatch, others_seem_dead=others_seem_dead)
            left = _leave_an_unnamed_attempt(store)
            _aged(store, 30)
            store.before = schedule.before
            results = schedule.run({name: lambda name=name: _writer(ROOT, name) for name in "AB"})
            home = results["A"].home
            for artifact in [*results.values(), open_artifact(home), _writer(ROOT, "C")]:
                _require_whole(artifact)
            named = open_artifact(home).manifest["attempt"]
            assert left in _attempts(store)
            _aged(store, 30)
            _require_whole(_writer(ROOT, "C"))
            assert _attempts(store) == {named}
        if schedule.used["A"] <= at:
            break
    assert at >= 30
    record_property("injections", at)


def test_a_run_that_is_alive_is_seen_and_not_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run starts inside the first one, sees it beat, and makes its own; the first one gives way."""
    store = MemoryStore()
    monkeypatch.setattr(storage, "_connect", store.connect)
    monkeypatch.setattr(publishing, "_BEAT_SECONDS", 0.02)
    monkeypatch.setattr(publishing, "_SETTLE_SECONDS", 0.0)
    inner: list[artifacts.Artifact] = []

    def faster(draft: Draft) -> None:
        draft.folder.write_bytes("x.bin", b"of the faster one")

    def fill(draft: Draft) -> None:
        draft.folder.write_bytes("x.bin", b"half")
        inner.append(build(ROOT, "model", Knobs(), {}, faster))
        assert draft.folder.read_bytes("x.bin") == b"half"  # not removed
        inner[0].verify()
        draft.folder.write_bytes("x.bin", b"of the slower one")

    outer = build(ROOT, "model", Knobs(), {}, fill)
    outer.verify()
    assert outer.folder.uri == inner[0].folder.uri
    assert outer.folder.read_bytes("x.bin") == b"of the faster one"
    assert len(_attempts(store)) == 1


def test_a_run_that_was_killed_a_moment_ago_is_watched_and_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    store = use_for_tests(monkeypatch, others_seem_dead=True)
    attempt = _leave_an_attempt(store, lambda request: request.startswith("put") and request.endswith("notes.json"))
    alive = f"{_home(store)}/{attempt}/{SCRATCH}/alive.json"
    store.objects[alive] = (b"{}", publishing.time.time())  # its last sign of life, which a real kill leaves
    monkeypatch.setattr(publishing, "_SILENT_SECONDS", 0.5)
    monkeypatch.setattr(publishing, "_BEAT_SECONDS", 0.05)
    artifact = _writer(ROOT, "B")
    assert artifact.folder.read_table("table")["by"].to_pylist() == ["A", "A"]
    assert artifact.folder.read_json("notes.json") == {"by": "B"}


def _home(store: MemoryStore) -> str:
    (home,) = {"/".join(name.split("/")[:3]) for name in store.names("bucket/runs/model-")}
    return home


def test_no_thread_outlives_a_publish(monkeypatch: pytest.MonkeyPatch) -> None:
    use_for_tests(monkeypatch, others_seem_dead=False)
    _writer(ROOT, "A")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("heartbeat")]


@pytest.mark.parametrize("name", ["x.gz", "x.bz2", "x.zst", "x.lz4", "x.csv"])
def test_bytes_stay_as_they_are_whatever_a_file_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = use_for_tests(monkeypatch, others_seem_dead=False)
    folder = Folder("memory://bucket/folder")
    folder.write_bytes(name, b"content")
    assert store.objects[f"bucket/folder/{name}"][0] == folder.read_bytes(name) == b"content"
    assert folder.digest(name) == hashlib.sha256(b"content").hexdigest()


@pytest.mark.parametrize("attempt", ["attempt-../../x", "../attempt-0123456789ab", 7])
def test_an_attempt_that_is_not_one_is_refused(attempt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_for_tests(monkeypatch, others_seem_dead=False)
    home = _writer(ROOT, "A").home
    manifest = home.read_json(MANIFEST) | {"attempt": attempt}
    home.write_json(MANIFEST, manifest | {"digest": artifacts._digest(manifest)})
    with pytest.raises(SecurityError, match="is not the name of an attempt"):
        open_artifact(home)


def test_an_artifact_of_a_store_is_read_where_it_was_copied_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = use_for_tests(monkeypatch, others_seem_dead=False)
    artifact = _writer(ROOT, "A")
    for name in store.names():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.objects[name][0])
    copied = open_artifact(str(tmp_path / artifact.home.path))
    _require_whole(copied)
    assert copied.home.uri == str(tmp_path / artifact.home.path)
    assert open_artifact(copied.folder.uri).home.uri == copied.home.uri  # by its attempt, as logs name it
