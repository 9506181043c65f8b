"""`python -m jobs.prepare ...` is `tiger prepare ...`, for `ray job submit`."""

import sys

from tiger.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
