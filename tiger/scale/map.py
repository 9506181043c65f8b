"""A table through a pool of actors into another table: streamed, counted, restartable.

The unit is a row group of the source, a *part*. Parts are read by tasks, computed by actors that hold what is expensive
to load (a model), and written by tasks, each under the part's own name and as a whole. So a part is there or it is not;
a run after a kill does the missing ones; nothing is ever written twice; and the result does not depend on how many
actors there were, or which of them was lost.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data

from tiger import errors, tracking
from tiger.artifacts import Folder
from tiger.progress import Progress
from tiger.scale import cluster

log = logging.getLogger(__name__)

_TASK_CPUS = 0.25  # reading and writing mostly wait
_PART, _ERROR = "__part__", "__error__"  # columns of ours beside the worker's


class Worker(Protocol):
    """What an actor runs: built once, then called with one part after another."""

    def __call__(self, part: pa.Table) -> pa.Table: ...


@dataclass(frozen=True)
class Actors:
    """How many actors, and what each one has; None leaves it to the cluster's resources."""

    minimum: int = 1
    maximum: int | None = None
    cpus: float = 1
    gpus: float | None = None

    def resolve(self) -> tuple[int, int, dict[str, float]]:
        """Least and most actors, and the resources of one, checked against the cluster."""
        gpus = self.gpus if self.gpus is not None else float(cluster.cluster_gpus() > 0)
        if gpus:
            fitting = int(cluster.cluster_gpus() / gpus)
            each = {"num_gpus": gpus}
            cluster.require(_TASK_CPUS, gpus * self.minimum, f"a pool of {self.minimum} GPU actors")
        else:
            fitting = int(max(1, cluster.cluster_cpus() - cluster.RESERVED_CPUS) // self.cpus)
            each = {"num_cpus": self.cpus}
            cluster.require(self.cpus * self.minimum + 2 * _TASK_CPUS, 0, f"a pool of {self.minimum} actors")
        maximum = max(1, fitting) if self.maximum is None else min(self.maximum, max(1, fitting))
        return min(self.minimum, maximum), maximum, each


def map_table(
    source: Folder,
    name: str,
    columns: list[str],
    target: Folder,
    worker: Callable[..., Worker],
    arguments: dict[str, Any],
    *,
    actors: Actors,
    what: str,
) -> int:
    """Sends every row group of `source/name` through `worker` and writes `target/part-00000.parquet` and so on.

    Args:
        columns: the columns that the worker gets.
        worker: a plain class; `arguments` build it once per actor. A part's result must have as many rows.
        what: the stage, for the progress line.

    Returns:
        the number of parts that were there already.

    Raises:
        TigerError: raised by the worker, passed on as it was.
    """
    with source.filesystem.open_input_file(source.join(name)) as file:
        metadata = pq.ParquetFile(file).metadata
        sizes = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    have = {part.rpartition("/")[2] for part in target.files()}
    missing = [part for part in range(len(sizes)) if _part_name(part) not in have]
    if len(missing) < len(sizes):
        log.info("%s: %d of %d parts are there already", what, len(sizes) - len(missing), len(sizes))
    if not missing:
        return len(sizes)
    cluster.connect(target)
    minimum, maximum, each = actors.resolve()
    maximum = min(maximum, len(missing))
    progress = Progress(what, sum(sizes), "rows", done=sum(sizes) - sum(sizes[part] for part in missing))
    log.info("%s: %d parts through %d to %d actors of %s", what, len(missing), min(minimum, maximum), maximum, each)
    # One block per part, so that every part is one task of each operator.
    parts = ray.data.from_items([{"part": part} for part in missing], override_num_blocks=len(missing))
    stream = (
        parts.map_batches(
            _read,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=_TASK_CPUS,
            fn_kwargs={"uri": source.uri, "name": name, "columns": columns},
        )
        .map_batches(
            _PartWorker,
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=min(minimum, maximum), max_size=maximum),
            fn_constructor_kwargs={"worker": worker, "arguments": arguments},
            **each,
        )
        .map_batches(
            _write, batch_size=None, batch_format="pyarrow", num_cpus=_TASK_CPUS, fn_kwargs={"uri": target.uri}
        )
    )
    for written in stream.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for rows, error in zip(written["rows"].to_pylist(), written[_ERROR].to_pylist(), strict=True):
            if error:
                kind, message = json.loads(error)
                raise getattr(errors, kind)(message)
            progress.add(rows)
            tracking.record(what, progress.done, {"rows": progress.done, "rows_per_second": progress.rate})
    progress.close()
    return len(sizes) - len(missing)


def _part_name(part: int) -> str:
    return f"part-{part:05d}.parquet"


def _read(batch: pa.Table, uri: str, name: str, columns: list[str]) -> pa.Table:
    part = batch["part"][0].as_py()
    folder = Folder(uri)
    with folder.filesystem.open_input_file(folder.join(name)) as file:
        table = pq.ParquetFile(file).read_row_group(part, columns=columns)
    return table.append_column(_PART, pa.array([part] * len(table), pa.int32()))


class _PartWorker:
    """Cuts what Ray Data hands over back into parts, should it have joined some.

    The worker is built with the first part, so that an error of its constructor goes the way of all errors.
    """

    def __init__(self, worker: Callable[..., Worker], arguments: dict[str, Any]) -> None:
        self.build = functools.cache(functools.partial(worker, **arguments))

    def __call__(self, table: pa.Table) -> pa.Table:
        results = []
        for part in table[_PART].unique().to_pylist():
            rows = table.filter(pc.equal(table[_PART], part)).drop_columns(_PART)
            try:
                result = self.build()(rows)
            except errors.TigerError as error:  # as a row: of an exception Ray Data keeps only the text
                return pa.table({_ERROR: [json.dumps([type(error).__name__, str(error)])]})
            if len(result) != len(rows):
                raise AssertionError(f"part {part}: {len(rows)} rows went in, {len(result)} came out")
            results.append(result.append_column(_PART, pa.array([part] * len(result), pa.int32())))
        return pa.concat_tables(results)


def _write(table: pa.Table, uri: str) -> pa.Table:
    if _ERROR in table.column_names:
        return pa.table({"rows": pa.array([0], pa.int64()), _ERROR: table[_ERROR]})
    folder, rows = Folder(uri), []
    for part in table[_PART].unique().to_pylist():
        own = table.filter(pc.equal(table[_PART], part)).drop_columns(_PART)
        folder.write_table(_part_name(part), own)
        rows.append(len(own))
    return pa.table({"rows": pa.array(rows, pa.int64()), _ERROR: pa.nulls(len(rows), pa.string())})
