"""Join the cluster that the environment names, or the head of this machine, and print its nodes."""

from __future__ import annotations

from tiger.core import logs
from tiger.core.errors import ResourceError
from tiger.on_ray import cluster

if __name__ == "__main__":
    logs.configure_console()
    try:
        cluster.connect()
        print(cluster.shape())
    except ResourceError as error:
        print("error:", error)
