"""Where a training step's time goes: stages, kernels, and the share of what the device's matrix products can do.

    uv run python benchmarks/step_profile.py [preset=small] [batch=1024] [steps=30] [device=cuda] [threads=1]
        [data.path=FOLDER]

The default and TIGER as published, in float32 (TensorFloat-32 on a GPU) and, where the hardware has it, in bfloat16,
with the measured ratio that decides `precision = "auto"`. Stages are timed with the device waited for after each; the
whole step is timed as in training, without waiting and with batches from `training.on_device` (pinned and made in a
thread for a GPU), so the difference is what overlaps. Work is counted by PyTorch's FlopCounterMode over forward and
backward; the limit is a product of two square matrices of 4,096 (2,048 on a CPU) of the same precision. On a GPU the
share of the time in which kernels run is given as well, from torch.profiler, and how often a step waits for the
device (should be 0). Histories are those of Beauty where the files are given, else of the sample; IDs are random,
which changes no speed.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import cycle, islice
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from train_speed import KINDS, histories, random_ids, text_embeddings

from tiger.core.config import build
from tiger.core.precision import allow_tf32, has_bfloat16, node_speedup
from tiger.data.histories import Histories
from tiger.models.tiger.batches import make_examples
from tiger.models.tiger.config import TigerConfig
from tiger.models.tiger.model import TigerModel
from tiger.models.tiger.train import model_shapes
from tiger.semantic_ids.assignment import SemanticIds
from tiger.semantic_ids.trie import Trie
from tiger.training.loop import Batch, on_device

KERNELS = 8


class Step:
    """One model with its batches; a step in stages that can be timed."""

    def __init__(self, config: TigerConfig, past: Histories, ids: SemanticIds, device: torch.device) -> None:
        torch.manual_seed(0)
        model = TigerModel(config, Trie(ids), text_embeddings(len(ids)))
        known = model.set_training_counts(torch.from_numpy(past.training_counts(len(ids))))
        data, self.model = make_examples(past, config, Trie(ids), known), model.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.device, self.seconds = device, defaultdict[str, float](float)
        self.rows, self.collate = cycle(data.order(0, 0, config.training.batch_size)), data.collate
        self.made = self.batches()
        self.shapes = model_shapes(config, self.model)

    def batches(self) -> Iterator[Batch]:
        for rows in self.rows:
            inputs = self.collate(rows)
            targets = (
                int(inputs[1].sum()) if self.model.encoder.causal else len(inputs[0])
            )  # on the CPU: no wait for the device
            yield Batch(inputs, torch.ones(len(inputs[0])), float(targets))

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def stage(self, name: str, timed: bool) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if timed:
            self.wait()
            self.seconds[name] += time.perf_counter() - begin

    def run(self, precision: torch.dtype, timed: bool = False) -> int:
        """Make a batch and train on it; return its number of targets."""
        with self.stage("collate", timed):
            batch = next(self.made)
        with self.stage("copy", timed):
            batch = batch.map(lambda tensor: tensor.to(self.device))
        return self.train(batch, precision, timed)

    def train(self, batch: Batch, precision: torch.dtype, timed: bool = False) -> int:
        """Train on a batch that is on the device; return its number of targets."""
        with self.stage("forward", timed):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
                losses = self.model(*batch.inputs)
            loss = (losses.float().sum(1) * batch.weights).sum() / batch.total_weight
        with self.stage("backward", timed):
            loss.backward()
        with self.stage("clip", timed):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        with self.stage("optimizer", timed):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return int(batch.total_weight)


def matrix_limit(precision: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of one large matrix product."""
    size = 4096 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=precision) for _ in range(2))
    repeats = 50 if device.type == "cuda" else 5

    def products(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    products(3)
    return 2 * size**3 * repeats / products(repeats)


def busy_share(step: Callable[[], Any], device: torch.device, count: int) -> tuple[float, list[tuple[str, float]]]:
    """Share of the wall time in which a kernel runs (on a CPU: in operators), and the operators that take most."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    begin = time.perf_counter()
    with profile(activities=activities) as profiled:
        for _ in range(count):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    wall = (time.perf_counter() - begin) * 1e6
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = sorted(((e.key, float(getattr(e, own))) for e in profiled.key_averages()), key=lambda pair: -pair[1])
    total = sum(value for _, value in times)
    return total / wall, [(name, value / total) for name, value in islice(times, KERNELS)]


def waits(step: Callable[[], Any]) -> int | None:
    """Return how often the host waits for the GPU in a step; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def main() -> None:
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
    device = torch.device(settings.pop("device", "cuda" if torch.cuda.is_available() else "cpu"))
    preset, batch = settings.pop("preset", "small"), int(settings.pop("batch", "1024"))
    count = int(settings.pop("steps", "30"))
    if "threads" in settings:
        torch.set_num_threads(int(settings.pop("threads")))
    past, n_items = histories([f"{key}={value}" for key, value in settings.items()])
    ids = random_ids(n_items)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; preset {preset}, {batch} targets a batch, {count} steps")
    allow_tf32(device)
    on_gpu = device.type == "cuda"
    native = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else has_bfloat16()
    for kind, changes in KINDS.items():
        config = build(TigerConfig, {"preset": preset, "training": {"batch_size": batch}} | changes)
        speeds = [
            report(Step(config, past, ids, device), kind, precision, count)
            for precision in [torch.float32, *([torch.bfloat16] if native else [])]
        ]
        if native:
            print(f"  bfloat16 is {speeds[1] / speeds[0]:.2f} times as fast as float32", end="")
            predicted = "" if on_gpu else f"; auto measured {node_speedup(Step(config, past, ids, device).shapes):.2f}"
            print(predicted)


def report(step: Step, kind: str, precision: torch.dtype, count: int) -> float:
    """Print one line of speeds and where the time goes; return the targets per second."""
    with closing(on_device(step.batches(), step.device)) as ready:
        for _ in range(3):
            step.train(next(ready), precision)
        step.wait()
        begin = time.perf_counter()
        targets = sum(step.train(next(ready), precision) for _ in range(count))
        step.wait()
        seconds = time.perf_counter() - begin
        waited_for = waits(lambda: step.train(next(ready), precision))
    for _ in range(count):
        step.run(precision, timed=True)
    with FlopCounterMode(display=False) as counter:
        for _ in range(count):
            step.run(precision)
    limit, work = matrix_limit(precision, step.device), counter.get_total_flops() / seconds
    share, kernels = busy_share(lambda: step.run(precision), step.device, min(count, 10))
    print(f"\n{kind}, {str(precision).removeprefix('torch.')}: {targets / seconds:,.0f} targets/s", end=", ")
    print(f"{seconds / count * 1e3:.1f} ms a step; {work / 1e9:,.1f} of {limit / 1e9:,.1f} GFLOP/s", end=", ")
    print(f"{work / limit:.1%} of the limit; busy {share:.0%}", end="")
    print("" if waited_for is None else f"; {waited_for} waits for the device in a step")
    waited = sum(step.seconds.values())
    print("  stages: " + ", ".join(f"{name} {value / waited:.0%}" for name, value in step.seconds.items()))
    print("  operators: " + ", ".join(f"{name.removeprefix('aten::')} {value:.0%}" for name, value in kernels))
    return targets / seconds


if __name__ == "__main__":
    main()
