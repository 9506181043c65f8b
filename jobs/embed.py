"""`python -m jobs.embed ...` is `tiger embed ...`, for `ray job submit`."""

import sys

from tiger.cli import main

if __name__ == "__main__":
    main(["embed", *sys.argv[1:]])
