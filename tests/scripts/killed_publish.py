"""Publish an artifact to ROOT, and end by a kill before its last file but the manifest is written."""

from __future__ import annotations

import os
import signal
import sys

from tests.publishing import publish_as
from tiger.core.storage import Folder

write_json = Folder.write_json


def write_or_die(folder: Folder, name: str, value: object) -> None:
    if name == "notes.json":
        os.kill(os.getpid(), signal.SIGKILL)
    write_json(folder, name, value)


if __name__ == "__main__":
    Folder.write_json = write_or_die
    publish_as(sys.argv[1], "A")
