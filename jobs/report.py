"""`python -m jobs.report ...` is `tiger report ...`, for `ray job submit`."""

import sys

from tiger.cli import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
