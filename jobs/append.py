"""`python -m jobs.append ...` is `tiger append ...`, for `ray job submit`."""

import sys

from tiger.cli import main

if __name__ == "__main__":
    main(["append", *sys.argv[1:]])
