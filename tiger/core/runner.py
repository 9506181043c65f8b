"""How work that is cut into independent tasks is run: one after another in this process, or on the nodes of a cluster.

What grows with the data is written against `Runner`. `InProcess` is used for small data and in tests;
`tiger.on_ray.tasks` has the one that lends them a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")


class Runner(Protocol):
    """Runs functions of modules, whose arguments and results can be pickled, and which may run more than once."""

    def map(
        self, function: Callable[..., Result], tasks: Iterable[tuple[Any, ...]], *, what: str, here: bool = False
    ) -> Iterator[Result]:
        """Yield the results of `function(*task)` in the order of the tasks.

        An argument of a task may be a handle that `share` has returned; the function is called with its value.

        Args:
            function: what to run, on one CPU per task.
            tasks: its arguments.
            what: the stage, for messages.
            here: whether the tasks need this machine, because of its files.

        Raises:
            TigerError: raised by a task; the first one in the order of the tasks.
        """

    def share(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return a handle of `function(*arguments)`, a large value that many tasks read; at most one copy per node."""


class InProcess:
    """Runs tasks one after another."""

    def map(
        self, function: Callable[..., Result], tasks: Iterable[tuple[Any, ...]], *, what: str, here: bool = False
    ) -> Iterator[Result]:
        """Yield the results; see `Runner.map`."""
        for task in tasks:
            yield function(*task)

    def share(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return the value itself; see `Runner.share`."""
        return function(*arguments)
