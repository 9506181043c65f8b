"""Download URL to the cache in FOLDER, and print the number of bytes."""

from __future__ import annotations

import sys
from pathlib import Path

from tiger.data.download import download

if __name__ == "__main__":
    print(len(download(sys.argv[1], Path(sys.argv[2]), pause=0.01).read_bytes()))
