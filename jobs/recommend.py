"""`python -m jobs.recommend ...` is `tiger recommend ...`, for `ray job submit`."""

import sys

from tiger.cli import main

if __name__ == "__main__":
    main(["recommend", *sys.argv[1:]])
