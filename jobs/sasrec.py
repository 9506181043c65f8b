"""`python -m jobs.sasrec ...` is `tiger sasrec ...`, for `ray job submit`."""

import sys

from tiger.cli import main

if __name__ == "__main__":
    main(["sasrec", *sys.argv[1:]])
