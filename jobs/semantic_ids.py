"""`python -m jobs.semantic_ids ...` is `tiger semantic_ids ...`, for `ray job submit`."""

import sys

from tiger.cli import main

if __name__ == "__main__":
    main(["semantic_ids", *sys.argv[1:]])
