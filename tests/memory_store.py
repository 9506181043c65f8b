"""An object store in memory: objects are put as a whole, there are no folders, and every request can be scheduled."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from tiger.core import publishing, storage


class MemoryStore(pafs.FileSystemHandler):
    """Calls `before(request)` ahead of every request, in the thread that makes it."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.before: Callable[[str], None] = lambda request: None
        self.lock = threading.Lock()

    @property
    def filesystem(self) -> pafs.FileSystem:
        return pafs.PyFileSystem(self)

    def connect(self, uri: str) -> tuple[pafs.FileSystem, str]:
        """Stand for `tiger.core.storage._connect`."""
        return self.filesystem, uri.partition("://")[2]

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in self.objects if name.startswith(prefix))

    def _request(self, name: str) -> None:
        if not threading.current_thread().name.startswith("heartbeat"):
            self.before(name)

    def _info(self, path: str) -> pafs.FileInfo:
        with self.lock:
            if path in self.objects:
                content, time_put = self.objects[path]
                return pafs.FileInfo(path, pafs.FileType.File, size=len(content), mtime_ns=int(time_put * 1e9))
            is_prefix = any(name.startswith(f"{path}/") for name in self.objects)
            return pafs.FileInfo(path, pafs.FileType.Directory if is_prefix else pafs.FileType.NotFound)

    def _put(self, path: str, content: bytes) -> None:
        self._request(f"put {path}")
        with self.lock:
            self.objects[path] = (content, time.time())

    def _get(self, path: str) -> bytes:
        self._request(f"get {path}")
        with self.lock:
            if path not in self.objects:
                raise FileNotFoundError(path)
            return self.objects[path][0]

    def get_type_name(self) -> str:
        return "memory"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        self._request(f"head {paths}")
        return [self._info(path) for path in paths]

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        self._request(f"list {selector.base_dir}")
        base = f"{selector.base_dir}/"
        names = {name for name in list(self.objects) if name.startswith(base)}
        if not selector.recursive:
            names = {base + name[len(base) :].split("/")[0] for name in names}
        return [self._info(name) for name in sorted(names)]

    def create_dir(self, path: str, recursive: bool) -> None:
        pass

    def delete_dir(self, path: str) -> None:
        """Remove one object after the other, as an object store does."""
        for name in self.names(f"{path}/"):
            self._request(f"delete {name}")
            with self.lock:
                self.objects.pop(name, None)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.delete_dir(path)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def delete_file(self, path: str) -> None:
        self._request(f"delete {path}")
        with self.lock:
            if self.objects.pop(path, None) is None:
                raise FileNotFoundError(path)

    def move(self, src: str, dest: str) -> None:
        raise NotImplementedError

    def copy_file(self, src: str, dest: str) -> None:
        self._request(f"copy {src}")
        with self.lock:
            if src not in self.objects:
                raise FileNotFoundError(src)
            self.objects[dest] = (self.objects[src][0], time.time())

    def open_input_stream(self, path: str) -> Any:
        return pa.PythonFile(io.BytesIO(self._get(path)), mode="r")

    open_input_file = open_input_stream

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return pa.PythonFile(_Upload(lambda content: self._put(path, content)), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        raise NotImplementedError


class _Upload(io.BytesIO):
    """Is there when it is closed without an error, and not before."""

    def __init__(self, put: Callable[[bytes], None]) -> None:
        super().__init__()
        self.put = put

    def close(self) -> None:
        if not self.closed:
            content = self.getvalue()
            super().close()
            self.put(content)


class Schedule:
    """Lets two threads take turns: so many requests of one, then so many of the other, and so on."""

    def __init__(self, turns: list[tuple[str, int]]) -> None:
        self.turns, self.ended, self.used = turns, set[str](), dict[str, int]()
        self.changed = threading.Condition()
        self.failures: list[BaseException] = []

    def before(self, request: str) -> None:
        """Wait for a turn of this thread."""
        me = threading.current_thread().name
        if me not in ("A", "B"):
            return
        with self.changed:
            assert self.changed.wait_for(lambda: self._now() == me, 60), f"{me} never gets its turn for {request}"
            self.turns[0] = (me, self.turns[0][1] - 1)
            self.used[me] = self.used.get(me, 0) + 1
            self.changed.notify_all()

    def _now(self) -> str:
        """Return whose turn it is; when the turns are over, A's and then B's."""
        while self.turns and (self.turns[0][1] == 0 or self.turns[0][0] in self.ended):
            self.turns.pop(0)
        if not self.turns:
            self.turns = [(name, 1 << 30) for name in ("A", "B") if name not in self.ended]
        return self.turns[0][0]

    def run(self, work: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        """Run the work of A and B to its end; return what each returned."""
        results: dict[str, Any] = {}

        def one(name: str) -> None:
            try:
                results[name] = work[name]()
            except BaseException as error:
                self.failures.append(error)
            with self.changed:
                self.ended.add(name)
                self.changed.notify_all()

        threads = [threading.Thread(target=one, args=(name,), name=name) for name in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failures:
            raise self.failures[0]
        return results


class OneByOne:
    """Stands for a ThreadPoolExecutor in which a schedule can tell who makes a request."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> OneByOne:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    map = staticmethod(map)


def use_for_tests(monkeypatch: Any, *, others_seem_dead: bool) -> MemoryStore:
    """Let `memory://` URIs be a store in memory, without waits."""
    store = MemoryStore()
    monkeypatch.setattr(storage, "_connect", store.connect)
    monkeypatch.setattr(publishing, "ThreadPoolExecutor", OneByOne)
    monkeypatch.setattr(publishing, "_SETTLE_SECONDS", 0.0)
    if others_seem_dead:
        monkeypatch.setattr(publishing, "_SILENT_SECONDS", 0.0)
    else:
        monkeypatch.setattr(publishing, "_watch", lambda home, suspects, kind: {attempt.name for attempt in suspects})
    return store
