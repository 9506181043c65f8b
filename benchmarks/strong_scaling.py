"""Strong scaling by simulation: which stage limits a run on 2, 8 and 32 GPUs, and what the run costs.

    uv run python benchmarks/scale.py sizes=250000x10000000 root=FOLDER
    uv run python benchmarks/strong_scaling.py root=FOLDER [size=250000x10000000] [target=10000000x100000000]
        [gpus=2,8,32] [cores_per_gpu=8] [texts_per_second=5000] [targets_per_second=50000] [epochs=10]
        [batch_size=65536] [parameters=5e6] [gigabytes_per_second=10] [gpu_hour=3]

`scale.py` leaves Ray's timeline of every stage: when each task ran, and for how long. Here the tasks are scheduled
again, in the order in which they began, on other numbers of cores. Where more tasks ran than the machine had cores, a
task counts for its share of them. Tasks that overlapped then may overlap now; what ran between two groups of tasks, on
the driver, takes as long as it did on any number of cores. For a larger catalog there
are proportionally more tasks of the same lengths, and the driver's time grows in proportion, but for the start of Ray:
an upper bound, because a part of it does not depend on the catalog. Evaluation and recommendations are for as many
users as were measured.

Two stages are arithmetic, because no GPU has been measured: text encoding is `texts_per_second` for each GPU; a
training step is `batch_size` targets at `targets_per_second` for each GPU plus a ring all-reduce of `parameters`. The
defaults of these two rates, of the network and of the price (dollars per GPU and hour, its cores included) are
assumptions: give your own.
"""

from __future__ import annotations

import heapq
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scale import STAGES

DEFAULTS = {
    "root": "", "size": "250000x10000000", "target": "10000000x100000000", "gpus": "2,8,32", "cores_per_gpu": "8",
    "texts_per_second": "5000", "targets_per_second": "50000", "epochs": "10", "batch_size": "65536",
    "parameters": "5e6", "gigabytes_per_second": "10", "gpu_hour": "3",
}  # fmt: skip


@dataclass(frozen=True)
class Timeline:
    """The tasks of a stage.

    Attributes:
        groups: seconds of the tasks on a core of their own, in the order of their starts; no task of a group overlapped
            one of the next.
        start: seconds before the first task.
        driver: seconds after it in which no task ran.
    """

    groups: list[list[float]]
    start: float
    driver: float

    @classmethod
    def read(cls, path: Path) -> Timeline:
        """Read what `scale.py` wrote: Ray's events, and when the stage began and ended."""
        written = json.loads(path.read_text("utf-8"))
        begin, end = written["begin"], written["end"]
        # An actor's constructor counts as its start, which is repeated on each core and not divided among them.
        events = [e for e in written["events"] if e["cat"].startswith("task::") and e["name"] != "__init__"]
        tasks = sorted((e["ts"] / 1e6, e["dur"] / 1e6) for e in events)
        if not tasks:
            return cls([], end - begin, 0.0)
        first = last_end = tasks[0][0]
        groups: list[list[float]] = []
        idle = 0.0
        for (at, seconds), work in zip(tasks, core_seconds(tasks, written["cores"]), strict=True):
            if at >= last_end:
                groups.append([])
                idle += at - last_end
            groups[-1].append(work)
            last_end = max(last_end, at + seconds)
        return cls(groups, first - begin, idle + max(0.0, end - last_end))

    def seconds(self, cores: int, growth: float = 1.0) -> float:
        """Return how long the stage takes on a number of cores, with `growth` times the work."""
        total = self.start + self.driver * growth
        for group in self.groups:
            if len(group) == 1:  # one task that does all of it: it grows, and is not divided
                total += group[0] * growth
                continue
            copies = max(1, round(growth * len(group)))
            total += makespan([group[i * len(group) // copies] for i in range(copies)], cores)
        return total

    def serial(self, growth: float = 1.0) -> float:
        """Return the seconds that no number of cores makes fewer."""
        return self.start + (self.driver + sum(group[0] for group in self.groups if len(group) == 1)) * growth


def core_seconds(tasks: list[tuple[float, float]], cores: int) -> list[float]:
    """Return how long each task (start, seconds) had a core, if those that ran at the same time shared all evenly."""
    starts, seconds = np.array(tasks).T
    ends = starts + seconds
    times = np.unique(np.append(starts, ends))
    running = np.searchsorted(np.sort(starts), times, "right") - np.searchsorted(np.sort(ends), times, "right")
    shares = np.minimum(1.0, cores / np.maximum(running[:-1], 1))
    spent = np.append(0.0, np.cumsum(shares * np.diff(times)))
    found: list[float] = (np.interp(ends, times, spent) - np.interp(starts, times, spent)).tolist()
    return found


def makespan(seconds: list[float], cores: int) -> float:
    """Return when the last task ends if each is given, in order, to the core that is free first."""
    free = [0.0] * min(cores, len(seconds))
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def step_seconds(settings: dict[str, float], gpus: int) -> tuple[float, float]:
    """Return the seconds of computing and of summing gradients, of one training step."""
    computing = settings["batch_size"] / (gpus * settings["targets_per_second"])
    sent = 2 * (gpus - 1) / gpus * 4 * settings["parameters"]
    return computing, sent / (settings["gigabytes_per_second"] * 1e9)


def main() -> None:
    texts = DEFAULTS | dict(argument.split("=", 1) for argument in sys.argv[1:])
    items, events = map(int, texts["size"].split("x"))
    more_items, more_events = map(int, texts["target"].split("x"))
    root = Path(texts["root"]) / f"runs-{events}-{items}"
    rates = {key: float(texts[key]) for key in DEFAULTS if key not in ("root", "size", "target", "gpus")}
    gpus, per_gpu = list(map(int, texts["gpus"].split(","))), int(rates["cores_per_gpu"])
    timelines = {stage: Timeline.read(root / f"timeline-{stage}.json") for stage in STAGES}

    print(f"The measured run, {texts['size']}: seconds on more cores, by simulation\n")
    cores = (1, 2, 4, 16, 64, 256)
    print("| stage | tasks | " + " | ".join(f"{n} cores" for n in cores) + " | indivisible |\n" + "|---" * 9 + "|")
    for stage, line in timelines.items():
        row = " | ".join(f"{line.seconds(n):.0f}" for n in cores)
        print(f"| {stage} | {sum(map(len, line.groups))} | {row} | {line.serial():.0f} |")

    print(f"\n{texts['target']} on GPUs with {per_gpu} cores each: seconds; * marks the stage that limits\n")
    print("| stage | " + " | ".join(f"{n} GPUs" for n in gpus) + " |\n" + "|---" * (len(gpus) + 1) + "|")
    table: dict[str, list[float]] = {}
    for stage, line in timelines.items():
        growth = more_items / items
        if stage in ("prepare", "item_vectors"):
            growth = more_events / events
        elif stage in ("evaluate", "recommend"):
            growth = 1.0
        if stage == "embed":
            table[stage] = [line.start + more_items / (n * rates["texts_per_second"]) for n in gpus]
        elif stage == "train":
            steps = rates["epochs"] * more_events / rates["batch_size"]
            table[stage] = [line.start + steps * sum(step_seconds(rates, n)) for n in gpus]
        else:
            table[stage] = [line.seconds(n * per_gpu, growth) for n in gpus]
    longest = [max(column) for column in zip(*table.values(), strict=True)]
    for stage, row in table.items():
        cells = (f"{value:,.0f}{'*' * (value == top)}" for value, top in zip(row, longest, strict=True))
        print(f"| {stage} | " + " | ".join(cells) + " |")
    totals = [sum(column) for column in zip(*table.values(), strict=True)]
    print("| all | " + " | ".join(f"{total:,.0f}" for total in totals) + " |")
    costs = (total / 3600 * n * rates["gpu_hour"] for total, n in zip(totals, gpus, strict=True))
    print("| dollars | " + " | ".join(f"{cost:,.0f}" for cost in costs) + " |")
    for n in gpus:
        computing, summing = step_seconds(rates, n)
        print(f"a step on {n} GPUs: {computing * 1e3:.1f} ms of computing, {summing * 1e3:.1f} ms of summing gradients")


if __name__ == "__main__":
    main()
