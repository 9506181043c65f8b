"""Where a training step's time goes: stages, kernels, and the share of what the device's matrix products can do.

    uv run python benchmarks/step_profile.py [preset=small] [batch=1024] [steps=30] [device=cuda] [data.path=FOLDER]

Both modes, in float32 and, where the hardware has it, in bfloat16. Stages are timed with the device waited for after
each; the whole step is timed without waiting, so the difference is what overlaps. Work is counted by PyTorch's
FlopCounterMode over forward and backward; the limit is a product of two square matrices of 4,096 (2,048 on a CPU) of
the same precision. On a GPU the share of the time in which kernels run is given as well, from torch.profiler.
Histories are those of Beauty where the files are given, else of the sample; IDs are random, which changes no speed.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from train_speed import histories, random_ids

from tiger.config import build
from tiger.examples import Examples, Sequences
from tiger.model import GenerativeRecommender, ModelConfig
from tiger.semantic_ids import SemanticIds
from tiger.training import use_bfloat16

KERNELS = 8


class Step:
    """One model with its batches; a step in stages that can be timed."""

    def __init__(self, config: ModelConfig, data: Sequences | Examples, ids: SemanticIds, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = GenerativeRecommender(config, ids.level_sizes).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.device, self.seconds = device, defaultdict[str, float](float)
        self.rows, self.collate = cycle(data.order(0, 0, config.training.batch_size)), data.collate

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
        with self.stage("collate", timed):
            inputs = self.collate(next(self.rows))
            targets = int(inputs[1].sum()) if self.model.fast else len(inputs[0])  # on the CPU: no wait for the device
        with self.stage("copy", timed):
            inputs = tuple(tensor.to(self.device, non_blocking=True) for tensor in inputs)
        with self.stage("forward", timed):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
                losses = self.model(*inputs)
            loss = losses.sum() / targets
        with self.stage("backward", timed):
            loss.backward()
        with self.stage("clip", timed):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        with self.stage("optimizer", timed):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return targets


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
    for mode in ("faithful", "fast"):
        config = build(ModelConfig, {"preset": preset, "mode": mode, "training": {"batch_size": batch}})
        data = Sequences(past, ids, config.max_items) if mode == "fast" else Examples(past, ids, config.max_items, 0)
        for precision in [torch.float32, *([torch.bfloat16] if use_bfloat16("auto", device) else [])]:
            report(Step(config, data, ids, device), mode, precision, count)


def report(step: Step, mode: str, precision: torch.dtype, count: int) -> None:
    for _ in range(3):
        step.run(precision)
    step.wait()
    begin = time.perf_counter()
    targets = sum(step.run(precision) for _ in range(count))
    step.wait()
    seconds = time.perf_counter() - begin
    for _ in range(count):
        step.run(precision, timed=True)
    with FlopCounterMode(display=False) as counter:
        for _ in range(count):
            step.run(precision)
    limit, work = matrix_limit(precision, step.device), counter.get_total_flops() / seconds
    share, kernels = busy_share(lambda: step.run(precision), step.device, min(count, 10))
    print(f"\n{mode}, {str(precision).removeprefix('torch.')}: {targets / seconds:,.0f} targets/s", end=", ")
    print(f"{seconds / count * 1e3:.1f} ms a step; {work / 1e9:,.1f} of {limit / 1e9:,.1f} GFLOP/s", end=", ")
    print(f"{work / limit:.1%} of the limit; busy {share:.0%}")
    waited = sum(step.seconds.values())
    print("  stages: " + ", ".join(f"{name} {value / waited:.0%}" for name, value in step.seconds.items()))
    print("  operators: " + ", ".join(f"{name.removeprefix('aten::')} {value:.0%}" for name, value in kernels))


if __name__ == "__main__":
    main()
