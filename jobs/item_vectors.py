"""`python -m jobs.item_vectors ...` is `tiger item_vectors ...`, for `ray job submit`."""

import sys

from tiger.cli import main

if __name__ == "__main__":
    main(["item_vectors", *sys.argv[1:]])
