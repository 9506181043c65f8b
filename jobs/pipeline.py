"""`python -m jobs.pipeline ...` is `tiger pipeline ...`, for `ray job submit`."""

import sys

from tiger.cli import main

if __name__ == "__main__":
    main(["pipeline", *sys.argv[1:]])
