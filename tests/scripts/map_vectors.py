"""Map the vectors of a folder; print their sum, and whether this process has written the mapped file."""

from __future__ import annotations

import json
import sys

from tiger.core import node_cache
from tiger.core.storage import Folder
from tiger.embedding import vectors

if __name__ == "__main__":
    node_cache.MAPPED_BYTES = 0
    read = []
    original = vectors.vector_shards
    vectors.vector_shards = lambda folder: read.append(1) or original(folder)
    total = float(vectors.map_embeddings(Folder(sys.argv[1])).double().sum())
    print(json.dumps([total, bool(read)]))
