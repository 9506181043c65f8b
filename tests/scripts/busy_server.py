"""Serve one replica that takes one request at a time on PORT, until stdin ends."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import ray
from ray import serve

import tiger.on_ray.serve  # noqa: F401  settles Ray's environment


@serve.deployment(max_ongoing_requests=1)
class Busy:
    """Answers with the number of bytes of the body, after `sleep` seconds."""

    async def __call__(self, request: Any) -> int:
        if request.query_params.get("sleep"):
            await asyncio.sleep(float(request.query_params["sleep"]))
        return len(await request.body())


def main(port: int) -> None:
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 60})
    serve.run(Busy.bind())
    print("ready", flush=True)
    sys.stdin.read()
    serve.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
