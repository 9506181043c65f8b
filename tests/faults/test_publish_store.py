"""Publishing to an object store, ended at every single request, alone and with a second writer at work."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.memory_store import MemoryStore, Schedule, use_for_tests
from tests.publishing import Killed, Knobs, Property, publish_as, require_whole
from tiger.core import artifacts, publishing, storage
from tiger.core.artifacts import Draft, build, open_artifact
from tiger.core.errors import SecurityError
from tiger.core.storage import MANIFEST, SCRATCH, Folder

# --- two writers ------------------------------------------------------------------------------------------------

ROOT = "memory://bucket/runs"


def _attempts(store: MemoryStore) -> set[str]:
    return {name.split("/")[3] for name in store.names("bucket/runs/") if "/attempt-" in name}


def _interleaved(turns: list[tuple[str, int]], others_seem_dead: bool) -> Schedule:
    """Two writers by a schedule; whatever is published whenever they take turns verifies, and so does what they get."""
    schedule = Schedule(turns)
    with pytest.MonkeyPatch.context() as monkeypatch:
        store = use_for_tests(monkeypatch, others_seem_dead=others_seem_dead)
        store.before = schedule.before
        results = schedule.run({name: lambda name=name: publish_as(ROOT, name) for name in "AB"})
        home = results["A"].home.uri
        for artifact in [*results.values(), open_artifact(home), publish_as(ROOT, "C")]:
            require_whole(artifact)
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
                publish_as(ROOT, "A")
                break
            except Killed:
                store.before = lambda request: None
            begun = any(name.endswith("scratch/begun.json") for name in store.names())
            kept = {name.rpartition("/")[2] for name in store.names() if begun and name.endswith(".parquet")}
            artifact = publish_as(ROOT, "B")
            require_whole(artifact)
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
        publish_as(ROOT, "A")
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
    artifact = publish_as(ROOT, "B")
    own = artifact.manifest["attempt"]
    path = artifact.home.path
    assert _attempts(store) == {left, own}  # its run might still be about to name it
    _aged(store, 8, f"{path}/{left}/")
    require_whole(publish_as(ROOT, "C"))
    assert _attempts(store) == {left, own}  # the common manifest is new
    assert not [name for name in store.names() if name.endswith("clock.json")]
    _aged(store, 8, f"{path}/{MANIFEST}")
    store.objects[f"{path}/{left}/{publishing._ALIVE}"] = (b"{}", publishing.time.time())
    monkeypatch.setattr(publishing, "_SILENT_SECONDS", 60.0)
    require_whole(publish_as(ROOT, "C"))
    assert _attempts(store) == {left, own}  # it has just shown a sign of life
    del store.objects[f"{path}/{left}/{publishing._ALIVE}"]
    require_whole(publish_as(ROOT, "C"))
    assert _attempts(store) == {own}
    artifact.verify()


def test_a_wrong_clock_removes_no_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    store = use_for_tests(monkeypatch, others_seem_dead=True)
    _leave_an_unnamed_attempt(store)
    publish_as(ROOT, "B")
    before = _attempts(store)

    class Ahead:
        monotonic = staticmethod(publishing.time.monotonic)
        sleep = staticmethod(publishing.time.sleep)
        time = staticmethod(lambda real=publishing.time.time: real() + 365 * 86_400)

    monkeypatch.setattr(publishing, "time", Ahead)
    require_whole(publish_as(ROOT, "C"))
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
            results = schedule.run({name: lambda name=name: publish_as(ROOT, name) for name in "AB"})
            home = results["A"].home
            for artifact in [*results.values(), open_artifact(home), publish_as(ROOT, "C")]:
                require_whole(artifact)
            named = open_artifact(home).manifest["attempt"]
            assert left in _attempts(store)
            _aged(store, 30)
            require_whole(publish_as(ROOT, "C"))
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
    artifact = publish_as(ROOT, "B")
    assert artifact.folder.read_table("table")["by"].to_pylist() == ["A", "A"]
    assert artifact.folder.read_json("notes.json") == {"by": "B"}


def _home(store: MemoryStore) -> str:
    (home,) = {"/".join(name.split("/")[:3]) for name in store.names("bucket/runs/model-")}
    return home


def test_no_thread_outlives_a_publish(monkeypatch: pytest.MonkeyPatch) -> None:
    use_for_tests(monkeypatch, others_seem_dead=False)
    publish_as(ROOT, "A")
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
    home = publish_as(ROOT, "A").home
    manifest = home.read_json(MANIFEST) | {"attempt": attempt}
    home.write_json(MANIFEST, manifest | {"digest": artifacts._digest(manifest)})
    with pytest.raises(SecurityError, match="is not the name of an attempt"):
        open_artifact(home)


def test_an_artifact_of_a_store_is_read_where_it_was_copied_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = use_for_tests(monkeypatch, others_seem_dead=False)
    artifact = publish_as(ROOT, "A")
    for name in store.names():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.objects[name][0])
    copied = open_artifact(str(tmp_path / artifact.home.path))
    require_whole(copied)
    assert copied.home.uri == str(tmp_path / artifact.home.path)
    assert open_artifact(copied.folder.uri).home.uri == copied.home.uri  # by its attempt, as logs name it
