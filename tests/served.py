"""A server in a process of its own, and clients that ask it while something else happens."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.paths import ROOT
from tests.pipelines import TINY
from tests.processes import free_ports
from tests.serving import TOKEN, token_file
from tiger.core.artifacts import Artifact
from tiger.data.catalog import Catalog


class Running:
    """`python -m jobs.serve` in a process of its own, on a port of its own."""

    def __init__(self, root: Path, ray_folder: str) -> None:
        self.token = token_file(root)
        (port,) = free_ports(1)
        self.port, self.address = port, f"https://localhost:{port}"
        key = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        key += ["-addext", "subjectAltName=DNS:localhost", "-keyout", f"{root}/key.pem", "-out", f"{root}/cert.pem"]
        subprocess.run(key, check=True, capture_output=True)
        self.tls = ssl.create_default_context(cafile=f"{root}/cert.pem")
        command = [sys.executable, "-m", "jobs.serve", *TINY, f"root={root}/runs", f"serve.port={port}"]
        command += [f"serve.token_file={self.token}", "decoding.beam=20", "serve.resources.max_workers=2"]
        command += [f"serve.tls_cert_file={root}/cert.pem", f"serve.tls_key_file={root}/key.pem"]
        self.environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.environment["RAY_TMPDIR"] = ray_folder
        self.log = root / "serve.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=output, stderr=output)
        deadline = time.monotonic() + 1200
        while "RAY_ADDRESS=" not in self.log.read_text() or self.ask("/healthz")[0] != 200:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.5)
        self.environment["RAY_ADDRESS"] = self.log.read_text().partition("RAY_ADDRESS=")[2].split()[0]

    def tiger(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a verb of the command line."""
        command = [sys.executable, "-m", "tiger", *arguments]
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True)

    def swap(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `tiger swap`."""
        return self.tiger("swap", *arguments)

    def ask(self, path: str, body: Any = None, token: str = "") -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        try:
            asked = urllib.request.Request(self.address + path, data, headers)
            with urllib.request.urlopen(asked, timeout=60, context=self.tls) as found:
                return found.status, json.loads(found.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"{}")
        except urllib.error.URLError:
            return 0, {}

    def recommend(self, token: str = TOKEN, **body: Any) -> tuple[int, Any]:
        return self.ask("/recommend", body, token)


@contextlib.contextmanager
def under_load(server: Running, model: Artifact) -> Iterator[Counter[tuple[int, str]]]:
    """Ask with four clients while the block runs; count statuses and the names of models of the answers."""
    catalog = Catalog(model.inputs["catalog"])
    histories = [[catalog.source_ids[item] for item in catalog.histories.of(user)] for user in range(40)]
    answers: Counter[tuple[int, str]] = Counter()
    stop = threading.Event()

    def client(number: int) -> None:
        for user in itertools.count(number):
            if stop.is_set():
                return
            status, answer = server.recommend(history=histories[user % 40], k=5)
            answers[status, answer.get("model", "")] += 1

    with ThreadPoolExecutor(4) as clients:
        asked = [clients.submit(client, number) for number in range(4)]
        try:
            yield answers
        finally:
            stop.set()
        for each in asked:
            each.result()
