"""Print how many kB of a tensor of 64 MB lie in huge pages, in a process that has imported what jobs import."""

from pathlib import Path

import tiger.on_ray  # noqa: F401

import torch  # isort: skip

held = torch.ones(64 << 20, dtype=torch.uint8)
lines = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
print(lines["AnonHugePages"].split()[0])
