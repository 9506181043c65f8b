"""Drive a headless Chromium over its DevTools protocol: open a page, type, click, read, take pictures."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip


class Page:
    """A tab."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.number, self.loaded = socket, 0, False
        self.problems: list[str] = []
        """Errors of scripts, of the console, and of the Content-Security-Policy."""
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message: Any) -> None:
        given = message.get("params", {})
        self.loaded |= message["method"] == "Page.loadEventFired"
        if message["method"] == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(given["exceptionDetails"])[:500])
        elif message["method"] == "Log.entryAdded" and given["entry"]["level"] == "error":
            self.problems.append(given["entry"]["text"])

    def open(self, url: str, width: int, height: int = 900, *, dark: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        self.loaded = False
        self.send("Page.navigate", url=url)
        while not self.loaded:
            self._note(json.loads(self.socket.recv(timeout=60)))

    def run(self, script: str) -> Any:
        """The value of an expression, which may be a promise."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 20) -> Any:
        """Wait until an expression is true; return its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"{script} is {value!r}; problems: {self.problems}"
            time.sleep(0.05)
        return value

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.run(
            f"[...document.querySelectorAll({json.dumps(selector)})].map((each) => each.innerText)"
        )
        return found

    def click(self, selector: str, index: int = 0) -> None:
        """Click where an element is, as a mouse does."""
        x, y = self.run(
            f"""(() => {{
                const each = document.querySelectorAll({json.dumps(selector)})[{index}];
                each.scrollIntoView({{block: "center", behavior: "instant"}});
                const box = each.getBoundingClientRect();
                return [box.x + Math.min(box.width, 40) / 2, box.y + box.height / 2];
            }})()"""
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                windowsVirtualKeyCode=code,
                text=text if kind == "keyDown" else "",
            )

    def picture(self, path: Path, *, whole: bool = True) -> None:
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def _chromium() -> Iterator[str | None]:
    """A Chromium of our own: the port of its DevTools, or None where it does not listen within a minute."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(prefix="chromium", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [CHROMIUM, *_OPTIONS, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            found = Path(folder) / "DevToolsActivePort"
            deadline = time.monotonic() + 60
            while not (listens := found.exists() and found.read_text().count("\n")) and time.monotonic() < deadline:
                assert process.poll() is None, "Chromium does not start"
                time.sleep(0.1)
            yield found.read_text().split()[0] if listens else None
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """A Chromium with one tab. Starts another one where the first hangs, as it may on a machine under load."""
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(_chromium()) or stack.enter_context(_chromium())
        assert port is not None, "Chromium did not listen within a minute, twice"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=30) as answer:
            tabs = [each for each in json.load(answer) if each["type"] == "page"]
        with connect(tabs[0]["webSocketDebuggerUrl"], max_size=None) as socket:
            yield Page(socket)
