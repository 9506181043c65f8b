"""Many requests to a storage at a time: one takes milliseconds on a disk, a tenth of a second on an object store."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = 16


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], ahead: int = 2 * THREADS) -> Iterator[Result]:
    """Yield `function(item)` of all items in their order, computing the next ones in threads.

    Args:
        function: mostly waits for a storage, or releases the lock of the interpreter.
        items: its arguments.
        ahead: maximum number of results that are computed and not taken yet.
    """
    pool = ThreadPoolExecutor(THREADS, "storage")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
