"""Distributed training with Ray Train: a worker group that resumes from its last checkpoint after a failure."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray.exceptions
import ray.train
import ray.train.torch
import ray.util.queue
import torch
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tiger.core import tracking
from tiger.core.device import pretended_gpus
from tiger.core.errors import ResourceError, TigerError
from tiger.core.storage import SCRATCH, Folder
from tiger.on_ray import cluster, placement
from tiger.on_ray.failures import reason
from tiger.on_ray.watch import Watch, watching
from tiger.run import ResourcesConfig
from tiger.training.checkpoints import CheckpointStore
from tiger.training.job import TrainingJob
from tiger.training.loop import Callbacks

log = logging.getLogger(__name__)

_CONTROLLER_FAILURES = 3  # failed starts of a group, each after RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S
_PREEMPTIONS = 100


def train(
    job: TrainingJob,
    target: Folder,
    resources: ResourcesConfig,
    what: str,
    *,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Call `job.run` on every worker of a process group; return the result of rank 0.

    Checkpoints are in the target's scratch folder: after the loss of a worker or node the group restarts from the last
    one, and after the loss of the driver the same command resumes from it.

    Args:
        job: what to train; checkpoints are only used for a job with the same `identity()`.
        target: folder of the artifact that is being written.
        resources: resources of the run.
        what: the stage, for log lines.
        batch_size: rows per step over all workers; determines how many GPUs to use.

    Raises:
        TigerError: raised by the job on any rank; passed on unchanged, within seconds.
        ResourceError: the cluster can never provide the workers, or not in time; or the group failed more often than
            `resources.max_failures`.
    """
    cluster.connect(target)
    group = resources.training
    gpus = resources.gpus if group.gpus is None else 0
    cluster.wait_for_gpus(gpus, what, resources.wait_minutes)
    plan = placement.plan_training(
        cluster.shape(), workers=group.num_workers, cpus=group.cpus, gpus=gpus, batch_size=batch_size,
        what=f"{what}: training",
    )  # fmt: skip
    cluster.wait_for(plan.at_once, what, resources.wait_minutes)
    workers = plan.describe("worker")
    if batch_size is not None and plan.minimum > 1:
        workers += f", {batch_size / plan.minimum:,.0f} rows of a batch per worker"
    log.info("%s: %s", what, workers)
    with watching(what, "train", storage=target) as watch, _relayed_logs(what, watch) as logs:
        config = {
            # As bytes, so that the worker function opens its folders: it passes a TigerError of theirs on.
            "job": cloudpickle.dumps(job),
            "threads": max(1, int(plan.bundle.cpus)),
            "logs": logs,
            "snapshots": target.child(f"{SCRATCH}/snapshots").uri,
        }
        return _fit(config, plan, target, resources, what)


def _fit(
    config: dict[str, Any], plan: placement.Plan, target: Folder, resources: ResourcesConfig, what: str
) -> dict[str, Any]:
    pretended = plan.bundle.gpus and pretended_gpus()
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config=config,
        torch_config=ray.train.torch.TorchConfig(
            backend="gloo" if pretended else None, timeout_s=resources.collective_seconds
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.minimum, use_gpu=plan.bundle.gpus > 0, resources_per_worker=plan.bundle.resources
        ),
        run_config=ray.train.RunConfig(
            name=f"train-{time.time_ns()}",  # unique: never reuse Ray Train's own state, which may be corrupt
            storage_path=f"{target.uri}/{SCRATCH}",
            failure_config=ray.train.FailureConfig(
                max_failures=resources.max_failures,
                controller_failure_limit=_CONTROLLER_FAILURES,
                max_preemption_failures=_PREEMPTIONS,
            ),
            callbacks=[_Failures(config["logs"], resources.max_failures)],
        ),
    )
    try:
        returned: dict[str, Any] = trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        if (ours := _error_of_ours(error)) is not None:
            raise ours from None
        reasons = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None), error]
        found = next(reason(each) for each in reasons if each is not None)
        raise ResourceError(
            f"{what}: the training failed and could not be resumed: {found}. Rerun to resume from the last "
            f"checkpoint; the workers' logs: {cluster.log_folder()}/train"
        ) from error
    return returned


def _error_of_ours(error: BaseException | None) -> TigerError | None:
    """Return the TigerError inside Ray Train's wrappers, if there is one."""
    inner: list[Any] = [error]
    while inner:
        error = inner.pop()
        if isinstance(error, TigerError):
            return error
        inner += getattr(error, "worker_failures", {}).values()
        inner += [
            found
            for name in ("controller_failure", "_base_exc", "cause", "__cause__")
            if isinstance(found := getattr(error, name, None), BaseException)
        ]
    return None


class _Failures(ray.train.UserCallback):
    """Handles workers' exceptions in Ray Train's controller.

    A TigerError on any rank is deterministic: it ends the training at once, without Ray Train's retries, and without
    waiting for the other ranks to time out in a collective. Other failures are reported to the driver.
    """

    def __init__(self, lines: ray.util.queue.Queue, restarts: int) -> None:
        self.lines, self.restarts, self.seen = lines, restarts, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise a TigerError, which ends the training; send a log line about any other exception."""
        for exception in worker_exceptions.values():
            if (ours := _error_of_ours(exception)) is not None:
                raise ours
        self.seen += 1
        rank, exception = next(iter(worker_exceptions.items()))
        self.lines.put_nowait(
            f"worker {rank} failed: {reason(exception)}; "
            + (f"restarting ({self.seen} of {self.restarts})" if self.seen <= self.restarts else "no restart is left")
        )


@contextmanager
def _relayed_logs(what: str, watch: Watch) -> Iterator[ray.util.queue.Queue]:
    """Yield a queue that a thread of the driver reads: lines are logged, validation metrics are tracked."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # On the driver's node, so that the loss of a worker's node does not end the training.
    lines = ray.util.queue.Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    done = threading.Event()

    def relay() -> None:
        while True:
            try:
                for message in lines.get_nowait_batch(max(1, lines.qsize())):
                    watch.progress()
                    if isinstance(message, str):
                        log.info("%s", message)
                    else:
                        tracking.record(what, message["step"], message)
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
        """Send one record."""
        self.lines.put_nowait(self.format(record))


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    own = logging.getLogger("tiger")
    own.setLevel(logging.INFO)
    context, callbacks = ray.train.get_context(), Callbacks()
    job: TrainingJob = cloudpickle.loads(config["job"])
    if context.get_world_rank() == 0:
        own.addHandler(_ToDriver(config["logs"]))
        callbacks.report = config["logs"].put_nowait
    device = torch.device("cpu") if pretended_gpus() else ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(config["threads"])
    snapshots = CheckpointStore(
        Folder(config["snapshots"]),
        {"scale.training.max_workers": context.get_world_size(), **job.identity()},
        may_differ={"scale.training.max_workers"},
        in_background=True,
    )

    def save(state: dict[str, Any], metrics: dict[str, Any]) -> None:
        snapshots.save(state, metrics)
        ray.train.report(metrics)

    callbacks.save, callbacks.load = save, snapshots.load
    try:
        return job.run(device, callbacks)
    finally:
        snapshots.close()
