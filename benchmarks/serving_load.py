"""Load a running service, and do to it what happens to services: swaps, bad models, a killed replica, floods.

    python -m benchmarks.serving_load runs/model-1a2b3c4d [--seconds 60] [--clients 16] [--replicas 2]

Starts `tiger serve` on a Ray of its own, and asks it with aiohttp from this process, on the same machine: the requests
per second are those of the service with its client. Every part prints one line as it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
from safetensors.torch import load_file, save_file

from tests.processes import below, free_ports
from tiger.core.artifacts import _digest, open_artifact
from tiger.core.hashing import sha256
from tiger.data.catalog import Catalog

BODY = {"Content-Type": "application/json"}


@dataclass
class Load:
    """Responses of many clients: seconds of the good ones, and how many there were of each status."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    wall: float = 0.0

    @property
    def failed(self) -> int:
        return sum(count for status, count in self.statuses.items() if status != "200")

    def __str__(self) -> str:
        p50, p95, p99, most = np.quantile(self.seconds or [np.nan], [0.5, 0.95, 0.99, 1]) * 1000
        return (
            f"{len(self.seconds):,} answers in {self.wall:.1f} s = {len(self.seconds) / self.wall:.0f}/s, "
            f"p50 {p50:.0f} ms, p95 {p95:.0f} ms, p99 {p99:.0f} ms, max {most:.0f} ms, "
            f"{self.failed} others {dict(self.statuses)}"
            + "".join(f"\n    {reason}" for reason in list(self.reasons)[:3])
        )


class Service:
    """`tiger serve` in a process of its own, on a Ray of its own."""

    def __init__(self, model: str, replicas: int, folder: Path) -> None:
        (port,) = free_ports(1)
        self.url, self.port = f"http://127.0.0.1:{port}", port
        self.log = folder / "serve.log"
        self.environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.environment["RAY_TMPDIR"] = str(folder)
        command = [sys.executable, "-m", "tiger", "serve", model, f"serve.port={port}"]
        command.append(f"serve.resources.max_workers={replicas}")
        begin = time.monotonic()
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, env=self.environment, stdout=output, stderr=output)
        while "RAY_ADDRESS=" not in self.log.read_text():
            if self.process.poll() is not None:
                raise SystemExit(self.log.read_text())
            time.sleep(0.2)
        self.start_seconds = time.monotonic() - begin
        self.environment["RAY_ADDRESS"] = self.log.read_text().partition("RAY_ADDRESS=")[2].split()[0]

    async def swap(self, *arguments: str) -> tuple[int, float, str]:
        """Run `tiger swap`; return its exit code, its seconds and its last line."""
        begin = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tiger", "swap", *arguments,
            env=self.environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, time.monotonic() - begin, output.decode().strip().splitlines()[-1]

    def replicas(self) -> list[int]:
        return [pid for pid in below(self.process.pid) if b"ServeReplica" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


async def ask(session: aiohttp.ClientSession, url: str, body: bytes, load: Load) -> None:
    begin = time.monotonic()
    try:
        async with session.post(f"{url}/recommend", data=body, headers=BODY) as response:
            content = await response.read()
        load.statuses[str(response.status)] += 1
        if response.status not in (200, 429):
            load.reasons[content.decode(errors="replace")[:80]] += 1
        if response.status == 200:
            load.seconds.append(time.monotonic() - begin)
            load.models[json.loads(content)["model"]] += 1
        elif response.status == 429 and "Retry-After" not in response.headers:
            load.statuses["429 without Retry-After"] += 1
    except (aiohttp.ClientError, TimeoutError) as error:
        load.statuses[type(error).__name__] += 1


@contextlib.asynccontextmanager
async def under_load(url: str, bodies: list[bytes], clients: int) -> AsyncIterator[Load]:
    """Ask with a number of clients, each one request after the other, while the block runs."""
    load, stop, begin = Load(), asyncio.Event(), time.monotonic()

    async def client(session: aiohttp.ClientSession, order: random.Random) -> None:
        while not stop.is_set():
            await ask(session, url, order.choice(bodies), load)

    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        tasks = [asyncio.create_task(client(session, random.Random(seed))) for seed in range(clients)]
        try:
            yield load
        finally:
            stop.set()
            await asyncio.gather(*tasks)
            load.wall = time.monotonic() - begin


def bodies_of(model: str) -> list[bytes]:
    """The last items of 2,000 real histories."""
    catalog = Catalog(open_artifact(model).inputs["catalog"])
    users = np.random.default_rng(0).choice(len(catalog.histories), 2000)
    histories = ([catalog.source_ids[item] for item in catalog.histories.of(user)[-50:]] for user in users)
    return [json.dumps({"history": history, "k": 10}).encode() for history in histories]


@contextlib.contextmanager
def copies(model: str, folder: Path) -> Iterator[dict[str, str]]:
    """Copies of a model: one as it is, one with a flipped byte, and one with all weights zero and right checksums."""
    artifact = open_artifact(model)
    found = {}
    for name in ("same", "corrupt", "degenerate"):
        root = folder / name
        for part in artifact.lineage():
            shutil.copytree(part.home.uri, root / part.home.uri.rpartition("/")[2])
        found[name] = str(root / artifact.home.uri.rpartition("/")[2])
    weights = Path(found["corrupt"]) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 0xFF
    weights.write_bytes(content)
    weights = Path(found["degenerate"]) / "model.safetensors"
    save_file({name: value * 0 for name, value in load_file(weights).items()}, weights)
    path = Path(found["degenerate"]) / "manifest.json"
    manifest = json.loads(path.read_text())
    content = weights.read_bytes()
    manifest["files"]["model.safetensors"] = {"bytes": len(content), "sha256": sha256(content)}
    path.write_text(json.dumps(manifest | {"digest": _digest(manifest)}))
    yield found


async def half_sent(port: int, count: int) -> Counter[str]:
    """Send a header and one byte of a body; return the statuses that come back."""

    async def one() -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        await writer.drain()
        with contextlib.suppress(ConnectionError):
            line = await reader.readline()
            writer.close()
            return line.split()[1].decode() if line else "closed"
        return "reset"

    return Counter(await asyncio.gather(*(one() for _ in range(count))))


async def large_body(port: int, size: int) -> str:
    """Send a body of a given size, as far as it is taken; return the status and the MB that were sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode())
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < size:
            writer.write(b"x" * (1 << 16))
            await writer.drain()
            sent += 1 << 16
    line = b""
    with contextlib.suppress(ConnectionError):
        line = await reader.readline()
    writer.close()
    return f"{line.split()[1].decode() if line else 'closed'} after {sent / 1e6:.1f} MB"


async def measure(service: Service, model: str, options: argparse.Namespace, folder: Path) -> None:
    bodies, url = bodies_of(model), service.url
    print(f"start: {service.start_seconds:.1f} s until it answers")
    async with under_load(url, bodies, options.clients):
        await asyncio.sleep(5)
    for clients in (1, options.clients):
        async with under_load(url, bodies, clients) as load:
            await asyncio.sleep(options.seconds if clients > 1 else min(10, options.seconds))
        print(f"{clients} clients: {load}")
    with copies(model, folder) as other:
        async with under_load(url, bodies, options.clients) as load:
            swaps = [await service.swap(other["same"] if turn % 2 == 0 else "--back") for turn in range(options.swaps)]
        took = ", ".join(f"{json.loads(line)['seconds']}" for code, _, line in swaps if code == 0)
        print(f"{options.swaps} swaps, {sum(code == 0 for code, *_ in swaps)} done ({took} s): {load}")
        for kind in ("corrupt", "degenerate"):
            async with under_load(url, bodies, options.clients) as load:
                code, seconds, line = await service.swap(other[kind])
            print(f"{kind} model, exit code {code} in {seconds:.1f} s: {load}\n    {line}")
    await kill_and_flood(service, bodies, options)


async def kill_and_flood(service: Service, bodies: list[bytes], options: argparse.Namespace) -> None:
    url = service.url
    async with under_load(url, bodies, options.clients) as load:
        await asyncio.sleep(3)
        killed, *others = service.replicas()
        os.kill(killed, signal.SIGKILL)
        begin = time.monotonic()
        await asyncio.sleep(2)
        while len(service.replicas()) < len(others) + 1 and time.monotonic() - begin < 60:
            await asyncio.sleep(0.5)
        await asyncio.sleep(15)
    print(f"one of {len(others) + 1} replicas killed: {load}")
    async with under_load(url, bodies, options.flood) as load:
        await asyncio.sleep(15)
    print(f"overload, {options.flood} clients: {load}")
    async with under_load(url, bodies, options.clients) as load:
        await asyncio.sleep(10)
    print(f"after it, {options.clients} clients: {load}")
    async with under_load(url, bodies, options.clients) as load:
        await asyncio.sleep(1)
        slow, *large = await asyncio.gather(
            half_sent(service.port, 130), *(large_body(service.port, 300_000_000) for _ in range(3))
        )
    print(f"130 half-sent bodies {dict(slow)}, three of 300 MB {large}: {load}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model artifact")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--swaps", type=int, default=10)
    parser.add_argument("--flood", type=int, default=1500, help="clients of the overload")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tl", ignore_cleanup_errors=True) as folder:
        service = Service(options.model, options.replicas, Path(folder))
        try:
            asyncio.run(measure(service, options.model, options, Path(folder)))
        finally:
            service.stop()


if __name__ == "__main__":
    main()
