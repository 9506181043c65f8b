"""Ray Train around `training.fit`: a process group of workers that goes on from its last snapshot after a loss."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray.train
import ray.train.torch
import ray.util.queue
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tiger import tracking
from tiger.artifacts import SCRATCH, Folder
from tiger.errors import TigerError
from tiger.run import ScaleConfig
from tiger.scale import cluster
from tiger.snapshots import Snapshots
from tiger.training import Hooks

log = logging.getLogger(__name__)

_ERROR = "error"

WorkerLoop = Callable[[dict[str, Any], torch.device, Hooks], dict[str, Any]]


def train(loop: WorkerLoop, arguments: dict[str, Any], target: Folder, scale: ScaleConfig, what: str) -> dict[str, Any]:
    """Runs `loop(arguments, device, hooks)` on every worker of a process group; returns what rank 0 returned.

    Snapshots lie in the target's scratch folder: after the loss of a worker or node the group starts again from the
    last one, and so does the same command after the loss of the driver.

    Args:
        loop: a function that worker processes can import.
        target: the artifact being made.

    Raises:
        TigerError: raised by the loop, passed on as it was.
        ResourceError: more workers, CPUs or GPUs than the cluster has.
    """
    cluster.connect(target)
    workers, resources = _resources(scale)
    log.info("%s: %d workers with %s each", what, workers, resources)
    with _relayed_logs(what) as logs:
        config = {
            "loop": loop,
            "arguments": arguments,
            "threads": int(resources.get("CPU", 1)),
            "logs": logs,
            "snapshots": target.child(f"{SCRATCH}/snapshots").uri,
        }
        result = _fit(config, workers, resources, target, scale)
    if _ERROR in result:
        raise result[_ERROR]
    return result


def _fit(
    config: dict[str, Any], workers: int, resources: dict[str, float], target: Folder, scale: ScaleConfig
) -> dict[str, Any]:
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu="GPU" in resources, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=f"train-{time.time_ns()}",  # what Ray Train kept of an earlier start is of no use, and may be torn
            storage_path=f"{target.uri}/{SCRATCH}",
            failure_config=ray.train.FailureConfig(max_failures=scale.max_failures),
        ),
    )
    returned: dict[str, Any] = trainer.fit().return_value
    return returned


@contextmanager
def _relayed_logs(what: str) -> Iterator[ray.util.queue.Queue]:
    """A queue that a thread of the driver empties: lines go to its log, figures of looks to whoever tracks them."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # On the driver's node: lost with another one, it would take a training down that survives the loss of a worker.
    lines = ray.util.queue.Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    done = threading.Event()

    def relay() -> None:
        while True:
            try:
                for said in lines.get_nowait_batch(max(1, lines.qsize())):
                    if isinstance(said, str):
                        log.info("%s", said)
                    else:
                        tracking.record(what, said["step"], said)
            except queue.Empty:
                if done.wait(0.5):
                    return

    thread = threading.Thread(target=relay, name="relay of workers' logs", daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        done.set()
        thread.join()
        lines.shutdown()


class _ToDriver(logging.Handler):
    """Sends log records to the driver's queue."""

    def __init__(self, lines: ray.util.queue.Queue) -> None:
        super().__init__(logging.INFO)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.put_nowait(self.format(record))


def _resources(scale: ScaleConfig) -> tuple[int, dict[str, float]]:
    gpus = cluster.cluster_gpus()
    workers = scale.train_workers or max(1, gpus)
    use_gpu = gpus >= workers
    cpus = scale.cpus_per_worker
    if cpus is None:
        cpus = 1 if use_gpu else max(1, (cluster.cluster_cpus() - cluster.RESERVED_CPUS) // workers)
    resources: dict[str, float] = {"CPU": cpus, "GPU": 1} if use_gpu else {"CPU": cpus}
    cluster.require(cpus * workers, workers if use_gpu else 0, f"training with {workers} workers")
    return workers, resources


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    own = logging.getLogger("tiger")
    own.setLevel(logging.INFO)
    hooks = Hooks()
    if ray.train.get_context().get_world_rank() == 0:
        own.addHandler(_ToDriver(config["logs"]))
        hooks.report = config["logs"].put_nowait
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(config["threads"])
    given = {key: value for key, value in config["arguments"].items() if key != "target"}
    world_size = ray.train.get_context().get_world_size()
    snapshots = Snapshots(Folder(config["snapshots"]), {"scale.train_workers": world_size, **given})

    def save(state: dict[str, Any], metrics: dict[str, Any]) -> None:
        snapshots.save(state, metrics)
        ray.train.report(metrics)  # waits for all workers: none goes on before the snapshot is there

    try:
        hooks.save, hooks.load = save, snapshots.load
        return config["loop"](config["arguments"], device, hooks)
    except TigerError as error:
        return {_ERROR: error}  # it would come again: not worth the retries that Ray Train makes after an exception
