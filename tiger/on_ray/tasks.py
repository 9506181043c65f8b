"""Independent tasks on the nodes of a cluster: `Runner` on Ray.

Tasks are plain Ray tasks of one CPU: one that loses its process or node runs again elsewhere, which changes nothing,
because a task writes only files of its own. Results are taken in the order of the tasks, and only so many tasks are
started ahead, that the driver never holds more than a window of results.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import ray
import ray.exceptions
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tiger.core.errors import ResourceError, TigerError
from tiger.core.storage import Folder
from tiger.on_ray import cluster
from tiger.on_ray.capacity import ANSWER_SECONDS, on_node
from tiger.on_ray.failures import reason
from tiger.on_ray.watch import watching

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_RETRIES = 5  # of a task that loses its process or node
_AHEAD = 4  # tasks per CPU that are started before the first of their results is taken
_MIN_AHEAD = 16  # also those that make an autoscaler add nodes


class RayTasks:
    """Runs tasks on the cluster that this process has joined; see `Runner`."""

    def __init__(self, storage: Folder) -> None:
        """Join a cluster, or start a local one.

        Args:
            storage: a folder that all tasks read and write.

        Raises:
            ResourceError: see `cluster.connect`.
        """
        self.storage = storage
        cluster.connect(storage)

    def map(
        self, function: Callable[..., Result], tasks: Iterable[tuple[Any, ...]], *, what: str, here: bool = False
    ) -> Iterator[Result]:
        """Yield the results of `function(*task)` in the order of the tasks; see `Runner.map`."""
        options: dict[str, Any] = {"num_cpus": 1, "max_retries": _RETRIES}
        if here:  # this node may have no CPU for tasks
            node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            options |= {"num_cpus": 0, "scheduling_strategy": node}
        run = ray.remote(_run).options(name=what, **options)
        remaining, running = iter(tasks), deque[Any]()
        said: set[str] = set()
        with watching(what, "raylet.out", details=lambda: f"{len(running)} tasks", storage=self.storage) as watch:
            while True:
                while len(running) < (cluster.cores() if here else self._window()):
                    task = next(remaining, None)
                    if task is None:
                        break
                    running.append(run.remote(function, *task))
                if not running:
                    return
                lines, error, result = self._take(running.popleft(), what)
                watch.progress()
                for level, name, message in lines:
                    if message not in said:
                        said.add(message)
                        logging.getLogger(name).log(level, "%s", message)
                if error is not None:
                    for other in running:
                        ray.cancel(other, recursive=False)
                    raise TigerError.from_record(json.loads(error))
                yield result

    def share(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return a reference to the value in Ray's object store, which this process does not hold."""
        return ray.remote(function).options(num_cpus=1, max_retries=_RETRIES).remote(*arguments)

    def _window(self) -> int:
        return max(_MIN_AHEAD, int(_AHEAD * ray.cluster_resources().get("CPU", 1)))

    def _take(self, result: Any, what: str) -> Any:
        try:
            return ray.get(result)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, TigerError):
                raise error.cause from None
            raise
        except ray.exceptions.OutOfMemoryError as error:
            raise ResourceError(f"{what}: {reason(error)}") from error
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.ObjectLostError) as error:
            raise ResourceError(f"{what}: a task was lost {_RETRIES + 1} times: {reason(error)}") from error


def _run(function: Callable[..., Any], *arguments: Any) -> tuple[list[tuple[int, str, str]], str | None, Any]:
    """Call a function; return its log lines, its TigerError as JSON, and its result.

    An error is a value because Ray flattens exceptions to text.
    """
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    lines = _Lines()
    logger = logging.getLogger("tiger")
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    try:
        return lines.records, None, function(*arguments)
    except TigerError as error:
        return lines.records, json.dumps(error.to_record()), None
    finally:
        logger.removeHandler(lines)


class _Lines(logging.Handler):
    """Keeps log records for the driver."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[tuple[int, str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one record."""
        self.records.append((record.levelno, record.name, record.getMessage()))


def seen_by_all_nodes(paths: Iterable[str]) -> bool:
    """Return whether every node sees these local files, with the sizes that they have here."""
    own = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != own]
    if not others:
        return True
    paths = list(paths)
    answers = [on_node(node, _sizes).remote(paths) for node in others]
    try:
        return all(sizes == _sizes(paths) for sizes in ray.get(answers, timeout=ANSWER_SECONDS))
    except ray.exceptions.RayError:
        return False


def _sizes(paths: list[str]) -> list[int]:
    return [Path(path).stat().st_size if Path(path).is_file() else -1 for path in paths]
