"""Batches that a thread prepares ahead: order, errors, an early stop, pinned memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch

from tests.trainings import toy_examples
from tiger.core.errors import HealthError
from tiger.training import loop as training
from tiger.training.loop import prefetch

pytestmark = pytest.mark.usefixtures("one_thread")

# --- prefetching ------------------------------------------------------------------------------------------------


def prefetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetched_items_come_in_order_from_one_thread_that_ends() -> None:
    names, begun = set(), []

    def items() -> Iterator[int]:
        for item in range(50):
            names.add(threading.current_thread().name)
            yield item

    assert list(prefetch(items(), begin=lambda: begun.append(1))) == list(range(50))
    assert list(prefetch(iter([]))) == []
    assert len(names) == 1
    assert names != {threading.current_thread().name}
    assert begun == [1]
    assert not prefetching()


def test_an_exception_of_the_thread_reaches_the_caller_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise HealthError("torn")

    found = []
    with pytest.raises(HealthError, match="torn"):
        found.extend(prefetch(items()))  # extends by what came before
    with pytest.raises(HealthError, match="torn"):
        for item in prefetch(items()):
            found.append(item)  # noqa: PERF402
    assert found[-2:] == [1, 2]
    assert not prefetching()


def test_stopping_early_ends_the_thread_and_no_item_too_many_is_made() -> None:
    made = []

    def items() -> Iterator[int]:
        for item in range(1000):
            made.append(item)
            yield item

    with closing(prefetch(items(), ahead=2)) as coming:
        assert next(coming) == 0
        assert next(coming) == 1
    assert not prefetching()
    assert len(made) <= 4


def test_on_a_gpu_batches_are_pinned_in_the_thread_and_copied_without_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the calls of CUDA replaced: pinning in the thread, on this worker's GPU; the order stays."""
    examples, _ = toy_examples()
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: calls.append(("set_device", index)))
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda self: (calls.append(threading.current_thread().name), self.clone())[1]
    )
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, device, non_blocking=False: (calls.append((device, non_blocking)), self)[1]
    )
    ready = list(training.on_device(examples.batches(0, 0, 16), torch.device("cuda", 3)))
    monkeypatch.undo()
    expected = list(examples.batches(0, 0, 16))
    assert len(ready) == len(expected) > 3
    for one, other in zip(ready, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.inputs, other.inputs, strict=True))
        assert torch.equal(one.weights, other.weights)
    assert calls[0] == ("set_device", 3)
    tensors = sum(len(batch.inputs) + 1 for batch in ready)  # and the weights
    assert sum(isinstance(call, str) and call.startswith("prefetch") for call in calls) == tensors
    assert calls.count((torch.device("cuda", 3), True)) == tensors
