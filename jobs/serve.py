"""`python -m jobs.serve ...` is `tiger serve ...`, for `ray job submit`."""

import sys

from tiger.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
