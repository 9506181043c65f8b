"""`python -m jobs.tune ...` is `tiger tune ...`, for `ray job submit`."""

import sys

from tiger.cli import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
