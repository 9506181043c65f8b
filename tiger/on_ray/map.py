"""Resumable shard-wise map of a table on an actor pool.

A *shard* is a row group of the source, or several if these are small. Shards are read by tasks, computed by actors
that hold an expensive object (a model), and written atomically by tasks, each to its own file. So reruns process only
missing shards, no shard is written twice, and the result does not depend on the number of actors or on lost ones.

Between the operators a shard is one row, with its tables as Arrow IPC bytes, so that Ray Data neither merges nor splits
shards.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import ray.exceptions
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tiger.core import tracking
from tiger.core.device import assigned_device
from tiger.core.errors import ResourceError, TigerError
from tiger.core.progress import Progress
from tiger.core.resources import Resources
from tiger.core.storage import Folder
from tiger.on_ray import cluster, placement
from tiger.on_ray.failures import reason
from tiger.on_ray.watch import watching
from tiger.run import ResourcesConfig

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 4
"""Maximum attempts to compute a shard that kills its actor."""


class Worker(Protocol):
    """Function of an actor: constructed once, with `device` in addition to its arguments, and called per shard."""

    def __call__(self, part: pa.Table, /) -> pa.Table | Mapping[str, pa.Table | bytes]:
        """Return a table with the same number of rows, or several outputs by folder.

        Of several, the one of the folder `into` has the same number of rows. Bytes are written as JSON lines.
        """
        ...


def map_shards(
    source: Folder,
    name: str,
    columns: list[str],
    target: Folder,
    worker: Callable[..., Worker],
    arguments: dict[str, Any],
    *,
    actors: Resources,
    what: str,
    scale: ResourcesConfig | None = None,
    into: str = "",
    unit: str = "rows",
    size_by: str | None = None,
) -> int:
    """Apply `worker` to every shard of `source/name` and write `target/part-00000.parquet` and so on.

    Args:
        source: folder of the table.
        name: Parquet file of the table.
        columns: the columns that are passed to the worker.
        target: folder of the results.
        worker: a plain class, constructed once per actor with `arguments` and the `device` that Ray assigned. A shard's
            result must have the same number of rows.
        arguments: keyword arguments of `worker`.
        actors: size of the pool, and CPUs (without a GPU) and GPUs per actor.
        what: the stage, for the progress line.
        scale: GPUs of the run, and how long to wait for them.
        into: of a worker with several outputs, the folder inside `target` whose file is written last: a shard is
            finished when that file is there.
        unit: plural name of a row, for the progress line.
        size_by: the column whose bytes, a measure of the work and memory, determine which row groups are a shard
            together, see `plan_shards`; None: each is one.

    Returns:
        The number of shards that were already finished.

    Raises:
        TigerError: raised by the worker; passed on unchanged.
        ResourceError: the pool never fits the cluster, nodes for it are not added in time, or a shard killed its actor
            `MAX_ATTEMPTS` times; names the shard and its rows.
    """
    with source.open_input(name) as file:
        metadata = pq.read_metadata(file)
    shards = plan_shards(metadata, size_by)
    sizes = [sum(metadata.row_group(index).num_rows for index in groups) for groups in shards]
    marker = target.child(into) if into else target
    have = {file.rpartition("/")[2] for file in marker.files()}
    missing = [shard for shard in range(len(shards)) if shard_name(shard) not in have]
    if len(missing) < len(sizes):
        log.info("%s: %d of %d shards are already finished", what, len(sizes) - len(missing), len(sizes))
    if not missing:
        return len(sizes)
    scale = scale or ResourcesConfig()
    cluster.connect(target)
    if actors.gpus != 0:
        cluster.wait_for_gpus(scale.gpus, what, scale.wait_minutes)
    plan = placement.plan_pool(
        cluster.shape(), len(missing), minimum=actors.min_workers or 1, maximum=actors.max_workers,
        cpus=actors.cpus or 1.0, gpus_per_actor=actors.gpus, gpus=scale.gpus, what=f"{what}: a pool",
    )  # fmt: skip
    cluster.wait_for(plan.at_once, what, scale.wait_minutes)
    ends = list(itertools.accumulate(sizes))

    def describe(shard: int) -> str:
        return f"{shard} of {name} (rows {ends[shard] - sizes[shard]} to {ends[shard] - 1} of {ends[-1]})"

    progress = Progress(what, sum(sizes), unit, done=sum(sizes) - sum(sizes[shard] for shard in missing))
    log.info("%s: %s, %s", what, placement.counted(len(missing), "shard"), plan.describe("actor"))
    attempts = _start_attempts()

    def in_progress() -> str:
        running = _running(attempts)
        return "no shard is being computed" if not running else f"shards {running[:5]} are being computed"

    try:
        with watching(what, "ray-data/ray-data.log", details=in_progress, storage=target) as watch:
            tasks = {shard: shards[shard] for shard in missing}
            stream = _stream(source, name, columns, metadata, target, into, worker, arguments, tasks, plan, attempts)
            for written in stream.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in written.to_pylist():
                    _raise_error(row, describe)
                    progress.add(row["rows"])
                    watch.progress()
                    tracking.record(what, progress.done, {"rows": progress.done, "rows_per_second": progress.rate})
    except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
        suspects = ", ".join(describe(shard) for shard in _running(attempts)) or "not known"
        raise ResourceError(
            f"{what}: its actors were lost repeatedly while they computed shard {suspects}. "
            f"Ray reports: {reason(error)}"
        ) from error
    finally:
        ray.kill(attempts)
    progress.close()
    return len(sizes) - len(missing)


_SHARDS = 1024  # number of shards above which row groups are joined
_SHARD_BYTES = 16 << 20  # maximum bytes of the column by which shards are sized, in shards of joined row groups
_SHARD_ROWS = 1 << 15  # maximum rows in such shards: 50 MB of vectors with 384 dimensions


def plan_shards(metadata: pq.FileMetaData, column: str | None = None) -> list[list[int]]:
    """Return the row groups of every shard: a function of the table alone, so that a rerun finds the same shards.

    With more than `_SHARDS` row groups, a shard of a single one is mostly overhead. So consecutive ones are joined up
    to 1 / `_SHARDS` of the bytes of `column`, and at most `_SHARD_BYTES` and `_SHARD_ROWS`.

    Args:
        metadata: footer of the table.
        column: the column that determines the sizes; None: every row group is a shard.
    """
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    if column is None or len(groups) <= _SHARDS:
        return [[index] for index in range(len(groups))]
    at = metadata.schema.names.index(column)
    sizes = [group.column(at).total_uncompressed_size for group in groups]
    limit = min(_SHARD_BYTES, -(-sum(sizes) // _SHARDS))
    shards: list[list[int]] = []
    held = rows = 0
    for index, (group, size) in enumerate(zip(groups, sizes, strict=True)):
        if not shards or held + size > limit or rows + group.num_rows > _SHARD_ROWS:
            shards.append([])
            held = rows = 0
        shards[-1].append(index)
        held, rows = held + size, rows + group.num_rows
    return shards


def _stream(
    source: Folder,
    name: str,
    columns: list[str],
    metadata: pq.FileMetaData,
    target: Folder,
    into: str,
    worker: Callable[..., Worker],
    arguments: dict[str, Any],
    tasks: dict[int, list[int]],
    plan: placement.Plan,
    attempts: Any,
) -> ray.data.Dataset:
    """Return a dataset with one row per shard that was written or failed: `shard`, `rows`, `error`."""
    # One block per shard, so that every shard is one task of each operator.
    items = [{"shard": shard, "groups": groups} for shard, groups in tasks.items()]
    shards = ray.data.from_items(items, override_num_blocks=len(items))
    one = {"batch_size": 1, "batch_format": "pyarrow"}
    resources = {"num_gpus": plan.bundle.gpus} if plan.bundle.gpus else {"num_cpus": plan.bundle.cpus}
    # A footer has about 1 kB per shard, so that reading it for every shard takes time quadratic in their number.
    given = {"uri": source.uri, "name": name, "columns": columns, "footer": [ray.put(metadata)]}
    read = shards.map_batches(_read, num_cpus=placement.TASK_CPUS, fn_kwargs=given, **one)
    with warnings.catch_warnings():  # Ray 2.60 has no named parameter that limits retries
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        computed = read.map_batches(
            _Compute,
            compute=ray.data.ActorPoolStrategy(min_size=plan.minimum, max_size=plan.maximum),
            fn_constructor_kwargs={"worker": worker, "arguments": arguments, "attempts": attempts, "into": into},
            max_task_retries=2 * MAX_ATTEMPTS,  # limits failures that `_Attempts` does not count
            **one,
            **resources,
        )
    return computed.map_batches(_write, num_cpus=placement.TASK_CPUS, fn_kwargs={"uri": target.uri}, **one)


def shard_name(shard: int) -> str:
    """Return the name of the file with a shard's table."""
    return f"part-{shard:05d}.parquet"


def _row(
    shard: int, outputs: Mapping[str, pa.Table | bytes], rows: int = 0, error: TigerError | None = None
) -> pa.Table:
    """Return a shard as the one row passed between operators: its number, outputs by folder, and an error as JSON.

    A table is in Arrow IPC format. An error is a row because Ray Data flattens exceptions to text.
    """
    kinds = ["lines" if isinstance(output, bytes) else "table" for output in outputs.values()]
    return pa.table(
        {
            "shard": pa.array([shard], pa.int32()),
            "folders": pa.array([list(outputs)], pa.list_(pa.string())),
            "kinds": pa.array([kinds], pa.list_(pa.string())),
            "contents": pa.array([[_packed(output) for output in outputs.values()]], pa.list_(pa.large_binary())),
            "rows": pa.array([rows], pa.int64()),
            "error": pa.array([None if error is None else json.dumps(error.to_record())], pa.string()),
        }
    )


def _packed(output: pa.Table | bytes) -> bytes:
    if isinstance(output, bytes):
        return output
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, output.schema) as stream:
        stream.write_table(output)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


def _table(row: pa.Table, index: int = 0) -> pa.Table:
    return pa.ipc.open_stream(row["contents"][0][index].as_buffer()).read_all()


def _read(row: pa.Table, uri: str, name: str, columns: list[str], footer: list[ray.ObjectRef]) -> pa.Table:
    shard, folder = row["shard"][0].as_py(), Folder(uri)
    with folder.filesystem.open_input_file(folder.join(name)) as file:
        groups = row["groups"][0].as_py()
        table = pq.ParquetFile(file, metadata=_metadata(*footer)).read_row_groups(groups, columns=columns)
    return _row(shard, {"": table})


@functools.lru_cache(maxsize=1)
def _metadata(footer: ray.ObjectRef) -> pq.FileMetaData:
    """Return the metadata of the source that the driver has read; once per process, regardless of its shards."""
    return ray.get(footer)


class _Compute:
    """Runs the worker on one shard at a time.

    The worker is constructed with the first shard, so that errors of its constructor are handled like all errors.
    """

    def __init__(self, worker: Callable[..., Worker], arguments: dict[str, Any], attempts: Any, into: str) -> None:
        context = ray.get_runtime_context()
        device = assigned_device(ray.get_gpu_ids())
        if device.type == "cpu":
            torch.set_num_threads(max(1, int(context.get_assigned_resources().get("CPU", 1))))
        self.attempts, self.into = attempts, into
        self.build = functools.cache(functools.partial(worker, **arguments, device=device))

    def __call__(self, row: pa.Table) -> pa.Table:
        if row["error"][0].as_py():
            return row
        shard, table = row["shard"][0].as_py(), _table(row)
        if (number := ray.get(self.attempts.begin.remote(shard))) > MAX_ATTEMPTS:
            return _row(shard, {}, error=ResourceError(_KILLED))
        try:
            result = self.build()(table)
        except TigerError as error:
            return _row(shard, {}, error=error)
        except torch.cuda.OutOfMemoryError as error:
            return _row(shard, {}, error=ResourceError(f"{_NO_MEMORY} ({str(error).splitlines()[0]})"))
        finally:
            ray.get(self.attempts.end.remote(shard))
        if number > 1:
            log.info("shard %d was computed at attempt %d", shard, number)
        outputs = result if isinstance(result, Mapping) else {self.into: result}
        if len(outputs[self.into]) != len(table):
            raise AssertionError(f"shard {shard}: {len(table)} input rows, {len(outputs[self.into])} output rows")
        others = {folder: output for folder, output in outputs.items() if folder != self.into}
        return _row(shard, others | {self.into: outputs[self.into]}, len(table))


_KILLED = (
    f"the process that computes it was lost {MAX_ATTEMPTS} times, most likely due to lack of memory: lower "
    "embedding.batch_tokens or the number of actors per node, and check the texts of these rows"
)
_NO_MEMORY = "a GPU is out of memory: lower embedding.batch_tokens, or give each actor a larger fraction of a GPU"


def _write(row: pa.Table, uri: str) -> pa.Table:
    """Write the outputs of a shard, the one that marks it as finished last."""
    shard, target = row["shard"][0].as_py(), Folder(uri)
    for index, (folder, kind) in enumerate(zip(row["folders"][0].as_py(), row["kinds"][0].as_py(), strict=True)):
        file = f"{folder}/{shard_name(shard)}".lstrip("/")
        if kind == "table":
            target.write_table(file, _table(row, index))
        else:
            target.write_bytes(f"{file.removesuffix('.parquet')}.jsonl", row["contents"][0][index].as_py())
    return row.select(["shard", "rows", "error"])


def _raise_error(row: dict[str, Any], describe: Callable[[int], str]) -> None:
    """Raise the error of a row unchanged, prefixed with the shard if its process was lost or out of memory."""
    if not row["error"]:
        return
    record = json.loads(row["error"])
    if record["message"] == _KILLED or record["message"].startswith(_NO_MEMORY):
        record["message"] = f"shard {describe(row['shard'])}: {record['message']}"
    raise TigerError.from_record(record)


class _Attempts:
    """Counts how often each shard was started without being finished, to find shards that kill their actor."""

    def __init__(self) -> None:
        self.begun: dict[int, int] = {}

    def begin(self, shard: int) -> int:
        """Record the start of a shard; return the number of the attempt, from 1."""
        self.begun[shard] = self.begun.get(shard, 0) + 1
        return self.begun[shard]

    def end(self, shard: int) -> None:
        """Record the end of a shard."""
        self.begun.pop(shard, None)

    def running(self) -> list[int]:
        """Return the shards that were started and are not finished, those with the most attempts first."""
        return sorted(self.begun, key=lambda shard: (-self.begun[shard], shard))


def _start_attempts() -> Any:
    """Start the counter on the driver's node, so that it is not lost with another node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(_Attempts).options(num_cpus=0, scheduling_strategy=here).remote()


def _running(attempts: Any) -> list[int]:
    try:
        running: list[int] = ray.get(attempts.running.remote(), timeout=5)
    except ray.exceptions.RayError:
        return []
    return running
