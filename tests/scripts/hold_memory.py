"""Hold as many bytes as the first argument says until stdin ends."""

import sys

held = bytearray(b"1" * int(sys.argv[1]))
print("ready", flush=True)
sys.stdin.read()
