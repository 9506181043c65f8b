"""`python -m jobs.evaluate ...` is `tiger evaluate ...`, for `ray job submit`."""

import sys

from tiger.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
