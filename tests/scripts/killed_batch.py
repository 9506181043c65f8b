"""Recommend to the users of a file in FOLDER, and end by a kill when some of their lists are written."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from tests.batches_of_users import recommend_slowly


def kill_in_the_middle(runs: Path) -> None:
    """End this process as soon as three parts are there."""
    while len(list(runs.glob("recommendations-*/recommendations/*.parquet"))) < 3:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    threading.Thread(target=kill_in_the_middle, args=(folder / "runs",), daemon=True).start()
    recommend_slowly(folder)
