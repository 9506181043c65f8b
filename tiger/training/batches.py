"""Batches of a training: a worker's shard of a global batch, and its way to the device."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from tiger.training.distributed import rank, world_size

T = TypeVar("T")

_PREFETCHED = 2  # batches


@dataclass(frozen=True)
class Batch:
    """One worker's shard of a global batch.

    Attributes:
        inputs: arguments of the module's forward, which returns one loss per row, or several parts of it.
        weights: float32 [rows]; 0 for the padding row of a shard that would be empty.
        total_weight: sum of the weights over all workers.
    """

    inputs: tuple[Tensor, ...]
    weights: Tensor
    total_weight: float

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return a batch of `change(tensor)` for every tensor."""
        return replace(self, inputs=tuple(change(tensor) for tensor in self.inputs), weights=change(self.weights))


def share(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return this worker's rows of a global batch, and their weights; every row belongs to exactly one worker.

    Empty shards are padded with the first row at weight 0, so that every rank joins the collective operations.
    """
    own = rows[rank() :: world_size()]
    return (own, torch.ones(len(own))) if len(own) else (rows[:1], torch.zeros(1))


def prefetch(
    items: Iterator[T], ahead: int = _PREFETCHED, begin: Callable[[], None] | None = None
) -> Generator[T, None, None]:
    """Yield all items in order, computing the next ones in a background thread.

    An exception of `items` is raised here, at its position. Closing this generator ends the thread.

    Args:
        items: the items.
        ahead: maximum number of items computed in advance.
        begin: called once, in the thread.
    """
    end = object()
    executor = ThreadPoolExecutor(1, "prefetch", initializer=begin)
    try:
        coming = deque(executor.submit(next, items, end) for _ in range(ahead))
        while (item := coming.popleft().result()) is not end:
            coming.append(executor.submit(next, items, end))
            yield item  # type: ignore[misc]  # not `end`
    finally:
        executor.shutdown(cancel_futures=True)


def on_device(batches: Iterator[Batch], device: torch.device) -> Generator[Batch, None, None]:
    """Yield batches with their tensors on the device.

    For a GPU, a background thread prepares the next two in pinned memory during a step, and copies are asynchronous.
    """
    if device.type != "cuda":
        yield from (batch.map(lambda tensor: tensor.to(device)) for batch in batches)
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    pinned = (batch.map(Tensor.pin_memory) for batch in batches)
    # A new thread uses GPU 0: pinning there would create another context on it, for every worker of the node.
    with contextlib.closing(prefetch(pinned, begin=lambda: torch.cuda.set_device(index))) as ready:
        for batch in ready:
            yield batch.map(lambda tensor: tensor.to(device, non_blocking=True))
