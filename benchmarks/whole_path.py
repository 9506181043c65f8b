"""From raw files to the trie at two sizes: seconds, rows a second and peak memory of every stage, and how each grows.

    uv run python benchmarks/whole_path.py [sizes=25000,250000] [root=FOLDER] [key=value of the configuration ...]

Generated shops of so many items and half as many users; texts are cut after 8 tokens and the tokenizer has two epochs,
so that two cores are done within the hour. Every stage runs in a process of its own, by its job. `driver`
is the job's own memory, `largest worker` that of the greatest of Ray's worker processes (encoder, trainer), both
without what they map from files or share; `store` is what Ray's object store holds, all at their peaks, in GB. `at
half` is the driver's and the store's together when half of the stage's time was over: a stage whose memory grows with
its work would end far above it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiger.core.artifacts import open_artifact
from tiger.semantic_ids.assignment import SemanticIds
from tiger.semantic_ids.trie import Trie

STAGES = ("prepare", "embed", "tokenizer", "semantic IDs", "trie")
SETTINGS = [
    "catalog.k_core=0",
    "embedding.max_tokens=8",
    "tokenizer.training.epochs=2",
    "tokenizer.training.validate_every_epochs=1",
]
_SAMPLE_SECONDS = 0.5


def memory(pid: int, kinds: tuple[str, ...]) -> float:
    """GB of these kinds (`RssAnon`, `RssShmem`) that a process holds; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(found[1]) for kind in kinds if (found := re.search(rf"{kind}:\s+(\d+) kB", status))) / 2**20


def family(pid: int) -> dict[int, str]:
    """{process: its name} of a process and all that it started."""
    parents, names = {}, {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, rest = entry.read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        own = int(entry.parent.name)
        parents[own], names[own] = int(rest.split()[1]), head.partition("(")[2]
    found, before = {pid}, set[int]()
    while found != before:
        before = set(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return {process: names.get(process, "") for process in found}


def watched(command: list[str]) -> dict[str, Any]:
    """Runs a command; its last line of output, its seconds, and the memory of the processes it started."""
    begin = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    samples: list[tuple[float, float, float]] = []
    while process.poll() is None:
        processes = family(process.pid)
        workers = [pid for pid, name in processes.items() if name.startswith("ray::")]
        stores = [memory(pid, ("RssShmem",)) for pid, name in processes.items() if name == "raylet"]
        greatest = max([memory(pid, ("RssAnon",)) for pid in workers], default=0.0)
        samples.append((memory(process.pid, ("RssAnon",)), greatest, max(stores, default=0.0)))
        time.sleep(_SAMPLE_SECONDS)
    assert process.stdout is not None
    output = process.stdout.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with exit code {process.returncode}")
    driver, worker, store = (max(values) for values in zip(*samples, strict=True))
    half = samples[len(samples) // 2]
    seconds = time.monotonic() - begin
    last = output.splitlines()[-1] if output else "{}"
    return {
        "driver": driver,
        "worker": worker,
        "store": store,
        "half": half[0] + half[2],
        "seconds": seconds,
        "last": last,
    }


def trie_of(folder: str) -> None:
    """What stands for the job that a trie does not have: a recommender makes it when it starts."""
    Trie(SemanticIds.read(open_artifact(folder).folder))


def measure(items: int, root: str, overrides: list[str]) -> dict[str, dict[str, Any]]:
    given = [f"data.items={items}", f"data.users={items // 2}", f"root={root}", *SETTINGS, *overrides]
    job: Callable[[str], list[str]] = lambda name: [sys.executable, "-m", f"jobs.{name}", "sample", *given]  # noqa: E731
    found = {"prepare": watched(job("prepare")), "embed": watched(job("embed"))}
    both = watched(job("semantic_ids"))
    figures = json.loads(both["last"])
    ids = open_artifact(figures["artifact"])
    seconds = {part.kind: part.manifest["seconds"] for part in ids.lineage()}
    found["tokenizer"] = both | {"seconds": seconds["tokenizer"]}
    found["semantic IDs"] = both | {"seconds": seconds["semantic_ids"]}
    found["trie"] = watched([sys.executable, __file__, f"trie={ids.folder.uri}"])
    return {stage: row | {"items": figures["items"]} for stage, row in found.items()}


def main() -> None:
    arguments = dict(argument.split("=", 1) for argument in sys.argv[1:])
    if "trie" in arguments:
        return trie_of(arguments["trie"])
    sizes = [int(size) for size in arguments.pop("sizes", "25000,250000").split(",")]
    overrides = [f"{key}={value}" for key, value in arguments.items() if key != "root"]
    with tempfile.TemporaryDirectory(prefix="whole_path") as folder:
        root = arguments.get("root", folder)
        os.environ.setdefault("TIGER_CACHE", f"{root}/cache")
        runs = {}
        for size in sizes:
            runs[size] = measure(size, root, overrides)
            print(f"\n{runs[size]['trie']['items']:,} items\n")
            print("| stage | seconds | items/s | driver | largest worker | store | at half |")
            print("|---|---|---|---|---|---|---|")
            for stage in STAGES:
                row = runs[size][stage]
                print(
                    f"| {stage} | {row['seconds']:.1f} | {row['items'] / row['seconds']:,.0f} | {row['driver']:.2f} | "
                    f"{row['worker']:.2f} | {row['store']:.2f} | {row['half']:.2f} |",
                    flush=True,
                )
        if len(sizes) > 1:
            small, large = sizes[0], sizes[-1]
            print(
                f"\nfrom {small:,} to {large:,} items, x {large / small:g}: times the seconds, times driver and store\n"
            )
            for stage in STAGES:
                one, other = runs[small][stage], runs[large][stage]
                held = [row["driver"] + row["store"] for row in (one, other)]
                print(f"{stage:<14}x {other['seconds'] / one['seconds']:6.1f}   x {held[1] / max(held[0], 1e-9):5.1f}")
    return None


if __name__ == "__main__":
    main()
