"""`python -m jobs.train ...` is `tiger train ...`, for `ray job submit`."""

import sys

from tiger.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
