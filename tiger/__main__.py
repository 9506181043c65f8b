"""`python -m tiger` is `tiger`."""

from tiger.cli import main

main()
